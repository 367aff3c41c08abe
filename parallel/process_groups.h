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

/// One c10d::ProcessGroup for each kind of parallelism. A value type: the groups live as long as a copy of it, or the
/// runtime that made them. Those of make_process_groups carry MPI for tensors on the CPU, those of
/// process_groups_from_environment (environment_groups.h) Gloo; both carry NCCL for tensors on the rank's GPU.
///
/// A program may also fill it with its own c10d groups:
///  - the ranks of each group must be grid.group_of(rank, dims), in this order, with the `dims` of kGroupKinds. Groups
///    of the same ranks may be one object, and so may all groups of one rank; but gradients are summed during the
///    backward pass (GradientBuffer::reduce_in_backward) only in groups that are none of tp, ep, etp and etp_ep;
///  - each needs a backend for tensors on the CPU, and if the model is on a GPU one for tensors there. This library
///    calls broadcast, barrier, allreduce (sum, maximum, minimum), allgather (of uneven shares, too, unless the backend
///    is named "gloo"), and all-gather, reduce-scatter and all-to-all of single tensors;
///  - the program chooses timeouts, and shuts the groups down after their last use. A group that is never used may stay
///    null.
struct ProcessGroups {
  RankGrid grid;             ///< how the ranks of `world` are laid out
  GroupPtr world = nullptr;  ///< all ranks: start-up, agreement, checkpoints
  GroupPtr tp = nullptr;     ///< tensor and sequence parallel
  GroupPtr dp = nullptr;     ///< data parallel
  GroupPtr tp_dp = nullptr;  ///< both together: where partial gradients of replicated parameters are summed
  // The grid of the experts. ep, etp and etp_ep of the same ranks as tp are tp; edp of those of dp or tp_dp is that
  // one.
  GroupPtr ep = nullptr;      ///< expert parallel: each rank has other experts
  GroupPtr etp = nullptr;     ///< tensor parallel within each expert
  GroupPtr etp_ep = nullptr;  ///< both together: the ranks that hold all experts once
  GroupPtr edp = nullptr;     ///< the copies of each expert

  /// The group of a kind, by its name in kGroupKinds. Not collective.
  /// @throws c10::ValueError naming the kind if there is none of that name, or its group wasn't made.
  const GroupPtr& of(std::string_view kind) const;
};

/// A kind of groups and the dimensions of the grid that they span.
struct GroupKind {
  const char* name;                ///< name of its groups in messages
  const char* dims;                ///< as RankGrid::groups takes them
  GroupPtr ProcessGroups::*group;  ///< this rank's group
};

/// All kinds, in the order in which their groups are made. The world comes first.
inline constexpr std::array<GroupKind, 8> kGroupKinds = {{{"world", "tp-cp-dp-pp", &ProcessGroups::world},
                                                          {"tp", "tp", &ProcessGroups::tp},
                                                          {"dp", "dp", &ProcessGroups::dp},
                                                          {"tp_dp", "tp-dp", &ProcessGroups::tp_dp},
                                                          {"ep", "ep", &ProcessGroups::ep},
                                                          {"etp", "etp", &ProcessGroups::etp},
                                                          {"etp_ep", "etp-ep", &ProcessGroups::etp_ep},
                                                          {"edp", "edp", &ProcessGroups::edp}}};

/// Makes the groups of this rank. Collective over all ranks of the MPI world. The runtime shuts them down before
/// MPI_Finalize.
/// @throws AgreedError on every rank if ranks run different versions of this library or of LibTorch, or pass different
///         grids; c10::ValueError on every rank if the grid doesn't fit the world, or asks for a kind that isn't built
///         yet (context and pipeline parallelism).
ProcessGroups make_process_groups(Runtime& runtime, const RankGrid& grid, const ProcessGroupsOptions& options = {});

/// Shuts the groups down before the runtime ends, so that their communicators are freed with the last copy: an MPI has
/// only some thousand. Collective over all ranks; no rank may use the groups afterwards.
void destroy_process_groups(Runtime& runtime, const ProcessGroups& groups);

}  // namespace megatron_cpp::parallel
