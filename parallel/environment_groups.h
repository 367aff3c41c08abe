// Makes groups from the environment variables of torchrun, srun or another launcher, without MPI.
//
// If one of the first three of torchrun's variables is missing, Slurm's variable beside it is read:
//   RANK         SLURM_PROCID   rank of this process, from 0
//   WORLD_SIZE   SLURM_NTASKS   number of processes
//   LOCAL_RANK   SLURM_LOCALID  number of this process on its host; read only to choose a GPU
//   MASTER_ADDR  MASTER_PORT    address of rank 0's host, which all ranks must reach, and a port there
#pragma once

#include <c10/core/Device.h>

#include "parallel/process_groups.h"

namespace megatron_cpp::parallel {

/// Whether RANK and WORLD_SIZE are set, or SLURM_PROCID, SLURM_NTASKS and MASTER_ADDR. Slurm sets its two variables for
/// every job step, also under mpirun, so a job asks for groups from here by MASTER_ADDR. Not collective.
bool ranks_in_environment();

/// WORLD_SIZE, for a grid that depends on it. Not collective.
/// @throws c10::ValueError naming the variable if it is missing or is no whole number above 0.
int world_size_in_environment();

/// Makes the groups of this rank: as make_process_groups does, but with Gloo for tensors on the CPU, and without MPI.
/// Rank 0 serves a c10d::TCPStore at MASTER_ADDR and MASTER_PORT as long as its groups live, unless torchrun serves it
/// already (TORCHELASTIC_USE_AGENT_STORE); the ranks of a group find each other through it. The groups need no explicit
/// shutdown. May be called several times. Collective over all ranks.
///
/// Gloo uses the network interface that GLOO_SOCKET_IFNAME names, or the address that the host's name resolves to.
/// @param options  `timeout` limits each collective, and the wait for the other ranks here; `master_address` is not
///                 read.
/// @param device   for a CUDA device the groups get NCCL, and it becomes the current device of this thread; without an
///                 index it is GPU number LOCAL_RANK. Ranks must not share a GPU. Unlike Runtime::choose_device this
///                 doesn't call multiply_exactly_on_gpus().
/// @throws c10::ValueError naming the variable that is missing, is no whole number, or is out of range;
///         c10::DistBackendError naming the address where rank 0 can't be reached or can't serve, or if ranks don't
///         come in time; AgreedError and c10::ValueError as make_process_groups, and AgreedError if no GPU is visible
///         or LOCAL_RANK isn't the number of a visible one.
ProcessGroups process_groups_from_environment(const RankGrid& grid, const ProcessGroupsOptions& options = {},
                                              c10::Device device = c10::Device(c10::kCPU));

}  // namespace megatron_cpp::parallel
