// The groups of ranks a program trains with.
#pragma once

#include <array>
#include <chrono>
#include <string>
#include <string_view>

#include "parallel/group.h"
#include "parallel/rank_grid.h"

namespace megatron_cpp::parallel {

class Runtime;

/// Deadlines and rendezvous of the groups; the same on every rank.
struct ProcessGroupsOptions {
  /// How long a collective may wait for its peers before it becomes an error.
  std::chrono::milliseconds timeout = std::chrono::minutes(10);
  /// NCCL's rendezvous: an address of world rank 0 that all hosts can route to. Empty: 127.0.0.1 where there is one
  /// host, otherwise rank 0's own host name, which may resolve to 127.x there and fail.
  std::string master_address{};
};

/// One c10d::ProcessGroup for each kind of parallelism. A value; the groups live as long as a copy does, or the runtime
/// that made them. Those of make_process_groups carry MPI for tensors on the CPU, those of
/// process_groups_from_environment (environment_groups.h) Gloo; both carry NCCL for tensors on a GPU that the rank has.
///
/// A program may also fill it with c10d groups of its own and give it, or one of its groups, to whatever takes them:
///  - the groups are those of the grid: a group's ranks are grid.group_of(rank, dims) with the `dims` of kGroupKinds,
///    numbered in this order. Groups of the same ranks may be one object, and so may all those of one rank;
///  - each has a backend for tensors on the CPU, and where the model is on a GPU one for tensors there. Called are
///    broadcast, barrier, allreduce (sum, maximum, minimum), allgather (of uneven shares, too, unless the backend is
///    named "gloo"), and all-gather, reduce-scatter and all-to-all of single tensors;
///  - the program chooses timeouts, and shuts the groups down after the last layer. A group that nothing it calls
///    needs may stay null.
struct ProcessGroups {
  RankGrid grid;   ///< how the ranks of `world` are laid out
  GroupPtr world;  ///< all ranks: start-up, agreement, checkpoints
  GroupPtr tp;     ///< tensor and sequence parallel
  GroupPtr dp;     ///< data parallel
  GroupPtr tp_dp;  ///< both together: where partial gradients of replicated parameters are summed

  /// The group of a kind, by its name in kGroupKinds. Not collective.
  /// @throws c10::ValueError naming the kind if there is none of that name, or its group wasn't made.
  const GroupPtr& of(std::string_view kind) const;
};

/// What the groups of one kind are made over.
struct GroupKind {
  const char* name;                ///< of its groups, in messages and recordings
  const char* dims;                ///< as RankGrid::groups takes them
  GroupPtr ProcessGroups::*group;  ///< this rank's
};

/// All kinds, in the order in which their groups are made. The world comes first.
inline constexpr std::array<GroupKind, 4> kGroupKinds = {{{"world", "tp-cp-dp-pp", &ProcessGroups::world},
                                                          {"tp", "tp", &ProcessGroups::tp},
                                                          {"dp", "dp", &ProcessGroups::dp},
                                                          {"tp_dp", "tp-dp", &ProcessGroups::tp_dp}}};

/// Makes the groups of this rank. Collective over all ranks of the MPI world. The runtime shuts them down before
/// MPI_Finalize.
/// @throws AgreedError on every rank if ranks run different versions of this library or of LibTorch, or pass different
///         grids; c10::ValueError on every rank if the grid doesn't fit the world, or asks for a kind that isn't built
///         yet (context, expert and pipeline parallelism).
ProcessGroups make_process_groups(Runtime& runtime, const RankGrid& grid, const ProcessGroupsOptions& options = {});

/// Shuts the groups down before the runtime ends, so that their communicators, of which an MPI has some thousand, are
/// freed with the last copy. Collective over all ranks, none of which may communicate in them afterwards.
void destroy_process_groups(Runtime& runtime, const ProcessGroups& groups);

}  // namespace megatron_cpp::parallel
