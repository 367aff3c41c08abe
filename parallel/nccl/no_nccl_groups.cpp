// Stands in for nccl_groups.cpp and cuda_paced_stream.cpp in a build without NCCL.
#include <c10/util/Exception.h>

#include "parallel/gpu.h"
#include "parallel/nccl/nccl_groups.h"
#include "parallel/paced_stream.h"

namespace megatron_cpp::parallel {

bool has_nccl() { return false; }

std::shared_ptr<PacedStream> make_paced_stream(c10::Device /*device*/, double /*gigabytes_per_second*/) {
  TORCH_CHECK_VALUE(false, "this build has no NCCL, nor what it takes to time collectives on a GPU");
}

uint64_t gpu_identity(c10::DeviceIndex /*device*/) { TORCH_CHECK_VALUE(false, "this build has no NCCL"); }

void add_gpu_backends(const ProcessGroups& /*groups*/, const c10::intrusive_ptr<c10d::Store>& /*store*/,
                      const GpuGroupsOptions& /*options*/) {
  TORCH_CHECK_VALUE(false, "this build has no NCCL: configure it with a LibTorch that has CUDA and MCPP_WITH_NCCL=ON");
}

}  // namespace megatron_cpp::parallel
