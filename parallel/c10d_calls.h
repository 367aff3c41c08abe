// The collectives of c10d on one input and one output tensor, which LibTorch 2.15 calls by other names than 2.11 does.
//
// Backends (c10d::Backend) override and call the old names, _allgather_base, _reduce_scatter_base and alltoall_base:
// 2.15 hands its new names on to them. A group (c10d::ProcessGroup) is called by the functions here: of its old names
// 2.15 says that they are deprecated.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "parallel/group.h"

namespace megatron_cpp::parallel {

// Templates, so that only the branch that exists is looked at. `Group` is c10d::ProcessGroup.

/// `input` of every rank, one after the other, into `output`. What is returned may be null where asyncOp is false.
template <class Group>
auto all_gather_single(Group& group, at::Tensor& output, at::Tensor& input) {
  if constexpr (requires { group.all_gather_single(output, input); }) {
    return group.all_gather_single(output, input);
  } else {
    return group._allgather_base(output, input);
  }
}

/// This rank's share of the sum of all inputs into `output`.
template <class Group>
auto reduce_scatter_single(Group& group, at::Tensor& output, at::Tensor& input) {
  if constexpr (requires { group.reduce_scatter_single(output, input); }) {
    return group.reduce_scatter_single(output, input);
  } else {
    return group._reduce_scatter_base(output, input);
  }
}

/// Rows of `input` to other ranks, their rows into `output`; empty splits are equal ones.
template <class Group>
auto all_to_all_single(Group& group, at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_splits,
                       std::vector<int64_t>& input_splits, const c10d::AllToAllOptions& options) {
  if constexpr (requires { group.all_to_all_single(output, input, output_splits, input_splits, options); }) {
    return group.all_to_all_single(output, input, output_splits, input_splits, options);
  } else {
    return group.alltoall_base(output, input, output_splits, input_splits, options);
  }
}

}  // namespace megatron_cpp::parallel
