// How the ranks of a world are arranged over the kinds of parallelism. Pure arithmetic.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace parallel {

/// Sizes of the five kinds of parallelism, in Megatron-Core's order tp-cp-ep-dp-pp (parallel_state.py, RankGenerator):
/// tensor-parallel neighbours are adjacent ranks, pipeline stages are farthest apart.
struct RankGrid {
  int tp = 1;  ///< tensor (and sequence) parallel
  int cp = 1;  ///< context parallel
  int ep = 1;  ///< expert parallel
  int dp = 1;  ///< data parallel
  int pp = 1;  ///< pipeline parallel

  /// Ranks in all.
  int world_size() const { return tp * cp * ep * dp * pp; }

  /// @throws c10::ValueError naming all sizes and the world's if a size is below 1 or their product isn't `world_size`.
  void validate(int world_size) const;

  /// The groups over `dims`, one or more of "tp", "cp", "ep", "dp", "pp" joined by "-": ranks that differ in these
  /// coordinates only, in increasing order; the groups in increasing order of their first rank.
  /// @throws c10::ValueError naming a dimension that isn't one of these.
  std::vector<std::vector<int>> groups(std::string_view dims) const;

  /// The group over `dims` that `rank` belongs to, and its number among groups(dims).
  std::vector<int> group_of(int rank, std::string_view dims) const;
  /// The number of that group among groups(dims): the color to split a communicator by.
  int group_index_of(int rank, std::string_view dims) const;

  bool operator==(const RankGrid&) const = default;
};

}  // namespace parallel
