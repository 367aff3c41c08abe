// Whether a job computes on GPUs: the decision alone, of what its ranks see.
#pragma once

#include <cstdint>
#include <span>
#include <string>

namespace parallel {

struct DeviceOptions;

/// What the ranks of a job compute on.
struct DeviceChoice {
  bool on_gpus = false;      ///< each rank on the GPU that it would take; otherwise all on the CPU
  bool shares_gpus = false;  ///< some of them on the same
  std::string warning;       ///< for whoever started the job, if not empty
};

/// The device of all ranks, as DeviceOptions describes it. Pure, not collective: every rank calls it with the same
/// arguments.
/// @param gpus      of each rank of the world the GPU that it would take, by gpu_identity(); 0 if it sees none.
/// @param has_nccl  whether this build has NCCL; without it no rank sees a GPU.
/// @throws c10::ValueError if the device isn't one of auto, cpu and cuda, or GPUs are asked for (or there, with auto)
///         and a rank sees none, or ranks would share one unasked.
DeviceChoice choose_device_of_all(const DeviceOptions& options, std::span<const uint64_t> gpus, bool has_nccl);

}  // namespace parallel
