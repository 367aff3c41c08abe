#include "parallel/shard.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <queue>
#include <utility>

namespace megatron_cpp::parallel {

int64_t even_shard_size(int64_t total, int t, std::string_view what, std::string_view group_name) {
  TORCH_CHECK_VALUE(total % t == 0, what, " ", total, " is not divisible by ", group_name, " size ", t);
  return total / t;
}

Range even_shard(int64_t total, int t, int r, std::string_view what, std::string_view group_name) {
  const int64_t size = even_shard_size(total, t, what, group_name);
  return {r * size, (r + 1) * size};
}

std::vector<int> balanced_assignment(const std::vector<int64_t>& costs, int t, int64_t most) {
  const auto num_items = static_cast<int64_t>(costs.size());
  TORCH_CHECK_VALUE(num_items <= t * most, num_items, " items for ", t, " ranks, of which each takes ", most);
  std::vector<size_t> order(costs.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return costs[a] > costs[b]; });
  using Load = std::pair<int64_t, int>;  // (cost so far, rank): least load first, then lowest rank
  std::priority_queue<Load, std::vector<Load>, std::greater<>> loads;
  for (int rank = 0; rank < t; ++rank) loads.emplace(0, rank);
  std::vector<int> rank_of(costs.size());
  std::vector<int64_t> taken(static_cast<size_t>(t), 0);
  for (const size_t item : order) {
    auto [load, rank] = loads.top();
    loads.pop();
    rank_of[item] = rank;
    if (++taken[static_cast<size_t>(rank)] < most) loads.emplace(load + costs[item], rank);
  }
  return rank_of;
}

}  // namespace megatron_cpp::parallel
