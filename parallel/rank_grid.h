// How the ranks of a world are arranged over the kinds of parallelism. Pure arithmetic.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace megatron_cpp::parallel {

/// Sizes of the kinds of parallelism. The same ranks form two grids, as in Megatron-Core (parallel_state.py,
/// RankGenerator): a dense one for most of a model, tp x cp x dp x pp, and one for its experts, etp x ep x edp x pp. In
/// both the first dimension varies fastest, so that tensor-parallel neighbours are adjacent ranks and pipeline stages
/// are farthest apart. A rank has the same pipeline stage in both.
struct RankGrid {
  int tp = 1;                             ///< tensor (and sequence) parallel
  int cp = 1;                             ///< context parallel
  int dp = 1;                             ///< data parallel
  int pp = 1;                             ///< pipeline parallel
  int ep = 1;                             ///< expert parallel: ranks that the experts are split over
  std::optional<int> etp = std::nullopt;  ///< tensor parallel within each expert; default: tp

  /// Ranks in all: tp * cp * dp * pp.
  int world_size() const { return tp * cp * dp * pp; }
  /// Tensor-parallel ranks of each expert: `etp`, or `tp` if that isn't given.
  int expert_tp() const { return etp.value_or(tp); }
  /// Expert data parallel: tp * cp * dp / (etp * ep), the number of copies of each expert.
  /// @throws c10::ValueError if that is no whole number.
  int edp() const;

  /// @throws c10::ValueError naming all sizes if a size is below 1, their product isn't `world_size`, or the experts'
  ///         sizes don't divide it.
  void validate(int world_size) const;

  /// The groups over `dims`: ranks that differ in these coordinates only, in increasing order; the groups in increasing
  /// order of their first rank.
  /// @param dims  dimensions of one grid joined by "-": of "tp", "cp", "dp" and "pp", or of "etp", "ep", "edp", "pp".
  /// @throws c10::ValueError naming a dimension that isn't one of these, or `dims` if it mixes the grids; as edp().
  std::vector<std::vector<int>> groups(std::string_view dims) const;

  /// The group over `dims` that `rank` belongs to.
  std::vector<int> group_of(int rank, std::string_view dims) const;
  /// The number of that group among groups(dims): the color to split a communicator by.
  int group_index_of(int rank, std::string_view dims) const;

  /// All sizes, for messages: "tp 2, cp 1, dp 4, pp 1, ep 2, etp 1".
  std::string text() const;

  bool operator==(const RankGrid&) const = default;
};

}  // namespace megatron_cpp::parallel
