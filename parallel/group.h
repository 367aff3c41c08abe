// The type of a group of ranks; layers take it as an argument.
#pragma once

#include <c10/util/intrusive_ptr.h>

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

/// Ranks, groups of them and collectives between them: MPI or Gloo on CPUs, NCCL on GPUs. Knows nothing of models.
namespace megatron_cpp::parallel {

/// A group of ranks. Never null, never defaulted; groups of one rank are legal everywhere and send nothing.
using GroupPtr = c10::intrusive_ptr<c10d::ProcessGroup>;

}  // namespace megatron_cpp::parallel
