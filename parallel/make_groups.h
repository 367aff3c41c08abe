// Makes the groups of all kinds and checks the grid; shared by groups from MPI and from the environment.
#pragma once

#include <functional>
#include <vector>

#include "parallel/process_groups.h"

namespace megatron_cpp::parallel::internal {

/// Makes this rank's group of a kind: number `index` among the groups of that kind, over `world_ranks`.
using MakeGroup = std::function<GroupPtr(const char* kind, int index, const std::vector<int>& world_ranks)>;

/// Makes the groups of rank `rank` in a world of `size` ranks. Collective over the world; throws as
/// make_process_groups.
ProcessGroups make_groups_of_all_kinds(const RankGrid& grid, int rank, int size, const MakeGroup& make_group);

/// The kinds in the order in which their groups were made, without those that share the group of an earlier kind. The
/// same on every rank; not collective.
std::vector<GroupKind> kinds_made(const ProcessGroups& groups);

}  // namespace megatron_cpp::parallel::internal
