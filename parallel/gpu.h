// GPUs of a job: which there are, which rank computes on which, how exactly they multiply.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <span>
#include <string>

namespace megatron_cpp::parallel {

/// Which device the ranks compute on. It is of the same kind on all of them.
struct DeviceOptions {
  /// "cpu"; "cuda": a GPU for each rank, or an error; "auto": the same if any rank of the job sees a GPU, otherwise the
  /// CPU.
  std::string device = "auto";
  /// Lets several ranks compute on one GPU: for tests and trials. From NCCL 2.30 on NCCL connects them
  /// (NCCL_MULTI_RANK_GPU_ENABLE=1, which is set for it); before, their collectives go through the host's memory and
  /// MPI.
  bool share_devices = false;
  /// Lets "auto" take the CPU, with a warning, where "cuda" would be an error: for what is quick enough there.
  bool may_leave_gpus = false;
};

/// What the ranks of a job compute on.
struct DeviceChoice {
  bool on_gpus = false;      ///< each rank on the GPU that it would take; otherwise all on the CPU
  bool shares_gpus = false;  ///< some of them on the same
  std::string warning;       ///< for whoever started the job, if not empty
};

/// Whether this build has CUDA and NCCL (MCPP_WITH_NCCL).
bool has_nccl();

/// A number, never 0, that no other GPU of the job has, made of its UUID. Not collective.
/// @throws c10::ValueError if the build has no NCCL.
uint64_t gpu_identity(c10::DeviceIndex device);

/// The device of all ranks, as DeviceOptions describes it. Pure, not collective: every rank calls it with the same
/// arguments.
/// @param gpus      of each rank of the world the GPU that it would take, by gpu_identity(); 0 if it sees none.
/// @param has_nccl  whether this build has NCCL; without it no rank sees a GPU.
/// @throws c10::ValueError if the device isn't one of auto, cpu and cuda, or GPUs are asked for (or there, with auto)
///         and a rank sees none, or ranks would share one unasked.
DeviceChoice choose_device_of_all(const DeviceOptions& options, std::span<const uint64_t> gpus, bool has_nccl);

/// From here on GPUs compute products and convolutions of float32 tensors in float32, and add those of float16 and
/// bfloat16 up in float32. By LibTorch's defaults cuDNN's convolutions of float32 run in TF32, with 10 bits after the
/// point, and cuBLAS may round partial sums of half types. For the whole process, on all its threads; changes nothing
/// on the CPU, and needs no GPU. Runtime::choose_device calls it where it chooses a GPU; a program that chooses its
/// device itself calls it before its first product. Who prefers TF32's speed allows it afterwards:
/// at::globalContext().setAllowTF32CuBLAS(true), setAllowTF32CuDNN(true).
void multiply_exactly_on_gpus();

}  // namespace megatron_cpp::parallel
