// Collectives as differentiable functions, with Megatron-Core's names
// (megatron/core/tensor_parallel/mappings.py): each names what happens forward and backward.
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

/// Identity; the gradient is summed over the ranks (all-reduce). For an input that every rank has, and uses for
/// something else. The result is a view of the input.
at::Tensor copy_to_tensor_model_parallel_region(const at::Tensor& input, const GroupPtr& tp);

/// Sum over the ranks (all-reduce); the gradient passes as it is, being the same on every rank. For a result that
/// every rank uses alike.
at::Tensor reduce_from_tensor_model_parallel_region(const at::Tensor& input, const GroupPtr& tp);

/// Sum over the ranks (all-reduce); the gradients are summed too (all-reduce). For a result of which every rank uses
/// another part, so that each has only its part of the gradient.
at::Tensor reduce_from_tensor_model_parallel_region_to_partial_use(const at::Tensor& input, const GroupPtr& tp);

/// [..., C] -> [..., C/t], this rank's columns [r*C/t, (r+1)*C/t); gradient all-gathered.
/// @throws c10::ValueError if C % t != 0.
at::Tensor scatter_to_tensor_model_parallel_region(const at::Tensor& input, const GroupPtr& tp);

/// [..., C/t] -> [..., C] (all-gather); the gradient is this rank's columns of it, being the same on every rank.
at::Tensor gather_from_tensor_model_parallel_region(const at::Tensor& input, const GroupPtr& tp);

/// [..., C/t] -> [..., C] (all-gather); the gradients are reduce-scattered: every rank uses the result for something
/// else, so that each has only its part of the gradient.
at::Tensor all_gather_last_dim_from_tensor_parallel_region(const at::Tensor& input, const GroupPtr& tp);

/// [..., C] -> this rank's C/t columns of the sum (reduce-scatter); gradient all-gathered.
/// @throws c10::ValueError if C % t != 0.
at::Tensor reduce_scatter_last_dim_to_tensor_parallel_region(const at::Tensor& input, const GroupPtr& tp);

/// [S, ...] -> [S/t, ...], this rank's rows [r*S/t, (r+1)*S/t); gradient all-gathered.
/// @throws c10::ValueError if S % t != 0.
at::Tensor scatter_to_sequence_parallel_region(const at::Tensor& input, const GroupPtr& tp);

/// [S/t, ...] -> [S, ...] (all-gather); the gradients are reduce-scattered. For a tensor-parallel layer behind it,
/// where every rank's gradient is its part of the whole.
at::Tensor gather_from_sequence_parallel_region(const at::Tensor& input, const GroupPtr& tp);

/// [S/t, ...] -> [S, ...] (all-gather); the gradient is this rank's rows of it, being the same on every rank. For a
/// result that every rank uses alike.
at::Tensor gather_from_sequence_parallel_region_to_replicated_use(const at::Tensor& input, const GroupPtr& tp);

/// [S, ...] -> this rank's S/t rows of the sum (reduce-scatter); gradient all-gathered.
/// @throws c10::ValueError if S % t != 0.
at::Tensor reduce_scatter_to_sequence_parallel_region(const at::Tensor& input, const GroupPtr& tp);

/// Rows of dimension 0 change rank: input_splits[q] rows go to rank q, output_splits[q] come from it; empty: equal
/// splits. The gradient goes the way back.
at::Tensor differentiable_all_to_all(const at::Tensor& input, const std::vector<int64_t>& output_splits,
                                     const std::vector<int64_t>& input_splits, const GroupPtr& tp);

/// [S/t, ..., H] -> [S, ..., H/t] by one all-to-all; gradient by the inverse. H % t == 0.
at::Tensor all_to_all_sequence_to_hidden_parallel(const at::Tensor& input, const GroupPtr& tp);

/// [S, ..., H/t] -> [S/t, ..., H] by one all-to-all; gradient by the inverse. S % t == 0.
at::Tensor all_to_all_hidden_to_sequence_parallel(const at::Tensor& input, const GroupPtr& tp);

}  // namespace megatron_cpp::parallel
