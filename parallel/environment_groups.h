// Groups of ranks that torchrun, srun or another launcher has started: from environment variables, without MPI.
//
// The variables are torchrun's. Where one of the first three is missing, Slurm's stands in for it.
//   RANK         SLURM_PROCID   this process among all of them, from 0
//   WORLD_SIZE   SLURM_NTASKS   how many they are
//   LOCAL_RANK   SLURM_LOCALID  this process among those of its host; read where it chooses a GPU
//   MASTER_ADDR  MASTER_PORT    where rank 0 is found: an address of its host that all others reach, and a port there
#pragma once

#include <c10/core/Device.h>

#include "parallel/process_groups.h"

namespace megatron_cpp::parallel {

/// Whether RANK and WORLD_SIZE are set, or SLURM_PROCID, SLURM_NTASKS and MASTER_ADDR. Slurm sets the first two for
/// every job step, under mpirun too: MASTER_ADDR says that the program's groups are to come from here. Not collective.
bool ranks_in_environment();

/// WORLD_SIZE, for a grid that depends on it. Not collective.
/// @throws c10::ValueError naming the variable if it is missing or is no whole number above 0.
int world_size_in_environment();

/// Makes the groups of this rank: as make_process_groups does, but with Gloo for tensors on the CPU, and without MPI.
/// Rank 0 serves a c10d::TCPStore at MASTER_ADDR and MASTER_PORT as long as its groups live, unless torchrun serves it
/// already (TORCHELASTIC_USE_AGENT_STORE); groups find each other through it. They need no shutting down. May be called
/// several times. Collective over all ranks.
///
/// Gloo takes the network interface that GLOO_SOCKET_IFNAME names, or the address that the host's name resolves to.
/// @param options  `timeout` is that of a collective, and how long ranks wait for each other here; `master_address` is
///                 not read.
/// @param device   where it is a CUDA device, the groups get NCCL for tensors on it, and it becomes the current device
///                 of this thread; without an index it is number LOCAL_RANK. No two ranks may share one. For products
///                 as Runtime::choose_device makes them call multiply_exactly_on_gpus().
/// @throws c10::ValueError naming the variable that is missing, is no whole number, or is out of range;
///         c10::DistBackendError naming the address where rank 0 can't be reached or can't serve, or if ranks don't
///         come in time; AgreedError and c10::ValueError as make_process_groups, and AgreedError for a GPU that isn't
///         there.
ProcessGroups process_groups_from_environment(const RankGrid& grid, const ProcessGroupsOptions& options = {},
                                              c10::Device device = c10::Device(c10::kCPU));

}  // namespace megatron_cpp::parallel
