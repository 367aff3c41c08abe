#include "parallel/process_groups.h"

#include <c10/util/Exception.h>
#include <torch/headeronly/version.h>

#include <utility>
#include <vector>

#include "parallel/agree.h"
#include "parallel/mpi/mpi_backend.h"
#include "parallel/nccl/nccl_groups.h"
#include "parallel/runtime.h"

namespace parallel {
namespace {

GroupPtr make_group(Runtime& runtime, int color, const std::string& name, const ProcessGroupsOptions& options) {
  auto communicator = runtime.world().split(color);
  auto group = c10::make_intrusive<c10d::ProcessGroup>(communicator.rank(), communicator.size());
  group->setBackend(
      at::kCPU, c10d::ProcessGroup::CUSTOM,
      c10::make_intrusive<MpiBackend>(std::move(communicator), name, MpiBackendOptions{.timeout = options.timeout}));
  group->setGroupName(name);  // kept by the backends: not before there is one
  runtime.shut_down_at_exit(group);
  return group;
}

void add_gpu_backends(Runtime& runtime, const ProcessGroups& groups, const ProcessGroupsOptions& options) {
  const auto& grid = groups.grid;
  std::vector<GpuGroup> gpu_groups;
  for (const auto& [name, dims, group] : kGroupKinds) {
    gpu_groups.push_back({.group = groups.*group,
                          .kind = name,
                          .index = grid.group_index_of(runtime.rank(), dims),
                          .world_ranks = grid.group_of(runtime.rank(), dims)});
  }
  add_gpu_backends(runtime.world(), gpu_groups,
                   {.device = runtime.device(),
                    .shares_gpus = runtime.shares_gpus(),
                    .is_one_host = runtime.local_size() == runtime.size(),
                    .master_address = options.master_address,
                    .timeout = options.timeout});
}

}  // namespace

const GroupPtr& ProcessGroups::of(std::string_view kind) const {
  for (const auto& [name, dims, group] : kGroupKinds) {
    if (kind == name && this->*group) return this->*group;
  }
  TORCH_CHECK_VALUE(false, "no group of kind \"", kind, "\" was made");
}

ProcessGroups make_process_groups(Runtime& runtime, const RankGrid& grid, const ProcessGroupsOptions& options) {
  ProcessGroups groups;
  groups.grid = grid;
  groups.world = make_group(runtime, 0, "world", options);
  // Before ranks part by them: where these differ, they would wait for each other until the timeout.
  const std::vector<NamedText> alike = {{"the version of megatron_cpp", MCPP_VERSION},
                                        {"the version of LibTorch", TORCH_VERSION},
                                        {"the layout of the ranks", grid.text()}};
  check_equal_texts(alike, groups.world);
  grid.validate(runtime.size());
  TORCH_CHECK_VALUE(grid.cp == 1 && grid.ep == 1 && grid.pp == 1 && grid.expert_tp() == grid.tp,
                    "context, expert and pipeline parallelism are not built yet: their sizes must be 1, and etp that "
                    "of tp, got ",
                    grid.text());
  for (const auto& [name, dims, group] : kGroupKinds) {
    if (groups.*group) continue;
    groups.*group = make_group(runtime, grid.group_index_of(runtime.rank(), dims), name, options);
  }
  if (runtime.device().is_cuda()) add_gpu_backends(runtime, groups, options);
  return groups;
}

void destroy_process_groups(Runtime& runtime, const ProcessGroups& groups) {
  for (auto kind = kGroupKinds.rbegin(); kind != kGroupKinds.rend(); ++kind) runtime.shut_down(groups.*(kind->group));
}

}  // namespace parallel
