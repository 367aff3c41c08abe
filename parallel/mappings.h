// Collectives as differentiable functions, with Megatron-Core's names
// (megatron/core/tensor_parallel/mappings.py).
//
// All are collective over `tp`, forward and backward: every rank calls them equally often and in the same order, and
// lets the gradient flow back through them on every rank or on none. A group of one rank sends and copies nothing.
// Double backward throws c10::NotImplementedError. t = group size, r = this rank's number in it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "parallel/group.h"

namespace megatron_cpp::parallel {

/// Identity; the gradient is summed over the ranks (all-reduce). For a replicated input that each rank uses in its own
/// way. The result is a view of the input.
at::Tensor copy_to_tensor_model_parallel_region(const at::Tensor& input, const GroupPtr& tp);

/// Sum over the ranks (all-reduce); the gradient, which is the same on every rank, passes unchanged. For a result that
/// every rank uses in the same way.
at::Tensor reduce_from_tensor_model_parallel_region(const at::Tensor& input, const GroupPtr& tp);

/// Sum over the ranks (all-reduce); the gradients are summed too (all-reduce). For a result that each rank uses in its
/// own way, so that each has only a part of the gradient.
at::Tensor reduce_from_tensor_model_parallel_region_to_partial_use(const at::Tensor& input, const GroupPtr& tp);

/// [..., C] -> [..., C/t], this rank's columns [r*C/t, (r+1)*C/t); gradient all-gathered.
/// @throws c10::ValueError if C % t != 0.
at::Tensor scatter_to_tensor_model_parallel_region(const at::Tensor& input, const GroupPtr& tp);

/// [..., C/t] -> [..., C] (all-gather); backward takes this rank's columns of the gradient, which is the same on every
/// rank.
at::Tensor gather_from_tensor_model_parallel_region(const at::Tensor& input, const GroupPtr& tp);

/// [..., C/t] -> [..., C] (all-gather); the gradients are reduce-scattered. For a result that each rank uses in its own
/// way, so that each has only a part of the gradient.
at::Tensor all_gather_last_dim_from_tensor_parallel_region(const at::Tensor& input, const GroupPtr& tp);

/// [..., C] -> this rank's C/t columns of the sum (reduce-scatter); gradient all-gathered.
/// @throws c10::ValueError if C % t != 0.
at::Tensor reduce_scatter_last_dim_to_tensor_parallel_region(const at::Tensor& input, const GroupPtr& tp);

/// [S, ...] -> [S/t, ...], this rank's rows [r*S/t, (r+1)*S/t); gradient all-gathered.
/// @throws c10::ValueError if S % t != 0.
at::Tensor scatter_to_sequence_parallel_region(const at::Tensor& input, const GroupPtr& tp);

/// [S/t, ...] -> [S, ...] (all-gather); the gradients are reduce-scattered. For the input of a tensor-parallel layer,
/// where each rank has only a part of the gradient.
at::Tensor gather_from_sequence_parallel_region(const at::Tensor& input, const GroupPtr& tp);

/// [S/t, ...] -> [S, ...] (all-gather); backward takes this rank's rows of the gradient, which is the same on every
/// rank. For a result that every rank uses in the same way.
at::Tensor gather_from_sequence_parallel_region_to_replicated_use(const at::Tensor& input, const GroupPtr& tp);

/// [S, ...] -> this rank's S/t rows of the sum (reduce-scatter); gradient all-gathered.
/// @throws c10::ValueError if S % t != 0.
at::Tensor reduce_scatter_to_sequence_parallel_region(const at::Tensor& input, const GroupPtr& tp);

/// gather_from_sequence_parallel_region where rank r has rows[r] rows; the list is the same on every rank.
at::Tensor gather_uneven_from_sequence_parallel_region(const at::Tensor& input, const std::vector<int64_t>& rows,
                                                       const GroupPtr& group);

/// reduce_scatter_to_sequence_parallel_region where rank r gets rows[r] rows; the list is the same on every rank.
at::Tensor reduce_scatter_uneven_to_sequence_parallel_region(const at::Tensor& input, const std::vector<int64_t>& rows,
                                                             const GroupPtr& group);

/// Sends input_splits[q] rows (dimension 0) to rank q and receives output_splits[q] from it; empty splits mean equal
/// splits. Backward sends the gradient's rows back.
at::Tensor differentiable_all_to_all(const at::Tensor& input, const std::vector<int64_t>& output_splits,
                                     const std::vector<int64_t>& input_splits, const GroupPtr& tp);

/// [S_r, ...] -> [S_r, ...]: the rows of the sequence that follow this rank's, by one: row i of the result is row i + 1
/// of the sequence, and row 0 comes last (at::roll by -1 of all ranks' rows). Backward rolls the gradient back. Each
/// sends one row (all-to-all), also where ranks have different numbers of rows; either every rank has at least one, or
/// none has any. A group of one rank sends nothing, but copies.
at::Tensor roll_sequence_parallel_region(const at::Tensor& input, const GroupPtr& tp);

/// [S/t, ..., H] -> [S, ..., H/t] by one all-to-all; gradient by the inverse. H % t == 0.
at::Tensor all_to_all_sequence_to_hidden_parallel(const at::Tensor& input, const GroupPtr& tp);

/// [S, ..., H/t] -> [S/t, ..., H] by one all-to-all; gradient by the inverse. S % t == 0.
at::Tensor all_to_all_hidden_to_sequence_parallel(const at::Tensor& input, const GroupPtr& tp);

}  // namespace megatron_cpp::parallel
