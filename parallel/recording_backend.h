// Counts the collectives of a group, for tests, benchmarks and `--stats`.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string_view>

#include "parallel/group.h"
#include "parallel/process_groups.h"

namespace megatron_cpp::parallel {

/// Kinds of collectives, which are counted separately.
enum class CollectiveKind { kAllReduce, kAllGather, kReduceScatter, kAllToAll, kBroadcast };
inline constexpr int kNumCollectiveKinds = 5;  ///< entries of CollectiveKind

/// "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast".
std::string_view collective_name(CollectiveKind kind);

/// Called as a collective begins, on the thread that calls it, with the bytes that this rank sends for it by the
/// standard count: all-reduce 2(t-1)/t, all-gather and reduce-scatter (t-1)/t of the full tensor, broadcast (t-1)/t;
/// all-to-all and uneven all-gather the bytes that this rank sends to other ranks.
using CollectiveObserver = std::function<void(CollectiveKind kind, int64_t bytes_sent)>;

/// A group of the same ranks, which calls `observer` and then runs each collective on `group`'s backends; if `observer`
/// throws, the collective fails and sends nothing. Barriers, and calls on `group` itself, aren't observed. Not
/// collective.
GroupPtr observe(const GroupPtr& group, CollectiveObserver observer);

/// The same for all groups but the world. Kinds that share a group share the observed one.
ProcessGroups observe(const ProcessGroups& groups, const CollectiveObserver& observer);

/// Collectives of a group since its recording began, and the bytes this rank sends for them, as in CollectiveObserver.
struct CommunicationCount {
  std::array<int64_t, kNumCollectiveKinds> collectives{};  ///< calls, by CollectiveKind
  int64_t bytes_sent = 0;                                  ///< by this rank

  /// Calls of one kind.
  int64_t of(CollectiveKind kind) const { return collectives[static_cast<size_t>(kind)]; }
  int64_t total() const;  ///< calls of all kinds
  /// What was counted since `earlier` was copied.
  CommunicationCount operator-(const CommunicationCount& earlier) const;
  bool operator==(const CommunicationCount&) const = default;
};

/// A group and the running count of what is sent through it. The count of a part of a program is the difference of
/// two copies of `*count`.
struct RecordedGroup {
  GroupPtr group;                                   ///< collectives on this group are counted
  std::shared_ptr<const CommunicationCount> count;  ///< the running count, updated as long as the group lives
};

/// Counts the collectives that observe() reports.
RecordedGroup record(const GroupPtr& group);

}  // namespace megatron_cpp::parallel
