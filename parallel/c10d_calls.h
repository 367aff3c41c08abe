// c10d's collectives on one input and one output tensor, which have other names in LibTorch 2.15 than in 2.11.
//
// Backends (c10d::Backend) override and call the old names, _allgather_base, _reduce_scatter_base and alltoall_base:
// the new names of 2.15 call these. Call a group (c10d::ProcessGroup) through the functions here: 2.15 deprecates its
// old names.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "parallel/group.h"

namespace megatron_cpp::parallel {

// Templates, so that only the branch that this LibTorch has is compiled. `Group` is c10d::ProcessGroup.

/// Gathers `input` of every rank into `output`, in the order of the ranks.
template <class Group>
auto all_gather_single(Group& group, at::Tensor& output, at::Tensor& input) {
  if constexpr (requires { group.all_gather_single(output, input); }) {
    return group.all_gather_single(output, input);
  } else {
    return group._allgather_base(output, input);
  }
}

/// Sums `input` over the ranks and writes this rank's share to `output`.
template <class Group>
auto reduce_scatter_single(Group& group, at::Tensor& output, at::Tensor& input) {
  if constexpr (requires { group.reduce_scatter_single(output, input); }) {
    return group.reduce_scatter_single(output, input);
  } else {
    return group._reduce_scatter_base(output, input);
  }
}

/// Sends rows of `input` to each rank and receives rows of each into `output`; empty splits mean equal splits. The Work
/// may be null if options.asyncOp is false.
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
