// The loss of a language model whose logits are split over the vocabulary.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "parallel/group.h"

namespace megatron_cpp {

/// Vocabulary, smoothing and ignored targets.
struct CrossEntropyOptions {
  /// V: over all ranks, without padding.
  int64_t vocabulary_size;
  /// s: this share of the target's probability is spread evenly over the V classes.
  double label_smoothing = 0.0;
  /// Tokens with this target have loss 0 and no gradient; may lie inside [0, V).
  int64_t ignore_index = -100;
};

/// Cross entropy per token, as at::cross_entropy_loss with reduction none defines it: with log p = logits - log sum exp
/// over the V classes,
///   loss = -(1 - s)·log p[target] - s/V · Σ_v log p[v],
/// from each rank's shard of the logits, which are never gathered (after megatron/core/tensor_parallel/
/// cross_entropy.py). Columns of the padding, [V, V'), take no part, whatever they hold: not in the maximum, not in the
/// sums; their gradient is 0. A shard may be all padding.
/// @param logits  [S, B, V'/t], columns [r·V'/t, (r+1)·V'/t) of the padded vocabulary. Half types are computed in
///                float32.
/// @param target  [S, B] int64, equal on every rank. On the CPU it is checked; on a GPU a target outside [0, V) that
///                isn't ignore_index trips an asynchronous device assertion.
/// @return        [S, B] float32 (float64 for such logits), equal on every rank; its gradient must be equal, too.
/// Gradient in logits' dtype, without communication, rounded once. Saves S·B·V/t exponentials in the loss's dtype; the
/// backward pass makes the gradient and no other tensor of that size.
/// Comm: forward 2 all-reduces: the maxima, S·B elements, and 2·S·B sums (3·S·B with label smoothing); backward none.
/// Collective over tp. Throws c10::ValueError, before anything is sent, on every rank alike, if logits are not floating
/// point [S, B, V'/t] with V' >= V, target is not [S, B] int64 or holds an id outside the vocabulary (naming it and its
/// place), or s is not in [0, 1]. Double backward throws c10::NotImplementedError.
at::Tensor vocab_parallel_cross_entropy(const at::Tensor& logits, const at::Tensor& target,
                                        const CrossEntropyOptions& options, const parallel::GroupPtr& tp);

}  // namespace megatron_cpp
