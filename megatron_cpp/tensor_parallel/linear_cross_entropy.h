// The loss of a language model from the output layer's input, without all of its logits.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>

#include <cstdint>

#include "megatron_cpp/tensor_parallel/vocab_parallel_cross_entropy.h"
#include "parallel/group.h"

namespace megatron_cpp {

/// How the output layer is applied, and how many of its logits exist at a time. See linear_cross_entropy.
struct LinearCrossEntropyOptions {
  /// Of the loss itself.
  LinearCrossEntropyOptions(const CrossEntropyOptions& loss) : loss_(loss) {}  // NOLINT(google-explicit-constructor)

  TORCH_ARG(CrossEntropyOptions, loss);        ///< vocabulary, smoothing and ignored targets
  TORCH_ARG(int64_t, chunk) = 0;               ///< positions whose logits exist at a time; 0: all
  TORCH_ARG(bool, sequence_parallel) = false;  ///< the input is this rank's rows of the sequence
  /// The weight's gradient is added to the one that the weight has, and autograd gets none, as
  /// ColumnParallelLinearOptions say.
  TORCH_ARG(bool, accumulate_into_grad) = false;
};

/// The sum over all tokens of vocab_parallel_cross_entropy(X Wᵀ, target): a scalar in float32 (float64 for such
/// weights), equal on every rank. To rounding the same for every `chunk`.
///
/// With chunk 0 logits, their exponentials and their gradient exist whole, [S, B, V'/t] each. With a chunk of C
/// positions they are made for C positions at a time, in one buffer [C, B, V/t] that holds one after the other (in
/// float32 and, for lower precisions, once more in the weight's dtype), and no rank keeps any for the backward pass.
/// The gradients are computed in the forward pass then, while gradients are on, since logits that are gone would cost
/// a third more products to make again; Liger-Kernel's fused linear cross entropy does the same. It keeps the gradient
/// of the input, [S, B, H] (with sequence_parallel [S/t, B, H]), and, unless it was added to the weight's gradient,
/// that of the weight, which is added up over the chunks in float32 (float64). So with a chunk
///  - the gradient that the result will get must be known beforehand, `loss_gradient`;
///  - with accumulate_into_grad a forward pass without a backward pass changes the weight's gradient;
///  - there is one backward pass.
///
/// @param input          X: [S, B, H], equal on every rank; with sequence_parallel [S/t, B, H], this rank's rows of S.
/// @param weight         W: [V'/t, H], rows [r·V'/t, (r+1)·V'/t) of the padded vocabulary, as a ColumnParallelLinear
///                       has it. Rows of the padding, [V, V'), take no part and get the gradient 0.
/// @param target         [S, B] int64, equal on every rank.
/// @param loss_gradient  d(what backward() is called on) / d(result), the same on every rank; read with a chunk and
///                       while gradients are on. A mean over n tokens has 1/n.
/// A weight or an input that needs no gradient costs no product for it.
/// Comm: with sequence_parallel 1 all-gather of X; for each chunk 2 all-reduces, as vocab_parallel_cross_entropy says
/// (the same bytes in all); if X needs a gradient, 1 all-reduce of it, or with sequence_parallel 1 reduce-scatter: with
/// a chunk all in the forward pass. With chunk 0 the backward pass reduces, and with sequence_parallel gathers X once
/// more if the weight needs a gradient.
/// Collective over tp. Throws c10::ValueError, before anything is sent, on every rank alike, if chunk is negative, the
/// shapes don't fit, or as vocab_parallel_cross_entropy does; and in the backward pass, on the CPU, if the result's
/// gradient isn't loss_gradient to rounding (on a GPU an asynchronous device assertion trips). Double backward throws
/// c10::NotImplementedError, a second backward pass c10::Error.
at::Tensor linear_cross_entropy(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target,
                                const LinearCrossEntropyOptions& options, const parallel::GroupPtr& tp,
                                double loss_gradient = 1.0);

/// A chunk that takes no more time than whole logits, for S `positions` with B·V/t `columns` each: as many as fit into
/// 128 MiB in float32, in steps of 64; 0 where all fit. Pure.
int64_t default_loss_chunk(int64_t positions, int64_t columns);

}  // namespace megatron_cpp
