#include "parallel/nccl_groups.h"

#include <c10/cuda/CUDAFunctions.h>
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <utility>

#include "parallel/hash.h"
#include "parallel/mpi_check.h"
#include "parallel/process_groups.h"
#include "parallel/runtime.h"

// Of ATen/cuda/CUDAContextLight.h, which includes headers of cuBLAS, cuSPARSE and cuSOLVER that need not be there.
namespace at::cuda {
cudaDeviceProp* getDeviceProperties(c10::DeviceIndex device);
}  // namespace at::cuda

namespace parallel {
namespace {

/// Where the other ranks find rank 0, as it sees itself.
std::string own_address(const Runtime& runtime) {
  // On one host whatever its name, which a container may not be able to resolve.
  if (runtime.local_size() == runtime.size()) return "127.0.0.1";
  std::array<char, 256> name{};
  TORCH_CHECK(gethostname(name.data(), name.size() - 1) == 0, "gethostname failed: ", std::strerror(errno));
  return name.data();
}

/// World rank 0 opens the store on a free port; everyone connects to the address it sends around.
c10::intrusive_ptr<c10d::Store> open_store(Runtime& runtime, const ProcessGroupsOptions& options) {
  std::array<char, 512> address{};
  int port = 0;
  c10d::TCPStoreOptions store_options;
  store_options.numWorkers = static_cast<size_t>(runtime.size());
  store_options.waitWorkers = false;
  store_options.timeout = options.timeout;
  c10::intrusive_ptr<c10d::TCPStore> store;
  if (runtime.rank() == 0) {
    const auto host = options.master_address.empty() ? own_address(runtime) : options.master_address;
    TORCH_CHECK_VALUE(host.size() < address.size(), "master address is too long: ", host);
    std::memcpy(address.data(), host.data(), host.size());
    store_options.isServer = true;
    store_options.port = 0;
    store = c10::make_intrusive<c10d::TCPStore>(host, store_options);
    port = store->getPort();
  }
  MCPP_MPI_CHECK(MPI_Bcast(address.data(), static_cast<int>(address.size()), MPI_CHAR, 0, runtime.world().get()));
  MCPP_MPI_CHECK(MPI_Bcast(&port, 1, MPI_INT, 0, runtime.world().get()));
  if (runtime.rank() != 0) {
    store_options.isServer = false;
    store_options.port = static_cast<uint16_t>(port);
    store = c10::make_intrusive<c10d::TCPStore>(address.data(), store_options);
  }
  return store;
}

}  // namespace

bool has_nccl() { return true; }

uint64_t gpu_identity(c10::DeviceIndex device) {
  const auto& uuid = at::cuda::getDeviceProperties(device)->uuid;
  const auto identity = stable_hash(std::string_view(&uuid.bytes[0], sizeof(uuid.bytes)));
  return identity == 0 ? 1 : identity;
}

void add_nccl_backends(Runtime& runtime, ProcessGroups& groups, const ProcessGroupsOptions& options) {
  const auto device = runtime.device();
  // For good: what goes by the current device would otherwise make a context on GPU 0 for every rank.
  c10::cuda::set_device(device.index());
  if (runtime.size() == 1) return;
  const auto store = open_store(runtime, options);
  c10::intrusive_ptr<c10d::ProcessGroupNCCL> world_backend;
  const std::array<std::pair<const char*, GroupPtr>, 4> named = {
      {{"tp-cp-ep-dp-pp", groups.world}, {"tp", groups.tp}, {"dp", groups.dp}, {"tp-dp", groups.tp_dp}}};
  for (const auto& [dims, group] : named) {
    // Collectives of one rank return their input without asking a backend. All groups of these dims have the same size.
    if (group->getSize() == 1) continue;
    auto nccl_options = c10d::ProcessGroupNCCL::Options::create();
    nccl_options->timeout = options.timeout;
    const std::string name = group->getGroupName();
    nccl_options->group_name = name;
    const auto ranks = groups.grid.group_of(runtime.rank(), dims);
    nccl_options->global_ranks_in_group.assign(ranks.begin(), ranks.end());
    if (world_backend) {
      nccl_options->split_from = world_backend;
      nccl_options->split_color = groups.grid.group_index_of(runtime.rank(), dims);
    }
    const auto prefix =
        std::string(dims) + "/" + std::to_string(groups.grid.group_index_of(runtime.rank(), dims)) + "/";
    auto group_store = c10::make_intrusive<c10d::PrefixStore>(prefix, store);
    auto backend = c10::make_intrusive<c10d::ProcessGroupNCCL>(group_store, group->getRank(), group->getSize(),
                                                               std::move(nccl_options));
    backend->eagerConnectSingleDevice(device);
    group->setBoundDeviceId(device);  // setBackend gives the backend what the group has
    group->setBackend(at::kCUDA, c10d::ProcessGroup::NCCL, backend);
    group->setGroupName(name);  // the new backend keeps it, too
    if (!world_backend) world_backend = backend;
  }
}

}  // namespace parallel
