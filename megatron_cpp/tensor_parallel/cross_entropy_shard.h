// Cross entropy on a rank's shard of logits: what vocab_parallel_cross_entropy and linear_cross_entropy share. The
// formulas are those of vocab_parallel_cross_entropy.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "megatron_cpp/tensor_parallel/vocab_parallel_cross_entropy.h"
#include "parallel/group.h"
#include "parallel/shard.h"

namespace megatron_cpp::internal {

/// The classes that lie in this rank's `columns` of the padded vocabulary; empty where all of them are padding.
parallel::Range own_classes(int64_t columns, int64_t vocabulary_size, const parallel::GroupPtr& tp);

/// What losses are computed in for logits of `dtype`: float64 for float64, float32 for all others.
at::ScalarType loss_dtype(at::ScalarType dtype);

/// Losses of some positions, and what their gradient needs besides the exponentials. All are [S, B].
struct ShardLosses {
  at::Tensor losses;       ///< equal on every rank, 0 where ignored
  at::Tensor probability;  ///< of a class over its exponential on this rank
  at::Tensor ignored;      ///< bool
  at::Tensor column;       ///< int64, the target's among this rank's columns; 0 where it isn't here
  at::Tensor here;         ///< bool: the target is among this rank's columns
};

/// @param exponentials  [S, B, own.length()], gets exp(logits - their maximum here) in the loss's dtype; may be
/// `logits` itself.
/// @param logits        [S, B, own.length()], without padding.
/// @param target        [S, B] int64 on the logits' device.
/// Comm: 2 all-reduces: the maxima, S·B elements, and 2·S·B sums (3·S·B with label smoothing). Collective over tp.
ShardLosses shard_losses(const at::Tensor& exponentials, const at::Tensor& logits, const at::Tensor& target,
                         const CrossEntropyOptions& options, parallel::Range own, const parallel::GroupPtr& tp);

/// Writes g · (p - (1 - s) at the target - s/V). No communication.
/// @param gradient       [S, B, own.length()], of the logits, in any dtype; may be `exponentials` itself.
/// @param exponentials   from shard_losses.
/// @param loss_gradient  g, [S, B], equal on every rank.
void shard_gradient(const at::Tensor& gradient, const at::Tensor& exponentials, const ShardLosses& forward,
                    const at::Tensor& loss_gradient, const CrossEntropyOptions& options);

/// Throws c10::ValueError if V or s of the options are wrong, `columns` on each of t ranks are fewer than V, or
/// `target` isn't int64 [S, B] with ids that vocab_parallel_cross_entropy takes (on a GPU: trips an asynchronous
/// assertion).
void check_cross_entropy(const at::Tensor& target, int64_t S, int64_t B, int64_t columns,
                         const CrossEntropyOptions& options, const parallel::GroupPtr& tp);

}  // namespace megatron_cpp::internal
