// A group of which only one rank exists: for plans, shapes and volumes at sizes that no machine at hand has.
#pragma once

#include <c10/core/Device.h>

#include "parallel/group.h"

namespace megatron_cpp::parallel {

/// Where rehearsed collectives run, and how long they take there.
struct RehearsalOptions {
  /// Tensors of this device can be given to the group, beside those of the CPU: the CPU or a GPU.
  c10::Device device = c10::kCPU;
  /// 0: a collective takes no time but that of filling its result, on the current stream. Above, on GPUs only: it runs
  /// on a stream of its own, as NCCL's do, and takes as long there as sending this rank's bytes at this rate: it moves
  /// as many bytes within the GPU (filling its result is a part of that), and spins on one thread for the rest of the
  /// time. Work::wait makes the current stream wait. A rate above that of the GPU's own copies isn't reached.
  double gigabytes_per_second = 0;
};

/// A group in which this process is rank `rank` of `size` and nobody else is there. Collectives send nothing, as if the
/// other ranks contributed zeros: sums are this rank's summand, gathered parts of others are zero. Shapes are checked
/// as the MPI backend checks them. What compares ranks (agree(), check_equal(), the checked mode of layers) finds zeros
/// and throws. Put it under record() to count what would be sent. Not collective.
/// @throws c10::ValueError unless 0 <= rank < size.
GroupPtr make_rehearsal_group(int rank, int size, const RehearsalOptions& options = {});

}  // namespace megatron_cpp::parallel
