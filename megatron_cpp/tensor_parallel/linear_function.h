// The matrix product that column- and row-parallel linear layers share.
#pragma once

#include <ATen/core/Tensor.h>

#include "parallel/group.h"

namespace megatron_cpp::internal {

/// What the ranks of the group hold of a linear layer's input.
enum class LinearInput {
  kOwn,               ///< each rank its own: nothing is communicated
  kReplicated,        ///< all the same: the gradient is all-reduced
  kSequenceParallel,  ///< [S/t, ...] each: gathered forward (and again backward), the gradient reduce-scattered
};

/// input [.., C] times weightᵀ [F, C] plus bias [F] (may be undefined) -> [.., F].
///
/// Saves the input as given (the shard under sequence parallelism) and gathers it again in the backward pass, where the
/// collective of the input's gradient is issued before the weight-gradient product that can hide it on NCCL.
/// A parameter that needs no gradient costs neither product nor gather. With `accumulate_into_grad` the products add
/// into the gradients that weight and bias already have, and autograd gets undefined ones.
/// Collective over `group`, forward and backward, as LinearInput says.
at::Tensor linear_with_communication(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                                     LinearInput input_kind, bool accumulate_into_grad,
                                     const parallel::GroupPtr& group);

}  // namespace megatron_cpp::internal
