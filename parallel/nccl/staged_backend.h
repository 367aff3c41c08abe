// Collectives on GPU tensors through host memory, where NCCL can't be used.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>

namespace megatron_cpp::parallel {

/// A backend of the same ranks for tensors of any device: each call copies its tensors to the host (pinned memory, if
/// they lie on a GPU), hands the copies to `host_backend`, and copies the results back. It waits for the current stream
/// and for the collective; work queued on the current stream after it returns sees the results.
///
/// For ranks that share a GPU, which NCCL refuses before 2.30. Tensors may have any strides; outputs may share
/// memory with inputs as NCCL allows it. Collective, and throws, as `host_backend`.
/// @param host_backend  takes tensors on the CPU; may serve a group's CPU tensors as well. One call at a time.
c10::intrusive_ptr<c10d::Backend> make_staged_backend(c10::intrusive_ptr<c10d::Backend> host_backend);

}  // namespace megatron_cpp::parallel
