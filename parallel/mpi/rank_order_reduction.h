// Reduces the values of several ranks in the order of the ranks: the same bits on every rank.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <torch/csrc/distributed/c10d/Types.hpp>

namespace megatron_cpp::parallel {

/// @throws c10::ValueError if `reduction` is not SUM, AVG, PRODUCT, MIN or MAX, or is AVG of a dtype that isn't
///         floating-point.
/// @param operation, where  for messages: "all_reduce", "group tp, rank 0 of 2".
void check_reduction(const c10d::ReduceOp& reduction, at::ScalarType dtype, const char* operation,
                     const std::string& where);

/// parts[0] ∘ parts[1] ∘ ... ∘ parts[t-1], from left to right; bfloat16 and float16 accumulated in float32 and rounded
/// once; the sum of bools is their "or". Not collective.
/// @param output  [n], contiguous; may be parts[0] or parts[1] itself where t = 2, else shares no memory with them.
/// @param parts   t >= 1 tensors [n], contiguous, of output's dtype: what rank 0, 1, ... holds.
void reduce_in_rank_order(const at::Tensor& output, at::ArrayRef<at::Tensor> parts,
                          c10d::ReduceOp::RedOpType reduction);

}  // namespace megatron_cpp::parallel
