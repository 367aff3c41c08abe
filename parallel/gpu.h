// Chooses the device of each rank, and the precision of products on GPUs.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <span>
#include <string>

namespace megatron_cpp::parallel {

/// Which device the ranks compute on: all on the CPU, or all on GPUs.
struct DeviceOptions {
  /// "cpu"; "cuda": a GPU for each rank, or an error; "auto": the same if any rank of the job sees a GPU, otherwise the
  /// CPU.
  std::string device = "auto";
  /// Lets several ranks compute on one GPU: for tests and trials. NCCL connects such ranks from 2.30 on
  /// (NCCL_MULTI_RANK_GPU_ENABLE=1, which is set here); with older NCCL their collectives go through host memory and
  /// MPI.
  bool share_devices = false;
  /// Lets "auto" take the CPU, with a warning, where "cuda" would be an error: for work that is fast enough there.
  bool may_leave_gpus = false;
};

/// What the ranks of a job compute on.
struct DeviceChoice {
  bool on_gpus = false;      ///< each rank computes on its GPU; otherwise all on the CPU
  bool shares_gpus = false;  ///< some ranks compute on the same GPU
  std::string warning;       ///< to show the user, if not empty
};

/// Whether this build has CUDA and NCCL (MCPP_WITH_NCCL).
bool has_nccl();

/// A hash of the GPU's UUID, never 0: differs from that of any other GPU of the job. Not collective.
/// @throws c10::ValueError if the build has no NCCL.
uint64_t gpu_identity(c10::DeviceIndex device);

/// The device of all ranks, as DeviceOptions describes it. Pure, not collective: every rank calls it with the same
/// arguments.
/// @param gpus      for each rank of the world gpu_identity() of the GPU that it would take; 0 if it sees none.
/// @param has_nccl  whether this build has NCCL; without it no rank sees a GPU.
/// @throws c10::ValueError if the device isn't one of auto, cpu and cuda; or if GPUs are asked for (or seen, with auto
///         and without may_leave_gpus) and the build has no NCCL, a rank sees no GPU, or ranks would share one without
///         share_devices.
DeviceChoice choose_device_of_all(const DeviceOptions& options, std::span<const uint64_t> gpus, bool has_nccl);

/// After this call GPUs compute products and convolutions of float32 tensors in float32, and accumulate those of
/// float16 and bfloat16 in float32. By LibTorch's defaults cuDNN's convolutions of float32 run in TF32, with 10 bits of
/// mantissa, and cuBLAS may round partial sums of half types. For the whole process, on all its threads; changes
/// nothing on the CPU, and needs no GPU. Runtime::choose_device calls it where it chooses a GPU; a program that chooses
/// its device itself calls it before its first product. To allow the faster TF32 again, call afterwards
/// at::globalContext().setAllowTF32CuBLAS(true), setAllowTF32CuDNN(true).
void multiply_exactly_on_gpus();

}  // namespace megatron_cpp::parallel
