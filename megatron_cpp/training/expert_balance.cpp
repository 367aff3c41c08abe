#include "megatron_cpp/training/expert_balance.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <tuple>
#include <utility>

#include "megatron_cpp/optimizer/gradient_buffer.h"
#include "parallel/collectives.h"

namespace megatron_cpp {
namespace {

/// [layers, E] -> [1]: the largest quotient of a number and its layer's `middle` [layers, 1].
at::Tensor largest_quotient(const at::Tensor& numbers, const at::Tensor& middle) {
  return (numbers / middle).max().reshape({1});
}

}  // namespace

ExpertBalance::ExpertBalance(std::vector<MoELayer> layers, const parallel::ProcessGroups& groups)
    : layers_(std::move(layers)), tp_dp_(groups.of("tp_dp")), etp_ep_(groups.of("etp_ep")) {
  TORCH_CHECK_VALUE(!layers_.empty(), "no layer has experts to balance");
  zero();
}

std::vector<std::string> ExpertBalance::metric_names() { return {"moe_max_load", "moe_expert_norm_dispersion"}; }

void ExpertBalance::zero() {
  const auto options = layers_.front()->router->weight.options().dtype(at::kDouble).requires_grad(false);
  tokens_per_expert_ =
      at::zeros({static_cast<int64_t>(layers_.size()), layers_.front()->config().num_experts}, options);
}

void ExpertBalance::add(const RouterStatistics& statistics) { tokens_per_expert_.add_(statistics.tokens_per_expert()); }

at::Tensor ExpertBalance::squared_norms() const {
  auto squares = at::zeros_like(tokens_per_expert_);
  for (size_t i = 0; i < layers_.size(); ++i) {
    const auto& experts = layers_[i]->experts;
    const auto range = experts->experts();
    auto own = squares[static_cast<int64_t>(i)].narrow(0, range.begin, range.length());
    for (const auto& weights : {experts->linear_fc1, experts->linear_fc2}) {
      own.add_(squares_of_blocks(weights.detach().unbind(0)).view({range.length(), -1}).sum(1));
    }
  }
  return parallel::all_reduce(squares, etp_ep_);
}

at::Tensor ExpertBalance::reduce() {
  tokens_per_expert_ = parallel::all_reduce(tokens_per_expert_, tp_dp_);
  const auto norms = squared_norms().sqrt();
  return at::cat({largest_quotient(tokens_per_expert_, tokens_per_expert_.mean(1, /*keepdim=*/true)),
                  largest_quotient(norms, std::get<0>(norms.median(1, /*keepdim=*/true)))});
}

void ExpertBalance::update_biases() {
  const double rate = layers_.front()->config().router_bias_update_rate;
  if (rate == 0.0) return;
  const at::NoGradGuard no_grad;
  const auto signs = (tokens_per_expert_.mean(1, /*keepdim=*/true) - tokens_per_expert_).sign();
  for (size_t i = 0; i < layers_.size(); ++i) {
    layers_[i]->router->expert_bias.add_(signs[static_cast<int64_t>(i)], rate);
  }
}

}  // namespace megatron_cpp
