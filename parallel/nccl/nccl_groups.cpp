#include "parallel/nccl/nccl_groups.h"

#include <c10/cuda/CUDAFunctions.h>
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>
#include <fmt/format.h>
#include <nccl.h>

#include <cstdlib>
#include <string>
#include <string_view>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#include <utility>

#include "parallel/agree.h"
#include "parallel/gpu.h"
#include "parallel/hash.h"
#include "parallel/make_groups.h"
#include "parallel/nccl/staged_backend.h"

// From ATen/cuda/CUDAContextLight.h, which includes cuBLAS, cuSPARSE and cuSOLVER headers that may be missing.
namespace at::cuda {
cudaDeviceProp* getDeviceProperties(c10::DeviceIndex device);
}  // namespace at::cuda

namespace megatron_cpp::parallel {
namespace {

void set_backend(const GroupPtr& group, const c10::intrusive_ptr<c10d::Backend>& backend) {
  const std::string name = group->getGroupName();
  // A c10d group has one backend per backend type: this type differs from the CPU backend's.
  group->setBackend(at::kCUDA, c10d::ProcessGroup::NCCL, backend);
  group->setGroupName(name);  // the new backend stores it, too
}

/// Why NCCL can't connect ranks on one GPU. If it can, enables that and returns an empty text.
std::string refusal_to_share() {
  int version = 0;
  ncclGetVersion(&version);
  if (version < 23000) {
    return fmt::format("NCCL {}.{} doesn't share GPUs, 2.30 does", version / 10000, version / 100 % 100);
  }
  setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1", /*overwrite=*/0);  // read at the first communicator
  return {};
}

/// Connects the world's `backend`, where ranks share GPUs.
/// @return  NCCL's error, the same on every rank, if it can't connect ranks that share a GPU; otherwise empty.
std::string connect_sharing_ranks(c10d::ProcessGroupNCCL& backend, const GroupPtr& world, c10::Device device) {
  std::string refusal;
  try {
    backend.eagerConnectSingleDevice(device);
  } catch (const std::exception& error) {
    refusal = error_text(error);
  }
  try {
    agree(refusal.empty(), refusal, world);
  } catch (const AgreedError& error) {
    return error.what();
  }
  return {};
}

/// Adds a ProcessGroupNCCL to each group of several ranks.
/// @return  NCCL's error, the same on every rank, if it can't connect ranks that share a GPU. Any other failure throws.
std::string add_nccl_backends(const ProcessGroups& groups, const c10::intrusive_ptr<c10d::Store>& store,
                              const GpuGroupsOptions& options) {
  const int world_rank = groups.world->getRank();
  c10::intrusive_ptr<c10d::ProcessGroupNCCL> world_backend;
  for (const auto& [kind, dims, member] : internal::kinds_made(groups)) {
    const auto& group = groups.*member;
    // Collectives of one rank need no backend. All groups of this kind have the same size.
    if (group->getSize() == 1) continue;
    const int index = groups.grid.group_index_of(world_rank, dims);
    const auto world_ranks = groups.grid.group_of(world_rank, dims);
    auto nccl_options = c10d::ProcessGroupNCCL::Options::create();
    nccl_options->timeout = options.timeout;
    nccl_options->group_name = group->getGroupName();
    nccl_options->global_ranks_in_group.assign(world_ranks.begin(), world_ranks.end());
    if (world_backend) {
      nccl_options->split_from = world_backend;
      nccl_options->split_color = index;
    }
    const auto prefix = fmt::format("nccl/{}/{}/", kind, index);
    auto group_store = c10::make_intrusive<c10d::PrefixStore>(prefix, store);
    auto backend = c10::make_intrusive<c10d::ProcessGroupNCCL>(group_store, group->getRank(), group->getSize(),
                                                               std::move(nccl_options));
    if (!world_backend && options.shares_gpus) {
      // The world contains all ranks that share GPUs: if NCCL refuses, it refuses here, before any group has a backend.
      auto refusal = connect_sharing_ranks(*backend, group, options.device);
      if (!refusal.empty()) return refusal;
    } else {
      backend->eagerConnectSingleDevice(options.device);
    }
    group->setBoundDeviceId(options.device);  // setBackend passes it on to the backend
    set_backend(group, backend);
    if (!world_backend) world_backend = backend;
  }
  return {};
}

}  // namespace

bool has_nccl() { return true; }

uint64_t gpu_identity(c10::DeviceIndex device) {
  const auto& uuid = at::cuda::getDeviceProperties(device)->uuid;
  const auto identity = stable_hash(std::string_view(&uuid.bytes[0], sizeof(uuid.bytes)));
  return identity == 0 ? 1 : identity;
}

void add_gpu_backends(const ProcessGroups& groups, const c10::intrusive_ptr<c10d::Store>& store,
                      const GpuGroupsOptions& options) {
  // Not restored: code that uses the current device would otherwise create a context on GPU 0 for every rank.
  c10::cuda::set_device(options.device.index());
  if (groups.world->getSize() == 1) return;
  std::string refusal;
  if (options.shares_gpus) refusal = refusal_to_share();
  if (refusal.empty()) refusal = add_nccl_backends(groups, store, options);
  if (refusal.empty()) return;
  if (groups.world->getRank() == 0) {
    TORCH_WARN("ranks share GPUs: what they send goes through the host's memory and MPI, which is slow (", refusal,
               ")");
  }
  for (const auto& [kind, dims, member] : internal::kinds_made(groups)) {
    const auto& group = groups.*member;
    if (group->getSize() > 1) set_backend(group, make_staged_backend(group->getBackend(at::kCPU)));
  }
}

}  // namespace megatron_cpp::parallel
