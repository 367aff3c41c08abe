#include "megatron_cpp/transformer/moe/moe_layer.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <vector>

#include "megatron_cpp/transformer/recompute.h"
#include "parallel/mappings.h"
#include "parallel/named_range.h"

namespace megatron_cpp {

MoELayerImpl::MoELayerImpl(const TransformerConfig& config, const LayerConfig& layer,
                           const TransformerExecution& execution, const ModelGroups& groups)
    : groups_(groups),
      sequence_parallel_(execution.sequence_parallel),
      recomputes_experts_(execution.recomputed.experts) {
  TORCH_CHECK_VALUE(config.moe.has_value(), "a layer has experts, but the configuration has no `moe`");
  config_ = *config.moe;
  const int t = groups.tp->getSize();
  config_.validate(t, groups.ep_size(), groups.etp->getSize());
  const auto domain = t > 1 ? GradientDomain::kReplicatedPartial : GradientDomain::kReplicated;
  router = register_module("router", TopKRouter(config_, config.hidden_size, config.init_std, domain));
  experts = register_module("experts", GroupedExperts(config, layer.expert_swiglu_limit, execution, groups));
  if (config_.shared_expert_ffn_hidden_size > 0) {
    shared_experts = register_module(
        "shared_experts", MLP(config, config_.shared_expert_ffn_hidden_size, layer.swiglu_limit, execution, groups.tp));
  }
}

at::Tensor MoELayerImpl::routed_experts(const at::Tensor& tokens, int64_t begin, RouterStatistics* statistics,
                                        std::optional<TokenDispatcher>* dispatcher) {
  std::optional<TokenDispatcher> own;
  auto& ways = dispatcher == nullptr ? own : *dispatcher;
  const auto routing =
      parallel::in_range("router", [&] { return router->forward(tokens, ways ? ways->experts() : at::Tensor()); });
  if (statistics != nullptr) statistics->add(routing, config_, begin);
  if (!ways) ways.emplace(routing.experts, config_.num_experts, experts->experts(), groups_);
  const RecomputedBody compute = [taken = *ways, own_experts = experts.ptr()](const auto& inputs) {
    const auto dispatched = parallel::in_range("dispatch", [&] { return taken.dispatch(inputs[0], inputs[1]); });
    const auto outputs = parallel::in_range("experts", [&] { return own_experts->forward(dispatched); });
    return std::vector{parallel::in_range("combine", [&] { return taken.combine(outputs); })};
  };
  const std::vector<at::Tensor> inputs{tokens, routing.weights};
  return (recomputes_experts_ ? recompute(compute, inputs, experts->parameters()) : compute(inputs))[0];
}

at::Tensor MoELayerImpl::forward(const at::Tensor& input, RouterStatistics* statistics,
                                 std::optional<TokenDispatcher>* dispatcher) {
  const auto tokens = input.reshape({-1, input.size(-1)});
  at::Tensor routed;
  const int64_t t = groups_.tp->getSize();
  const int64_t rank = groups_.tp->getRank();
  const int64_t n = tokens.size(0);
  if (sequence_parallel_ || t == 1) {
    routed = routed_experts(tokens, n * rank, statistics, dispatcher);
  } else {
    // Every rank takes as many rows; the last ones may be padding, which is not routed.
    const int64_t rows = (n + t - 1) / t;
    const int64_t begin = std::min(rows * rank, n);
    const int64_t own = std::min(rows, n - begin);
    const auto padded = at::constant_pad_nd(tokens, {0, 0, 0, rows * t - n});
    const auto share = parallel::scatter_to_sequence_parallel_region(padded, groups_.tp).narrow(0, 0, own);
    const auto whole = at::constant_pad_nd(routed_experts(share, begin, statistics, dispatcher), {0, 0, 0, rows - own});
    routed = parallel::gather_from_sequence_parallel_region_to_replicated_use(whole, groups_.tp).narrow(0, 0, n);
  }
  routed = routed.view(input.sizes());
  return shared_experts ? routed + shared_experts->forward(input) : routed;
}

}  // namespace megatron_cpp
