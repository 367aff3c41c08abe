#include "parallel/environment_groups.h"

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <string>
#include <string_view>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <vector>

#include "parallel/agree.h"
#include "parallel/collectives.h"
#include "parallel/make_groups.h"
#include "parallel/mpi/launcher.h"
#include "parallel/nccl/nccl_groups.h"

namespace megatron_cpp::parallel {
namespace {

/// An environment variable, and Slurm's variable that is read if it is missing.
struct Variable {
  const char* name;
  const char* of_slurm = nullptr;
};

constexpr Variable kRank{"RANK", "SLURM_PROCID"};
constexpr Variable kLocalRank{"LOCAL_RANK", "SLURM_LOCALID"};
constexpr Variable kWorldSize{"WORLD_SIZE", "SLURM_NTASKS"};
constexpr Variable kMasterAddress{"MASTER_ADDR"};
constexpr Variable kMasterPort{"MASTER_PORT"};

bool is_set(const char* name) { return std::getenv(name) != nullptr; }

std::string text(const Variable& variable) {
  const char* name = !is_set(variable.name) && variable.of_slurm != nullptr ? variable.of_slurm : variable.name;
  const char* value = std::getenv(name);
  TORCH_CHECK_VALUE(value != nullptr, variable.name, " is not set: torchrun sets it",
                    variable.of_slurm == nullptr ? "" : fmt::format(", or srun {}", variable.of_slurm));
  return value;
}

/// The variable's value, which must be in [lowest, highest].
int number(const Variable& variable, int lowest, int highest) {
  const auto digits = text(variable);
  const auto value = whole_number(digits);
  TORCH_CHECK_VALUE(value && lowest <= *value && *value <= highest,
                    is_set(variable.name) ? variable.name : variable.of_slurm, "='", digits,
                    "' is no whole number from ", lowest, " to ", highest);
  return *value;
}

c10::intrusive_ptr<c10d::Store> open_store(int rank, int size, std::chrono::milliseconds timeout) {
  const auto host = text(kMasterAddress);
  const char* served_by_torchrun = std::getenv("TORCHELASTIC_USE_AGENT_STORE");
  c10d::TCPStoreOptions options;
  options.port = static_cast<uint16_t>(number(kMasterPort, 1, std::numeric_limits<uint16_t>::max()));
  options.isServer = rank == 0 && (served_by_torchrun == nullptr || std::string_view(served_by_torchrun) != "True");
  options.numWorkers = static_cast<size_t>(size);
  options.timeout = timeout;
  options.multiTenant = true;  // one server for all groups that this process makes
  try {
    return c10::make_intrusive<c10d::TCPStore>(host, options);
  } catch (const std::exception& error) {
    TORCH_CHECK_WITH(DistBackendError, false, "rank ", rank, " of ", size,
                     options.isServer ? " can't gather the others at " : " can't reach rank 0 at ", host, ":",
                     options.port, " (MASTER_ADDR, MASTER_PORT): ", error_text(error));
  }
}

GroupPtr make_group(const c10::intrusive_ptr<c10d::Store>& store, const std::string& name, int rank, int size,
                    std::chrono::milliseconds timeout) {
  auto group = c10::make_intrusive<c10d::ProcessGroup>(rank, size);
  try {
    group->setBackend(at::kCPU, c10d::ProcessGroup::GLOO,
                      c10::make_intrusive<c10d::ProcessGroupGloo>(
                          store, rank, size, c10d::ProcessGroupGloo::Options::create_default(timeout)));
  } catch (const std::exception& error) {
    TORCH_CHECK_WITH(DistBackendError, false, "Gloo can't connect group ", name, " (rank ", rank, " of ", size,
                     "): ", error_text(error));
  }
  group->setGroupName(name);
  return group;
}

/// `device`, or GPU number LOCAL_RANK if it has no index.
c10::Device gpu_of_this_rank(c10::Device device) {
  if (device.has_index()) return device;
  const auto num_gpus = at::detail::getCUDAHooks().deviceCount();
  TORCH_CHECK_VALUE(num_gpus > 0, "no GPU is visible");
  return {device.type(), static_cast<c10::DeviceIndex>(number(kLocalRank, 0, num_gpus - 1))};
}

}  // namespace

bool ranks_in_environment() {
  return (is_set(kRank.name) && is_set(kWorldSize.name)) ||
         (is_set(kRank.of_slurm) && is_set(kWorldSize.of_slurm) && is_set(kMasterAddress.name));
}

int world_size_in_environment() { return number(kWorldSize, 1, std::numeric_limits<int>::max()); }

ProcessGroups process_groups_from_environment(const RankGrid& grid, const ProcessGroupsOptions& options,
                                              c10::Device device) {
  const int size = world_size_in_environment();
  const int rank = number(kRank, 0, size - 1);
  // Each call uses its own keys, the same on every rank: torchrun keeps one store for all restarts of a job.
  static int num_calls = 0;
  const char* start = std::getenv("TORCHELASTIC_RESTART_COUNT");
  const auto prefix = fmt::format("megatron_cpp/{}/{}/", start == nullptr ? "" : start, num_calls++);
  const auto store = c10::make_intrusive<c10d::PrefixStore>(prefix, open_store(rank, size, options.timeout));
  auto groups = internal::make_groups_of_all_kinds(
      grid, rank, size, [&](const char* kind, int index, const std::vector<int>& world_ranks) {
        const auto place = std::find(world_ranks.begin(), world_ranks.end(), rank) - world_ranks.begin();
        return make_group(c10::make_intrusive<c10d::PrefixStore>(fmt::format("{}/{}/", kind, index), store), kind,
                          static_cast<int>(place), static_cast<int>(world_ranks.size()), options.timeout);
      });
  if (device.is_cuda()) {
    agree_on([&] { device = gpu_of_this_rank(device); }, groups.world);
    add_gpu_backends(groups, store, {.device = device, .timeout = options.timeout});
  }
  barrier(groups.world);  // all ranks have connected: rank 0 may exit, and its store with it
  return groups;
}

}  // namespace megatron_cpp::parallel
