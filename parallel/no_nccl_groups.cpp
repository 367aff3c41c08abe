// Stands in for nccl_groups.cpp in a build without NCCL.
#include <c10/util/Exception.h>

#include "parallel/nccl_groups.h"

namespace parallel {

bool has_nccl() { return false; }

uint64_t gpu_identity(c10::DeviceIndex /*device*/) { TORCH_CHECK_VALUE(false, "this build has no NCCL"); }

void add_gpu_backends(Runtime& /*runtime*/, ProcessGroups& /*groups*/, const ProcessGroupsOptions& /*options*/) {
  TORCH_CHECK_VALUE(false, "this build has no NCCL: configure it with a LibTorch that has CUDA and MCPP_WITH_NCCL=ON");
}

}  // namespace parallel
