#include "megatron_cpp/transformer/moe/token_dispatcher.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

#include <numeric>
#include <utility>

#include "megatron_cpp/tensor_parallel/rows.h"
#include "parallel/collectives.h"
#include "parallel/mappings.h"

namespace megatron_cpp {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Adds rows to the tokens that they belong to, one list of numbers after the other: no token is twice in a list, so no
/// order is left open.
at::Tensor added_up(const at::Tensor& rows, const at::Tensor& numbers, const std::vector<int64_t>& lengths,
                    int64_t num_tokens) {
  const auto wide = rows.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  auto sum = at::zeros({num_tokens, rows.size(1)}, rows.options().dtype(wide));
  int64_t begin = 0;
  for (const int64_t length : lengths) {
    sum.index_add_(0, numbers.narrow(0, begin, length), rows.narrow(0, begin, length).to(wide));
    begin += length;
  }
  return sum.to(rows.scalar_type());
}

/// Copies of tokens, list by list.
struct PermuteFunction : torch::autograd::Function<PermuteFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& tokens, const at::Tensor& numbers,
                            const std::vector<int64_t>& lengths) {
    context->save_for_backward({numbers});
    context->saved_data["lengths"] = lengths;
    context->saved_data["num_tokens"] = tokens.size(0);
    return tokens.index_select(0, numbers);
  }
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const auto numbers = context->get_saved_variables()[0];
    const auto lengths = context->saved_data["lengths"].toIntVector();
    return {added_up(gradients[0], numbers, lengths, context->saved_data["num_tokens"].toInt()), {}, {}};
  }
};

/// The transpose of PermuteFunction.
struct UnpermuteFunction : torch::autograd::Function<UnpermuteFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& rows, const at::Tensor& numbers,
                            const std::vector<int64_t>& lengths, int64_t num_tokens) {
    context->save_for_backward({numbers});
    return added_up(rows, numbers, lengths, num_tokens);
  }
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    return {gradients[0].index_select(0, context->get_saved_variables()[0]), {}, {}, {}};
  }
};

}  // namespace

TokenDispatcher::TokenDispatcher(at::Tensor experts, int64_t num_experts, parallel::Range own_experts,
                                 const ModelGroups& groups)
    : groups_(groups), experts_(std::move(experts)), own_experts_(own_experts) {
  const auto ep = static_cast<size_t>(groups.ep_size());
  const auto etp = static_cast<size_t>(groups.etp->getSize());
  const int64_t experts_per_rank = own_experts.length();
  const auto on_host = experts_.cpu();
  const int64_t n = on_host.size(0);
  const int64_t K = on_host.size(1);
  const auto* chosen = on_host.const_data_ptr<int64_t>();

  // The numbers of tokens for each rank of ep, then for each expert.
  std::vector<int64_t> counts(ep + static_cast<size_t>(num_experts), 0);
  std::vector<std::vector<int64_t>> lists(ep);
  for (int64_t token = 0; token < n; ++token) {
    for (int64_t k = 0; k < K; ++k) {
      const int64_t expert = chosen[token * K + k];
      ++counts[ep + static_cast<size_t>(expert)];
      auto& list = lists[static_cast<size_t>(expert / experts_per_rank)];
      if (list.empty() || list.back() != token) list.push_back(token);
    }
  }
  const auto device = experts_.device();
  std::vector<int64_t> numbers;
  for (size_t rank = 0; rank < ep; ++rank) {
    counts[rank] = static_cast<int64_t>(lists[rank].size());
    numbers.insert(numbers.end(), lists[rank].begin(), lists[rank].end());
  }
  sent_tokens_ = internal::index_tensors({numbers}, device)[0];
  send_splits_.assign(counts.begin(), counts.begin() + static_cast<int64_t>(ep));

  // One row for each rank of etp_ep, in which etp varies fastest.
  auto all = at::tensor(at::ArrayRef<int64_t>(counts), at::kLong).unsqueeze(0);
  if (ep * etp > 1) {
    const auto& group = groups.etp_ep ? groups.etp_ep : groups.etp;
    all = parallel::all_gather(all.to(device), group).cpu();
  }
  const auto table = all.accessor<int64_t, 2>();
  const auto own_ep = groups.ep_rank();
  const auto own_etp = groups.etp->getRank();
  for (size_t rank = 0; rank < ep; ++rank) {
    receive_splits_.push_back(table[static_cast<int64_t>(rank * etp) + own_etp][own_ep]);
  }
  for (size_t slice = 0; slice < etp; ++slice) {
    int64_t rows = 0;
    for (size_t rank = 0; rank < ep; ++rank) rows += table[static_cast<int64_t>(rank * etp + slice)][own_ep];
    gathered_rows_.push_back(rows);
  }
  const auto per_expert = all.narrow(1, static_cast<int64_t>(ep), num_experts).sum(0);
  tokens_per_expert_.assign(per_expert.const_data_ptr<int64_t>(), per_expert.const_data_ptr<int64_t>() + num_experts);
}

ExpertTokens TokenDispatcher::dispatch(const at::Tensor& tokens, const at::Tensor& weights) const {
  // The numbers of the experts travel as floating point, exact below 2^24, so that weights and numbers are one message.
  TORCH_INTERNAL_ASSERT(tokens_per_expert_.size() < (size_t{1} << 24));
  auto rows = tokens;
  auto routed = at::cat({weights, experts_.to(weights.scalar_type())}, 1);
  if (groups_.ep_size() > 1) {
    const auto send = [&](const at::Tensor& values) {
      return parallel::differentiable_all_to_all(PermuteFunction::apply(values, sent_tokens_, send_splits_),
                                                 receive_splits_, send_splits_, groups_.ep);
    };
    rows = send(rows);
    routed = send(routed);
  }
  rows = parallel::gather_uneven_from_sequence_parallel_region(rows, gathered_rows_, groups_.etp);
  routed = parallel::gather_uneven_from_sequence_parallel_region(routed, gathered_rows_, groups_.etp);

  const int64_t K = weights.size(1);
  const auto here = routed.detach().narrow(1, K, K).to(at::kLong).sub(own_experts_.begin);
  const auto elsewhere = here.lt(0).logical_or(here.ge(own_experts_.length()));
  const auto keys = here.masked_fill(elsewhere, own_experts_.length()).reshape({-1});
  std::vector<int64_t> counts(tokens_per_expert_.begin() + own_experts_.begin,
                              tokens_per_expert_.begin() + own_experts_.end);
  const auto num_places = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  const auto order = std::get<1>(at::sort(keys, /*stable=*/true, /*dim=*/0, /*descending=*/false));
  return {rows, routed.narrow(1, 0, K), order.narrow(0, 0, num_places), std::move(counts)};
}

at::Tensor TokenDispatcher::combine(const at::Tensor& output) const {
  auto rows = parallel::reduce_scatter_uneven_to_sequence_parallel_region(output, gathered_rows_, groups_.etp);
  if (groups_.ep_size() == 1) return rows;
  const auto returned = parallel::differentiable_all_to_all(rows, send_splits_, receive_splits_, groups_.ep);
  return UnpermuteFunction::apply(returned, sent_tokens_, send_splits_, experts_.size(0));
}

}  // namespace megatron_cpp
