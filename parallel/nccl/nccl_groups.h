// Adds backends for tensors on GPUs to the groups of process_groups.h.
#pragma once

#include <c10/core/Device.h>

#include <chrono>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "parallel/process_groups.h"

namespace megatron_cpp::parallel {

/// Devices and timeout of the backends.
struct GpuGroupsOptions {
  c10::Device device;                                            ///< this rank's GPU
  bool shares_gpus = false;                                      ///< whether ranks of the job compute on the same GPU
  std::chrono::milliseconds timeout = std::chrono::minutes(10);  ///< of a collective
};

/// Makes `options.device` the current device of this thread, and gives each group of more than one rank a backend for
/// tensors on it: a c10d::ProcessGroupNCCL; or, if ranks share GPUs and NCCL refuses that, a staged backend over the
/// group's CPU backend (staged_backend.h), and rank 0 warns. Communicators are connected here, and the groups' are
/// split from the world's. Collective over all ranks.
/// @param groups  of all kinds of kGroupKinds, each with a backend for the CPU and a name.
/// @param store   NCCL's rendezvous: one that all ranks reach, and that lives as long as the groups.
/// @throws c10::ValueError if the build has no NCCL.
void add_gpu_backends(const ProcessGroups& groups, const c10::intrusive_ptr<c10d::Store>& store,
                      const GpuGroupsOptions& options);

}  // namespace megatron_cpp::parallel
