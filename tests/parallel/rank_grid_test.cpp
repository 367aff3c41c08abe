#include "parallel/rank_grid.h"

#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <set>
#include <string>
#include <vector>

#include "parallel/collectives.h"
#include "parallel/process_groups.h"
#include "parallel/runtime.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace {

using parallel::RankGrid;
using test_support::value_error;
using Groups = std::vector<std::vector<int>>;

const std::vector<RankGrid> kGrids = {{},
                                      {.tp = 4},
                                      {.dp = 6},
                                      {.tp = 2, .dp = 2, .pp = 4},
                                      {.tp = 2, .cp = 3, .dp = 2},
                                      {.tp = 2, .cp = 2, .ep = 3, .dp = 2, .pp = 2},
                                      {.tp = 3, .ep = 2, .pp = 5}};

const std::vector<std::string> kDims = {"tp", "cp", "ep", "dp", "pp", "tp-dp", "tp-cp", "dp-pp", "tp-cp-ep-dp-pp"};

/// (tp, cp, ep, dp, pp) of a rank, written out from the definition of the order: tp varies fastest.
std::array<int, 5> coordinates(const RankGrid& grid, int rank) {
  std::array<int, 5> result{};
  const std::array<int, 5> extent = {grid.tp, grid.cp, grid.ep, grid.dp, grid.pp};
  for (size_t dim = 0; dim < extent.size(); ++dim) {
    result[dim] = rank % extent[dim];
    rank /= extent[dim];
  }
  return result;
}

bool names(const std::string& dims, size_t dim) {
  constexpr std::array<const char*, 5> kNames = {"tp", "cp", "ep", "dp", "pp"};
  return dims.find(kNames[dim]) != std::string::npos;
}

}  // namespace

// Megatron-Core, megatron/core/parallel_state.py, initialize_model_parallel: 16 GPUs, tensor 2, pipeline 4.
TEST(RankGrid, MakesTheGroupsOfMegatronsExample) {
  const RankGrid grid{.tp = 2, .dp = 2, .pp = 4};
  EXPECT_EQ(grid.groups("tp"), (Groups{{0, 1}, {2, 3}, {4, 5}, {6, 7}, {8, 9}, {10, 11}, {12, 13}, {14, 15}}));
  EXPECT_EQ(grid.groups("dp"), (Groups{{0, 2}, {1, 3}, {4, 6}, {5, 7}, {8, 10}, {9, 11}, {12, 14}, {13, 15}}));
  EXPECT_EQ(grid.groups("pp"), (Groups{{0, 4, 8, 12}, {1, 5, 9, 13}, {2, 6, 10, 14}, {3, 7, 11, 15}}));
}

// The same file, generate_masked_orthogonal_rank_groups: sizes tp 2, dp 3, pp 4, groups over dp.
TEST(RankGrid, MakesTheOrthogonalGroupsOfMegatronsExample) {
  const auto groups = RankGrid{.tp = 2, .dp = 3, .pp = 4}.groups("dp");
  ASSERT_EQ(groups.size(), 8U);
  EXPECT_EQ(groups[0], (std::vector<int>{0, 2, 4}));
  EXPECT_EQ(groups[1], (std::vector<int>{1, 3, 5}));
  EXPECT_EQ(groups[7], (std::vector<int>{19, 21, 23}));
}

TEST(RankGrid, GroupsPartitionTheWorldInIncreasingOrder) {
  for (const auto& grid : kGrids) {
    for (const auto& dims : kDims) {
      std::set<int> seen;
      int previous_first = -1;
      for (const auto& group : grid.groups(dims)) {
        EXPECT_TRUE(std::is_sorted(group.begin(), group.end()));
        EXPECT_GT(group.front(), previous_first) << dims;
        previous_first = group.front();
        for (const int rank : group) EXPECT_TRUE(seen.insert(rank).second) << rank << " is in two groups over " << dims;
      }
      EXPECT_EQ(static_cast<int>(seen.size()), grid.world_size());
      EXPECT_EQ(*seen.rbegin(), grid.world_size() - 1);
    }
  }
}

TEST(RankGrid, RanksOfAGroupDifferInItsDimensionsOnly) {
  for (const auto& grid : kGrids) {
    for (const auto& dims : kDims) {
      for (int a = 0; a < grid.world_size(); ++a) {
        const auto group = grid.group_of(a, dims);
        EXPECT_EQ(group, grid.groups(dims)[static_cast<size_t>(grid.group_index_of(a, dims))]);
        for (int b = 0; b < grid.world_size(); ++b) {
          bool together = true;
          for (size_t dim = 0; dim < 5; ++dim) {
            together = together && (names(dims, dim) || coordinates(grid, a)[dim] == coordinates(grid, b)[dim]);
          }
          EXPECT_EQ(std::count(group.begin(), group.end(), b), together ? 1 : 0)
              << "ranks " << a << " and " << b << " over " << dims;
        }
      }
    }
  }
}

TEST(RankGrid, RefusesUnknownDimensionsAndRanks) {
  const RankGrid grid{.tp = 2};
  EXPECT_NE(value_error([&] { grid.groups("tp-vp"); }).find("unknown parallel dimension 'vp' in 'tp-vp'"),
            std::string::npos);
  EXPECT_NE(value_error([&] { grid.group_of(2, "tp"); }).find("rank 2 is not in a world of 2"), std::string::npos);
  EXPECT_NE(value_error([&] { grid.group_index_of(-1, "tp"); }).find("rank -1"), std::string::npos);
}

TEST(RankGrid, ValidateNamesAllSizes) {
  const RankGrid grid{.tp = 2, .cp = 3, .ep = 5, .dp = 7, .pp = 11};
  EXPECT_NO_THROW(grid.validate(2310));
  EXPECT_EQ(value_error([&] { grid.validate(8); }),
            "tensor-parallel 2 x context-parallel 3 x expert-parallel 5 x data-parallel 7 x pipeline-parallel 11 does "
            "not make the 8 ranks that were started");
  EXPECT_THROW((RankGrid{.tp = 0, .dp = 0}.validate(0)), c10::ValueError);
  EXPECT_THROW((RankGrid{.tp = -2, .dp = -2}.validate(4)), c10::ValueError);
}

TEST(ProcessGroups, FollowTheGrid) {
  const int rank = test_support::runtime().rank();
  for (const int t : test_support::divisors_of_world()) {
    const auto& groups = test_support::groups(t);
    const auto place = [&](const std::vector<int>& members) {
      return static_cast<int>(std::find(members.begin(), members.end(), rank) - members.begin());
    };
    EXPECT_EQ(groups.tp->getSize(), t);
    EXPECT_EQ(groups.tp->getRank(), place(groups.grid.group_of(rank, "tp")));
    EXPECT_EQ(groups.dp->getSize(), test_support::runtime().size() / t);
    EXPECT_EQ(groups.dp->getRank(), place(groups.grid.group_of(rank, "dp")));
    EXPECT_EQ(groups.world->getRank(), rank);
    EXPECT_EQ(groups.tp_dp->getSize(), test_support::runtime().size());
    EXPECT_EQ(groups.tp->getSize(), t);
  }
}

TEST(ProcessGroups, RefuseGridsOnEveryRank) {
  auto& runtime = test_support::runtime();
  const int size = runtime.size();
  EXPECT_NE(value_error([&] {
              parallel::make_process_groups(runtime, {.tp = size + 1});
            }).find("does not make the " + std::to_string(size) + " ranks"),
            std::string::npos);
  if (size == 1) return;  // a grid of one rank has nothing but ones
  EXPECT_NE(value_error([&] { parallel::make_process_groups(runtime, {.cp = size}); }).find("not built yet"),
            std::string::npos);
  EXPECT_NE(value_error([&] { parallel::make_process_groups(runtime, {.pp = size}); }).find("not built yet"),
            std::string::npos);
}

TEST(ProcessGroups, AreFreedWithTheLastCopyOnceDestroyed) {
  auto& runtime = test_support::runtime();
  auto groups = parallel::make_process_groups(runtime, {.dp = runtime.size()});
  parallel::barrier(groups.dp);
  const c10::weak_intrusive_ptr<c10d::ProcessGroup> dp(groups.dp);
  parallel::destroy_process_groups(runtime, groups);
  EXPECT_FALSE(dp.expired());
  groups = {};
  EXPECT_TRUE(dp.expired());
}
