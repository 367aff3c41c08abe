// Seeing what is communicated: the only counter that tests, benchmarks and `--stats` read, and the observer under it.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string_view>

#include "parallel/group.h"

namespace megatron_cpp::parallel {

/// What is counted apart.
enum class CollectiveKind { kAllReduce, kAllGather, kReduceScatter, kAllToAll, kBroadcast };
inline constexpr int kNumCollectiveKinds = 5;  ///< entries of CollectiveKind

/// "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast".
std::string_view collective_name(CollectiveKind kind);

/// Called as a collective begins, on the thread that calls it, with the bytes that this rank sends for it by the
/// standard count: all-reduce 2(t-1)/t, all-gather and reduce-scatter (t-1)/t of the full tensor, all-to-all what goes
/// to other ranks, broadcast (t-1)/t; uneven exchanges what is really sent.
using CollectiveObserver = std::function<void(CollectiveKind kind, int64_t bytes_sent)>;

/// A group of the same ranks whose collectives go through `group`'s backends after `observer` was called; where that
/// throws, the collective fails and sends nothing. Barriers aren't observed. `group` stays usable and isn't
/// observed. Not collective.
GroupPtr observe(const GroupPtr& group, CollectiveObserver observer);

/// Collectives of a group since its recording began, and the bytes this rank sends for them as CollectiveObserver has
/// them.
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
  GroupPtr group;                                   ///< use this one, and it is counted
  std::shared_ptr<const CommunicationCount> count;  ///< so far; goes on counting as long as the group lives
};

/// Counts what observe() sees.
RecordedGroup record(const GroupPtr& group);

}  // namespace megatron_cpp::parallel
