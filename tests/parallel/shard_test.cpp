#include "parallel/shard.h"

#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

namespace megatron_cpp::parallel {
namespace {

std::string value_error(int64_t total, int t, const char* group_name) {
  try {
    even_shard(total, t, 0, "out_features", group_name);
  } catch (const c10::ValueError& error) {
    return error.what_without_backtrace();
  }
  return "nothing thrown";
}

std::vector<int64_t> loads(const std::vector<int64_t>& costs, const std::vector<int>& rank_of, int t) {
  std::vector<int64_t> result(static_cast<size_t>(t));
  for (size_t item = 0; item < costs.size(); ++item) result[static_cast<size_t>(rank_of[item])] += costs[item];
  return result;
}

}  // namespace

TEST(Range, IsHalfOpen) {
  const Range range{3, 5};
  EXPECT_EQ(range.length(), 2);
  EXPECT_FALSE(range.contains(2));
  EXPECT_TRUE(range.contains(3));
  EXPECT_TRUE(range.contains(4));
  EXPECT_FALSE(range.contains(5));
  EXPECT_EQ(Range{}.length(), 0);
}

TEST(EvenShard, PartitionsTheRowsInTheOrderOfTheRanks) {
  for (int t = 1; t <= 7; ++t) {
    for (int64_t rows_each = 0; rows_each <= 5; ++rows_each) {
      const int64_t total = rows_each * t;
      int64_t next = 0;
      for (int r = 0; r < t; ++r) {
        const auto range = even_shard(total, t, r, "rows");
        EXPECT_EQ(range.begin, next);
        EXPECT_EQ(range.length(), rows_each);
        next = range.end;
      }
      EXPECT_EQ(next, total);
      EXPECT_EQ(even_shard_size(total, t, "rows"), rows_each);
    }
  }
}

TEST(EvenShard, RefusesWhatDoesNotDivideNamingTheNumbers) {
  EXPECT_EQ(value_error(10, 4, "tensor-parallel"), "out_features 10 is not divisible by tensor-parallel size 4");
  EXPECT_EQ(value_error(3, 2, "expert"), "out_features 3 is not divisible by expert size 2");
  EXPECT_THROW(even_shard_size(1, 3, "rows"), c10::ValueError);
}

TEST(BalancedAssignment, GivesTheDearestItemToTheLeastLoadedRank) {
  // 9 -> rank 0, 7 -> 1, 5 -> 2, 4 -> 2 (5 is least), 3 -> 1 (7 is least), 1 -> 0 (9, 10, 9: the lower rank).
  EXPECT_EQ(balanced_assignment({5, 9, 1, 7, 4, 3}, 3), (std::vector<int>{2, 0, 0, 1, 2, 1}));
}

TEST(BalancedAssignment, BreaksTiesByItemAndRank) {
  EXPECT_EQ(balanced_assignment({2, 2, 2, 2, 2}, 3), (std::vector<int>{0, 1, 2, 0, 1}));
}

TEST(BalancedAssignment, MayLeaveRanksEmpty) {
  EXPECT_TRUE(balanced_assignment({}, 4).empty());
  EXPECT_EQ(balanced_assignment({9, 1, 1, 1}, 2, 2), (std::vector<int>{0, 1, 1, 0}));
  EXPECT_THROW(balanced_assignment({1, 1, 1, 1, 1}, 2, 2), c10::ValueError);
  EXPECT_EQ(balanced_assignment({8}, 4), (std::vector<int>{0}));
  EXPECT_EQ(balanced_assignment({3, 1, 4}, 1), (std::vector<int>{0, 0, 0}));
}

TEST(BalancedAssignment, StaysWithinOneItemOfTheMean) {
  // Greedy by falling cost: no rank has more than the mean plus the cost of one item (Graham, 1969).
  for (int t = 1; t <= 8; ++t) {
    for (int64_t items = 1; items <= 40; items += 3) {
      std::vector<int64_t> costs(static_cast<size_t>(items));
      for (int64_t item = 0; item < items; ++item) costs[static_cast<size_t>(item)] = (item * 37 + t * 11) % 23;
      const auto load = loads(costs, balanced_assignment(costs, t), t);
      const int64_t total = std::accumulate(costs.begin(), costs.end(), int64_t{0});
      const int64_t dearest = *std::max_element(costs.begin(), costs.end());
      const int64_t largest = *std::max_element(load.begin(), load.end());
      EXPECT_EQ(std::accumulate(load.begin(), load.end(), int64_t{0}), total);
      EXPECT_LE(largest * t, total + dearest * (t - 1)) << items << " items on " << t << " ranks";
    }
  }
}

}  // namespace megatron_cpp::parallel
