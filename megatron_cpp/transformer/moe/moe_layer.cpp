#include "megatron_cpp/transformer/moe/moe_layer.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "megatron_cpp/transformer/moe/token_dispatcher.h"
#include "parallel/mappings.h"

namespace megatron_cpp {

MoELayerImpl::MoELayerImpl(const TransformerConfig& config, const LayerConfig& layer,
                           const TransformerExecution& execution, const ModelGroups& groups)
    : groups_(groups), sequence_parallel_(execution.sequence_parallel) {
  TORCH_CHECK_VALUE(config.moe.has_value(), "a layer has experts, but the configuration has no `moe`");
  const auto& moe = *config.moe;
  const int t = groups.tp->getSize();
  moe.validate(t, groups.ep_size(), groups.etp->getSize());
  num_experts_ = moe.num_experts;
  const auto domain = t > 1 ? GradientDomain::kReplicatedPartial : GradientDomain::kReplicated;
  router = register_module("router", TopKRouter(moe, config.hidden_size, config.init_std, domain));
  experts = register_module("experts", GroupedExperts(config, layer.expert_swiglu_limit, execution, groups));
  if (moe.shared_expert_ffn_hidden_size > 0) {
    shared_experts = register_module(
        "shared_experts", MLP(config, moe.shared_expert_ffn_hidden_size, layer.swiglu_limit, execution, groups.tp));
  }
}

at::Tensor MoELayerImpl::routed_experts(const at::Tensor& tokens) {
  const TokenDispatcher dispatcher(router->forward(tokens), num_experts_, experts->experts(), groups_);
  return dispatcher.combine(experts->forward(dispatcher.dispatch(tokens)));
}

at::Tensor MoELayerImpl::forward(const at::Tensor& input) {
  const auto tokens = input.reshape({-1, input.size(-1)});
  at::Tensor routed;
  const int64_t t = groups_.tp->getSize();
  if (sequence_parallel_ || t == 1) {
    routed = routed_experts(tokens);
  } else {
    // Every rank takes as many rows; the last ones may be padding, which is not routed.
    const int64_t n = tokens.size(0);
    const int64_t rows = (n + t - 1) / t;
    const int64_t own = std::clamp<int64_t>(n - rows * groups_.tp->getRank(), 0, rows);
    const auto padded = at::constant_pad_nd(tokens, {0, 0, 0, rows * t - n});
    const auto share = parallel::scatter_to_sequence_parallel_region(padded, groups_.tp).narrow(0, 0, own);
    const auto whole = at::constant_pad_nd(routed_experts(share), {0, 0, 0, rows - own});
    routed = parallel::gather_from_sequence_parallel_region_to_replicated_use(whole, groups_.tp).narrow(0, 0, n);
  }
  routed = routed.view(input.sizes());
  return shared_experts ? routed + shared_experts->forward(input) : routed;
}

}  // namespace megatron_cpp
