#include "parallel/process_groups.h"

#include <c10/util/Exception.h>

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>
#include <vector>

#include "parallel/mpi_backend.h"
#include "parallel/nccl_groups.h"
#include "parallel/runtime.h"

namespace parallel {
namespace {

GroupPtr make_group(Runtime& runtime, const RankGrid& grid, const std::string& name, const std::string& dims,
                    const ProcessGroupsOptions& options) {
  auto communicator = runtime.world().split(grid.group_index_of(runtime.rank(), dims));
  auto group = c10::make_intrusive<c10d::ProcessGroup>(communicator.rank(), communicator.size());
  group->setGroupName(name);
  group->setBackend(
      at::kCPU, c10d::ProcessGroup::CUSTOM,
      c10::make_intrusive<MpiBackend>(std::move(communicator), name, MpiBackendOptions{.timeout = options.timeout}));
  runtime.shut_down_at_exit(group);
  return group;
}

}  // namespace

ProcessGroups::ProcessGroups(RankGrid rank_grid, GroupPtr world_group, GroupPtr tp_group, GroupPtr dp_group,
                             GroupPtr tp_dp_group)
    : grid(rank_grid),
      world(std::move(world_group)),
      tp(std::move(tp_group)),
      dp(std::move(dp_group)),
      tp_dp(std::move(tp_dp_group)) {}
ProcessGroups::ProcessGroups(const ProcessGroups&) = default;
ProcessGroups::ProcessGroups(ProcessGroups&&) noexcept = default;
ProcessGroups& ProcessGroups::operator=(const ProcessGroups&) = default;
ProcessGroups& ProcessGroups::operator=(ProcessGroups&&) noexcept = default;
ProcessGroups::~ProcessGroups() = default;

ProcessGroups make_process_groups(Runtime& runtime, const RankGrid& grid, const ProcessGroupsOptions& options) {
  grid.validate(runtime.size());
  TORCH_CHECK_VALUE(grid.cp == 1 && grid.ep == 1 && grid.pp == 1,
                    "context, expert and pipeline parallelism are not built yet: their sizes must be 1, got ", grid.cp,
                    ", ", grid.ep, " and ", grid.pp);
  ProcessGroups groups(grid, make_group(runtime, grid, "world", "tp-cp-ep-dp-pp", options),
                       make_group(runtime, grid, "tp", "tp", options), make_group(runtime, grid, "dp", "dp", options),
                       make_group(runtime, grid, "tp_dp", "tp-dp", options));
  if (runtime.device().is_cuda()) add_nccl_backends(runtime, groups, options);
  return groups;
}

}  // namespace parallel
