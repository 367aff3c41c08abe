#include "parallel/process_groups.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/headeronly/version.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <numeric>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <utility>
#include <vector>

#include "parallel/agree.h"
#include "parallel/collectives.h"
#include "parallel/host_name.h"
#include "parallel/make_groups.h"
#include "parallel/mpi/mpi_backend.h"
#include "parallel/mpi/stall_watch.h"
#include "parallel/nccl/nccl_groups.h"
#include "parallel/runtime.h"

namespace megatron_cpp::parallel {
namespace {

GroupPtr make_group(Runtime& runtime, int color, const std::string& name, const ProcessGroupsOptions& options) {
  auto communicator = runtime.world().split(color);
  auto group = c10::make_intrusive<c10d::ProcessGroup>(communicator.rank(), communicator.size());
  group->setBackend(
      at::kCPU, c10d::ProcessGroup::CUSTOM,
      c10::make_intrusive<MpiBackend>(std::move(communicator), name, MpiBackendOptions{.timeout = options.timeout}));
  group->setGroupName(name);  // the backends store it, so after setBackend
  runtime.shut_down_at_exit(group);
  return group;
}

/// The address under which the other ranks reach rank 0.
std::string own_address(const Runtime& runtime, const ProcessGroupsOptions& options) {
  if (!options.master_address.empty()) return options.master_address;
  // A container may not be able to resolve its own host name.
  if (runtime.local_size() == runtime.size()) return "127.0.0.1";
  const auto name = host_name();
  TORCH_CHECK(!name.empty(), "gethostname failed: ", std::strerror(errno));
  return name;
}

/// World rank 0 opens the store on a free port; all ranks connect to the address that it broadcasts.
c10::intrusive_ptr<c10d::Store> open_store(const Runtime& runtime, const GroupPtr& world,
                                           const ProcessGroupsOptions& options) {
  c10d::TCPStoreOptions store_options;
  store_options.numWorkers = static_cast<size_t>(runtime.size());
  store_options.waitWorkers = false;
  store_options.timeout = options.timeout;
  store_options.isServer = runtime.rank() == 0;
  store_options.port = 0;
  const auto host = broadcast_text(own_address(runtime, options), 0, world);
  c10::intrusive_ptr<c10d::TCPStore> store;
  if (store_options.isServer) store = c10::make_intrusive<c10d::TCPStore>(host, store_options);
  const auto port = broadcast(at::full({1}, store ? store->getPort() : 0, at::kInt), 0, world).item<int>();
  store_options.port = static_cast<uint16_t>(port);
  return store ? store : c10::make_intrusive<c10d::TCPStore>(host, store_options);
}

/// For a kind of the experts' grid: a kind of the dense grid whose groups have the same ranks, such as tp for etp if ep
/// is 1. Each communicator costs memory and time to connect. Null for other kinds, or if there is none. Groups that
/// layers communicate in are kept apart from those that gradients are summed in, which may do so at the same time.
const GroupKind* dense_kind_of_same_ranks(const RankGrid& grid, std::string_view name, const char* dims) {
  const bool is_of_layers = name == "ep" || name == "etp" || name == "etp_ep";
  if (!is_of_layers && name != "edp") return nullptr;
  const auto ranks = grid.groups(dims);
  for (const auto& kind : kGroupKinds) {
    const std::string_view dense = kind.name;
    const bool is_alike = is_of_layers ? dense == "tp" : dense == "dp" || dense == "tp_dp";
    if (is_alike && grid.groups(kind.dims) == ranks) return &kind;
  }
  return nullptr;
}

}  // namespace

const GroupPtr& ProcessGroups::of(std::string_view kind) const {
  for (const auto& [name, dims, group] : kGroupKinds) {
    if (kind == name && this->*group) return this->*group;
  }
  TORCH_CHECK_VALUE(false, "no group of kind \"", kind, "\" was made");
}

ProcessGroups internal::make_groups_of_all_kinds(const RankGrid& grid, int rank, int size,
                                                 const MakeGroup& make_group) {
  ProcessGroups groups;
  groups.grid = grid;
  std::vector<int> all(static_cast<size_t>(size));
  std::iota(all.begin(), all.end(), 0);
  groups.world = make_group(kGroupKinds.front().name, 0, all);
  // Checked first: ranks that make groups by different grids would wait for each other until the timeout.
  const std::vector<NamedText> alike = {{"the version of megatron_cpp", MCPP_VERSION},
                                        {"the version of LibTorch", TORCH_VERSION},
                                        {"the layout of the ranks", grid.text()}};
  check_equal_texts(alike, groups.world);
  grid.validate(size);
  TORCH_CHECK_VALUE(grid.cp == 1 && grid.pp == 1,
                    "context and pipeline parallelism are not built yet: their sizes must be 1, got ", grid.text());
  for (const auto& [name, dims, group] : kGroupKinds) {
    if (groups.*group) continue;
    if (const auto* same = dense_kind_of_same_ranks(grid, name, dims)) {
      groups.*group = groups.*(same->group);
    } else {
      groups.*group = make_group(name, grid.group_index_of(rank, dims), grid.group_of(rank, dims));
    }
  }
  return groups;
}

std::vector<GroupKind> internal::kinds_made(const ProcessGroups& groups) {
  std::vector<GroupKind> kinds;
  for (const auto& kind : kGroupKinds) {
    const bool is_shared = std::any_of(kinds.begin(), kinds.end(), [&](const GroupKind& earlier) {
      return groups.*(earlier.group) == groups.*(kind.group);
    });
    if (!is_shared) kinds.push_back(kind);
  }
  return kinds;
}

ProcessGroups make_process_groups(Runtime& runtime, const RankGrid& grid, const ProcessGroupsOptions& options) {
  auto groups = internal::make_groups_of_all_kinds(
      grid, runtime.rank(), runtime.size(), [&](const char* kind, int index, const std::vector<int>& /*world_ranks*/) {
        return make_group(runtime, index, kind, options);
      });
  if (const auto watch = StallWatch::existing()) watch->watch(options.timeout);
  if (runtime.device().is_cuda()) {
    // NCCL ends the process when its time is over: the report must come first.
    constexpr auto kReport = std::chrono::seconds(10);
    add_gpu_backends(
        groups, open_store(runtime, groups.world, options),
        {.device = runtime.device(), .shares_gpus = runtime.shares_gpus(), .timeout = options.timeout + kReport});
  }
  return groups;
}

void destroy_process_groups(Runtime& runtime, const ProcessGroups& groups) {
  const auto kinds = internal::kinds_made(groups);
  for (auto kind = kinds.rbegin(); kind != kinds.rend(); ++kind) runtime.shut_down(groups.*(kind->group));
}

}  // namespace megatron_cpp::parallel
