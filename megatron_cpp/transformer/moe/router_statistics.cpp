#include "megatron_cpp/transformer/moe/router_statistics.h"

#include <ATen/ATen.h>

#include <utility>

#include "parallel/mappings.h"

namespace megatron_cpp {
namespace {

/// [E] float64: how often each expert is in `experts` [n, K], each token counting as much as its weight [n].
at::Tensor counts_of(const at::Tensor& experts, const at::Tensor& weights, int64_t num_experts) {
  const auto values = weights.unsqueeze(1).expand(experts.sizes()).reshape({-1});
  return at::zeros({num_experts}, values.options()).scatter_add_(0, experts.reshape({-1}), values);
}

/// [G] float64: the tokens that have an expert of each group.
at::Tensor tokens_of_groups(const at::Tensor& experts, const at::Tensor& weights, const MoEConfig& config) {
  const int64_t groups = config.group_balance_groups;
  const auto group = experts.div(config.num_experts / groups, "floor");
  const auto reached = at::zeros({experts.size(0), groups}, weights.options()).scatter_(1, group, 1.0);
  return (reached * weights.unsqueeze(1)).sum(0);
}

}  // namespace

std::vector<std::string> router_loss_names(const MoEConfig& config) {
  std::vector<std::string> names;
  if (config.aux_loss_coeff > 0.0) names.emplace_back("load_balancing_loss");
  if (config.group_balance_loss_coeff > 0.0) names.emplace_back("group_balance_loss");
  if (config.z_loss_coeff > 0.0) names.emplace_back("z_loss");
  return names;
}

void RouterStatistics::add(const Routing& routing, const MoEConfig& config, int64_t begin) {
  const auto& experts = routing.experts;
  const int64_t n = experts.size(0);
  auto weights = at::ones({n}, experts.options().dtype(at::kDouble));
  if (padding_mask_.defined()) {
    weights.masked_fill_(padding_mask_.t().reshape({-1}).narrow(0, begin, n).ne(0), 0.0);
  }
  auto& layer = layers_.emplace_back();
  layer.tokens_per_expert = counts_of(experts, weights, config.num_experts);
  if (router_loss_names(config).empty()) return;

  const auto& scores = routing.scores;
  // The addend is Megatron-Core's.
  const auto shares = scores / (scores.sum(-1, /*keepdim=*/true) + 1e-20);
  const auto highest = highest_scores(scores.detach(), config.router_topk);
  const auto squares = routing.logits.logsumexp(-1).square();
  layer.sums = at::cat({counts_of(highest, weights, config.num_experts), (shares * weights.unsqueeze(1)).sum(0),
                        tokens_of_groups(experts, weights, config), (squares * weights).sum(0, /*keepdim=*/true),
                        weights.sum(0, /*keepdim=*/true)});
}

at::Tensor RouterStatistics::tokens_per_expert() const {
  return at::stack(c10::fmap(layers_, [](const auto& layer) { return layer.tokens_per_expert; }));
}

std::vector<at::Tensor> RouterStatistics::losses(const MoEConfig& config, const parallel::GroupPtr& tp) const {
  if (router_loss_names(config).empty()) return {};
  const int64_t E = config.num_experts;
  const int64_t G = config.group_balance_groups;
  const auto own = at::stack(c10::fmap(layers_, [](const auto& layer) { return layer.sums; }));
  const auto sums = parallel::reduce_from_tensor_model_parallel_region(own, tp);
  const auto parts = sums.split_with_sizes({E, E, G, 1, 1}, 1);
  const auto num_tokens = parts[4].clamp_min(1.0);  // a batch may be all padding
  const auto chosen = parts[0] / num_tokens;
  const auto shares = parts[1] / num_tokens;
  std::vector<at::Tensor> losses;
  if (config.aux_loss_coeff > 0.0) {
    const auto factor = config.aux_loss_coeff * static_cast<double>(E) / static_cast<double>(config.router_topk);
    losses.push_back((shares * chosen).sum() * factor);
  }
  if (config.group_balance_loss_coeff > 0.0) {
    const auto of_groups = shares.unflatten(1, {G, E / G}).sum(-1);
    losses.push_back((parts[2] / num_tokens * of_groups).sum() *
                     (config.group_balance_loss_coeff * static_cast<double>(G)));
  }
  if (config.z_loss_coeff > 0.0) losses.push_back((parts[3] / num_tokens).sum() * config.z_loss_coeff);
  return losses;
}

}  // namespace megatron_cpp
