#include "parallel/process_groups.h"

#include <c10/util/Exception.h>
#include <torch/headeronly/version.h>

#include <utility>
#include <vector>

#include "parallel/agree.h"
#include "parallel/mpi_backend.h"
#include "parallel/nccl_groups.h"
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

std::string sizes(const RankGrid& grid) {
  return "tp " + std::to_string(grid.tp) + ", cp " + std::to_string(grid.cp) + ", ep " + std::to_string(grid.ep) +
         ", dp " + std::to_string(grid.dp) + ", pp " + std::to_string(grid.pp);
}

}  // namespace

ProcessGroups make_process_groups(Runtime& runtime, const RankGrid& grid, const ProcessGroupsOptions& options) {
  const auto world = make_group(runtime, 0, "world", options);
  // Before ranks part by them: where these differ, they would wait for each other until the timeout.
  const std::vector<NamedText> alike = {{"the version of megatron_cpp", MCPP_VERSION},
                                        {"the version of LibTorch", TORCH_VERSION},
                                        {"the layout of the ranks", sizes(grid)}};
  check_equal_texts(alike, world);
  grid.validate(runtime.size());
  TORCH_CHECK_VALUE(grid.cp == 1 && grid.ep == 1 && grid.pp == 1,
                    "context, expert and pipeline parallelism are not built yet: their sizes must be 1, got ", grid.cp,
                    ", ", grid.ep, " and ", grid.pp);
  const auto group_of = [&](const std::string& name, const std::string& dims) {
    return make_group(runtime, grid.group_index_of(runtime.rank(), dims), name, options);
  };
  ProcessGroups groups{.grid = grid,
                       .world = world,
                       .tp = group_of("tp", "tp"),
                       .dp = group_of("dp", "dp"),
                       .tp_dp = group_of("tp_dp", "tp-dp")};
  if (runtime.device().is_cuda()) add_gpu_backends(runtime, groups, options);
  return groups;
}

void destroy_process_groups(Runtime& runtime, const ProcessGroups& groups) {
  for (const auto& group : {groups.tp_dp, groups.dp, groups.tp, groups.world}) runtime.shut_down(group);
}

}  // namespace parallel
