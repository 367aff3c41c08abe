// What every source of groups does alike: the kinds in their order, and what is checked before ranks part by the grid.
#pragma once

#include <functional>
#include <vector>

#include "parallel/process_groups.h"

namespace megatron_cpp::parallel::internal {

/// Makes the group of a kind that has this rank: number `index` among the groups of that kind, over `world_ranks`.
using MakeGroup = std::function<GroupPtr(const char* kind, int index, const std::vector<int>& world_ranks)>;

/// The groups of this rank, number `rank` of a world of `size`. Collective over the world; throws as
/// make_process_groups.
ProcessGroups make_groups_of_all_kinds(const RankGrid& grid, int rank, int size, const MakeGroup& make_group);

}  // namespace megatron_cpp::parallel::internal
