// A group of which only one rank exists: to check plans, shapes and bytes sent for more ranks than the machine can run.
#pragma once

#include <c10/core/Device.h>

#include "parallel/group.h"

namespace megatron_cpp::parallel {

/// Where rehearsed collectives run, and how long they take there.
struct RehearsalOptions {
  /// The group takes tensors on this device, the CPU or a GPU, and on the CPU.
  c10::Device device = c10::kCPU;
  /// 0: a collective only fills its result, on the current stream. Above 0, on GPUs only: it runs on its own stream, as
  /// NCCL's do, and takes as long as sending this rank's bytes at this rate: it copies as many bytes within the GPU
  /// (filling its result included), and spins on one thread for the rest of the time. Work::wait makes the current
  /// stream wait. Rates above the GPU's own copy rate aren't reached.
  double gigabytes_per_second = 0;
};

/// A group of `size` ranks of which only this process, rank `rank`, exists. Collectives send nothing and compute as if
/// the other ranks contributed zeros: sums are this rank's summand, gathered parts of other ranks are zero. Shapes are
/// checked as the MPI backend checks them. Functions that compare ranks (agree(), check_equal(), the checked mode of
/// layers) see the zeros and throw. Put it under record() to count what would be sent. Not collective.
/// @throws c10::ValueError unless 0 <= rank < size, or for a device or rate that RehearsalOptions doesn't allow.
GroupPtr make_rehearsal_group(int rank, int size, const RehearsalOptions& options = {});

}  // namespace megatron_cpp::parallel
