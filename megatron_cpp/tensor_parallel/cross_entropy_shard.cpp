#include "megatron_cpp/tensor_parallel/cross_entropy_shard.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>

#include "parallel/collectives.h"

namespace megatron_cpp::internal {
namespace {

/// logits [S, B, columns] at the targets' columns, [S, B], in `dtype`; anything where no target is here.
at::Tensor at_targets(const at::Tensor& logits, const at::Tensor& column, at::ScalarType dtype) {
  if (logits.size(-1) == 0) return at::zeros(column.sizes(), logits.options().dtype(dtype));
  return logits.gather(-1, column.unsqueeze(-1)).squeeze(-1).to(dtype);
}

/// Calls body(first, length) for blocks of positions of `values`, [S, B, columns]: on the CPU as many as fit into the
/// cores' caches, so that an operator finds the previous one's result in cache; elsewhere one call for all.
template <class Body>
void for_blocks_of_positions(const at::Tensor& values, const Body& body) {
  constexpr int64_t kCacheBytes = int64_t{256} * 1024;
  const int64_t S = values.size(0);
  int64_t length = S;
  if (values.numel() == 0) return;
  if (values.is_cpu()) {
    const auto position_bytes = static_cast<int64_t>(values.nbytes()) / S;
    length = std::max<int64_t>(1, kCacheBytes * at::get_num_threads() / position_bytes);
  }
  for (int64_t first = 0; first < S; first += length) body(first, std::min(length, S - first));
}

void check_target_on_host(const at::Tensor& target, const CrossEntropyOptions& options) {
  const auto contiguous = target.contiguous();
  const auto* ids = contiguous.const_data_ptr<int64_t>();
  const int64_t B = target.size(1);
  for (int64_t i = 0; i < target.numel(); ++i) {
    TORCH_CHECK_VALUE(ids[i] == options.ignore_index || (ids[i] >= 0 && ids[i] < options.vocabulary_size), "target ",
                      ids[i], " at position ", i / B, ", batch row ", i % B, " is outside the vocabulary [0, ",
                      options.vocabulary_size, ") and not the ignored ", options.ignore_index);
  }
}

void check_target_on_device(const at::Tensor& target, const CrossEntropyOptions& options) {
  const auto inside = target.ge(0).logical_and(target.lt(options.vocabulary_size));
  at::_assert_async(inside.logical_or(target.eq(options.ignore_index)).all());
}

}  // namespace

parallel::Range own_classes(int64_t columns, int64_t vocabulary_size, const parallel::GroupPtr& tp) {
  const int64_t begin = std::min(columns * tp->getRank(), vocabulary_size);
  return {begin, std::min(begin + columns, vocabulary_size)};
}

at::ScalarType loss_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

ShardLosses shard_losses(const at::Tensor& exponentials, const at::Tensor& logits, const at::Tensor& target,
                         const CrossEntropyOptions& options, parallel::Range own, const parallel::GroupPtr& tp) {
  const double smoothing = options.label_smoothing;
  const auto ignored = target.eq(options.ignore_index);
  const auto here = target.ge(own.begin).logical_and(target.lt(own.end)).logical_and(ignored.logical_not());
  const auto column = (target - own.begin).masked_fill(here.logical_not(), 0);

  const auto own_targets = at_targets(logits, column, exponentials.scalar_type());
  // Of this rank's classes: a block is read once while it is in cache. Finite, so that an empty shard adds 0.
  const double lowest = std::numeric_limits<float>::lowest();
  const auto own_maxima = at::full(target.sizes(), lowest, exponentials.options());
  const auto own_sums = at::zeros({smoothing > 0 ? 3 : 2, target.size(0), target.size(1)}, exponentials.options());
  for_blocks_of_positions(exponentials, [&](int64_t first, int64_t length) {
    auto block = exponentials.narrow(0, first, length);
    const auto own_logits = logits.narrow(0, first, length);
    const auto maxima = own_maxima.narrow(0, first, length);
    const auto sums = own_sums.narrow(1, first, length);
    maxima.copy_(own_logits.amax(-1)).clamp_min_(lowest);
    at::sub_out(block, own_logits, maxima.unsqueeze(-1));  // half types become float32 here
    if (smoothing > 0) sums[2].copy_(block.sum(-1));
    sums[0].copy_(block.exp_().sum(-1));
  });

  const auto maxima = parallel::all_reduce(own_maxima, tp, parallel::Reduction::kMax);
  const auto below = own_maxima - maxima;
  const auto scale = below.exp();
  own_sums[0].mul_(scale);
  own_sums[1].copy_((own_targets - maxima).masked_fill_(here.logical_not(), 0));
  if (smoothing > 0) own_sums[2].add_(below, static_cast<double>(own.length()));
  const auto sums = parallel::all_reduce(own_sums, tp);

  auto losses = sums[0].log() - (1 - smoothing) * sums[1];
  if (smoothing > 0) losses -= smoothing / static_cast<double>(options.vocabulary_size) * sums[2];
  return {losses.masked_fill_(ignored, 0), scale / sums[0], ignored, column, here};
}

void shard_gradient(const at::Tensor& gradient, const at::Tensor& exponentials, const ShardLosses& forward,
                    const at::Tensor& loss_gradient, const CrossEntropyOptions& options) {
  if (exponentials.numel() == 0) return;
  const double smoothing = options.label_smoothing;
  const auto own_gradient = loss_gradient.masked_fill(forward.ignored, 0);
  const auto per_exponential = own_gradient * forward.probability.masked_fill(forward.ignored, 0);
  const auto per_class = own_gradient * (-smoothing / static_cast<double>(options.vocabulary_size));
  // The target's column, in the loss's dtype until it is rounded once; where the target isn't on this rank, column 0
  // gets the value that it has anyway.
  const auto column = forward.column.unsqueeze(-1);
  const auto at_target =
      at::addcmul(per_class.unsqueeze(-1), exponentials.gather(-1, column), per_exponential.unsqueeze(-1)) -
      (own_gradient * (1 - smoothing) * forward.here).unsqueeze(-1);
  for_blocks_of_positions(exponentials, [&](int64_t first, int64_t length) {
    auto block = gradient.narrow(0, first, length);
    const auto own = exponentials.narrow(0, first, length);
    const auto factor = per_exponential.narrow(0, first, length).unsqueeze(-1);
    if (smoothing > 0) {
      at::addcmul_out(block, per_class.narrow(0, first, length).unsqueeze(-1), own, factor);
    } else {
      at::mul_out(block, own, factor);
    }
  });
  gradient.scatter_(-1, column, at_target.to(gradient.scalar_type()));
}

void check_cross_entropy(const at::Tensor& target, int64_t S, int64_t B, int64_t columns,
                         const CrossEntropyOptions& options, const parallel::GroupPtr& tp) {
  const int t = tp->getSize();
  TORCH_CHECK_VALUE(
      target.dim() == 2 && target.scalar_type() == at::kLong && target.size(0) == S && target.size(1) == B,
      "target must be int64 [", S, ", ", B, "] as the logits are, got ", target.sizes(), " ", target.scalar_type());
  TORCH_CHECK_VALUE(options.vocabulary_size > 0 && columns * t >= options.vocabulary_size, t, " ranks with ", columns,
                    " columns of logits each do not hold a vocabulary of ", options.vocabulary_size);
  TORCH_CHECK_VALUE(options.label_smoothing >= 0 && options.label_smoothing <= 1, "label_smoothing ",
                    options.label_smoothing, " is not in [0, 1]");
  if (target.is_cpu()) {
    check_target_on_host(target, options);
  } else {
    check_target_on_device(target, options);
  }
}

}  // namespace megatron_cpp::internal
