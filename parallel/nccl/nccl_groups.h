// Backends for tensors on GPUs, under the groups of process_groups.h.
#pragma once

#include <c10/core/Device.h>

#include <chrono>
#include <string>
#include <vector>

#include "parallel/group.h"
#include "parallel/mpi/mpi_communicator.h"

namespace parallel {

/// A group that is to carry tensors on GPUs, and where it stands among those of its kind.
struct GpuGroup {
  GroupPtr group;                ///< may be shared with other holders
  std::string kind;              ///< the same on every rank
  int index = 0;                 ///< among the groups of this kind, which share no rank
  std::vector<int> world_ranks;  ///< its ranks, by their rank in the world
};

/// What the ranks' GPUs are and how they find each other.
struct GpuGroupsOptions {
  c10::Device device;          ///< this rank's
  bool shares_gpus = false;    ///< whether ranks of the job compute on the same GPU
  bool is_one_host = false;    ///< whether all ranks of the world run on one host
  std::string master_address;  ///< of world rank 0; empty: 127.0.0.1 on one host, otherwise rank 0's own host name
  std::chrono::milliseconds timeout = std::chrono::minutes(10);  ///< of a collective
};

/// Makes `options.device` the current one of this thread, and gives each group of more than one rank a backend for
/// tensors on it: a c10d::ProcessGroupNCCL, or, for ranks that share GPUs where NCCL refuses that, one that goes
/// through the host's memory and the group's MPI (staged_backend.h), which rank 0 warns of. NCCL's store is a TCPStore
/// on world rank 0 whose address goes out over MPI; communicators are connected here, and the groups' are split from
/// the world's. Collective over all ranks.
/// @param groups  the first has all ranks of the world. All ranks pass the same kinds in the same order, and groups of
///                one kind have the same size.
/// @throws c10::ValueError if the build has no NCCL.
void add_gpu_backends(const MpiCommunicator& world, const std::vector<GpuGroup>& groups,
                      const GpuGroupsOptions& options);

}  // namespace parallel
