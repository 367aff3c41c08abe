// NCCL behind the same process groups, for ranks that have a GPU.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>

namespace parallel {

class Runtime;
struct ProcessGroups;
struct ProcessGroupsOptions;

/// Whether this build has NCCL (MCPP_WITH_NCCL).
bool has_nccl();

/// A number, never 0, that no other GPU of the job has, made of its UUID. Not collective.
/// @throws c10::ValueError if the build has no NCCL.
uint64_t gpu_identity(c10::DeviceIndex device);

/// Makes the runtime's device the current one of this thread, and gives each group of more than one rank a backend for
/// tensors on it: a c10d::ProcessGroupNCCL, or, for ranks that share GPUs where NCCL refuses that, one that goes
/// through the host's memory and the group's MPI (staged_backend.h), which rank 0 warns of. NCCL's store is a TCPStore
/// on world rank 0 whose address goes out over MPI; communicators are connected here, and the groups' are split from
/// the world's. Collective over all ranks.
/// @throws c10::ValueError if the build has no NCCL.
void add_gpu_backends(Runtime& runtime, ProcessGroups& groups, const ProcessGroupsOptions& options);

}  // namespace parallel
