#include "megatron_cpp/transformer/moe/router.h"

#include <ATen/ATen.h>

#include <vector>

#include "megatron_cpp/transformer/recompute.h"

namespace megatron_cpp {

at::Tensor highest_scores(const at::Tensor& scores, int64_t topk) {
  // A stable sort, since topk may choose any of equal scores.
  const auto order = std::get<1>(at::sort(scores, /*stable=*/true, /*dim=*/-1, /*descending=*/true));
  return order.narrow(1, 0, topk).contiguous();
}

TopKRouterImpl::TopKRouterImpl(const MoEConfig& config, int64_t hidden_size, double init_std, GradientDomain domain)
    : config_(config), init_std_(init_std), domain_(domain) {
  weight = register_parameter("weight", at::zeros({config.num_experts, hidden_size}), !config.freeze_router);
  expert_bias = register_parameter("expert_bias", at::zeros({config.num_experts}), /*requires_grad=*/false);
}

Routing TopKRouterImpl::forward(const at::Tensor& tokens, const at::Tensor& earlier) {
  use_parameters();
  const auto wide = tokens.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto dtype = config_.router_in_float32 ? wide : weight.scalar_type();
  const auto convert = [dtype](const at::Tensor& narrow) { return narrow.to(dtype); };
  const auto product = [&](const at::Tensor& x) { return std::vector{at::linear(x, weight.to(dtype))}; };
  // The layer keeps the tokens as they are; a wider copy would be twice as much.
  const bool keeps_tokens = tokens.scalar_type() == dtype;
  const auto logits = (keeps_tokens ? product(tokens) : recompute_between(convert, tokens, product))[0].to(wide);
  const auto scores = logits.sigmoid();
  const auto experts =
      earlier.defined() ? earlier : highest_scores(scores.detach() + expert_bias.to(wide), config_.router_topk);
  const auto chosen = scores.gather(1, experts);
  const auto sum = chosen.sum(-1, /*keepdim=*/true);
  const auto is_zero = sum.eq(0).to(wide);
  const auto shares = (chosen + is_zero) / (sum + is_zero * static_cast<double>(config_.router_topk));
  return {experts, shares * config_.router_scaling_factor, logits, scores};
}

void TopKRouterImpl::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  const auto bias = expert_bias.detach().to(device, c10::promoteTypes(dtype, at::kFloat));
  torch::nn::Module::to(device, dtype, non_blocking);
  expert_bias.set_data(bias);
}

void TopKRouterImpl::to(torch::Dtype dtype, bool non_blocking) { to(expert_bias.device(), dtype, non_blocking); }

std::vector<ParameterShard> TopKRouterImpl::own_parameters() const {
  return {replicated_parameter("weight", weight, domain_, InitialValue::normal(init_std_), true),
          replicated_parameter("expert_bias", expert_bias, GradientDomain::kReplicated, InitialValue::constant(0.0),
                               false)};
}

}  // namespace megatron_cpp
