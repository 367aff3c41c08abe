// Which part of a dimension belongs to which rank. Pure arithmetic.
#pragma once

#include <cstdint>
#include <limits>
#include <string_view>
#include <vector>

namespace megatron_cpp::parallel {

/// Rows [begin, end).
struct Range {
  int64_t begin = 0;                              ///< first row
  int64_t end = 0;                                ///< one past the last row
  int64_t length() const { return end - begin; }  ///< number of rows
  /// Whether begin <= index < end.
  bool contains(int64_t index) const { return index >= begin && index < end; }
  bool operator==(const Range&) const = default;
};

/// The rows of rank r of t when `total` rows are split evenly.
/// @throws c10::ValueError "<what> 10 is not divisible by tensor-parallel size 4" (with `group_name` for
///         "tensor-parallel") if total % t != 0.
Range even_shard(int64_t total, int t, int r, std::string_view what, std::string_view group_name = "tensor-parallel");

/// total / t, with the check and the message of even_shard.
int64_t even_shard_size(int64_t total, int t, std::string_view what, std::string_view group_name = "tensor-parallel");

/// Assigns whole items (pictures) to t ranks so that their costs are balanced: largest cost first, to the least loaded
/// rank that has fewer than `most` items; ties go to the earlier item and the lower rank. Ranks may get none, unless
/// there are t * most items: then each gets `most`.
/// @param costs  one per item, >= 0.
/// @return       the rank of each item. O(items log items + items log t).
/// @throws c10::ValueError if there are more than t * most items.
std::vector<int> balanced_assignment(const std::vector<int64_t>& costs, int t,
                                     int64_t most = std::numeric_limits<int32_t>::max());

}  // namespace megatron_cpp::parallel
