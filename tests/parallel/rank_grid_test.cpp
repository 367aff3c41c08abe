#include "parallel/rank_grid.h"

#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "parallel/collectives.h"
#include "parallel/process_groups.h"
#include "parallel/runtime.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::parallel {
namespace {

using namespace test_support;
using Groups = std::vector<std::vector<int>>;

const std::vector<RankGrid> kGrids = {{},
                                      {.tp = 4},
                                      {.dp = 6},
                                      {.tp = 2, .dp = 2, .pp = 4},
                                      {.tp = 2, .cp = 3, .dp = 2},
                                      {.tp = 2, .cp = 2, .dp = 6, .pp = 2, .ep = 3, .etp = 4},
                                      {.tp = 3, .dp = 4, .pp = 5, .ep = 4},
                                      {.tp = 2, .cp = 2, .dp = 3, .ep = 6, .etp = 1}};

const std::vector<std::string> kDims = {"tp",    "cp",     "dp",          "pp",         "tp-dp",
                                        "tp-cp", "dp-pp",  "tp-cp-dp-pp", "etp",        "ep",
                                        "edp",   "etp-ep", "ep-edp",      "etp-ep-edp", "etp-ep-edp-pp"};

bool is_of_experts(const std::string& dims) { return dims.starts_with("e"); }

/// The names and sizes of the grid that has `dims`, in its order: the first varies fastest.
std::vector<std::pair<std::string, int>> dimensions(const RankGrid& grid, const std::string& dims) {
  const int etp = grid.etp.value_or(grid.tp);
  if (!is_of_experts(dims)) return {{"tp", grid.tp}, {"cp", grid.cp}, {"dp", grid.dp}, {"pp", grid.pp}};
  return {{"etp", etp}, {"ep", grid.ep}, {"edp", grid.tp * grid.cp * grid.dp / etp / grid.ep}, {"pp", grid.pp}};
}

/// The coordinates of a rank by the names of their dimensions, written out from the definition of the order.
std::map<std::string, int> coordinates(const RankGrid& grid, const std::string& dims, int rank) {
  std::map<std::string, int> result;
  for (const auto& [name, size] : dimensions(grid, dims)) {
    result[name] = rank % size;
    rank /= size;
  }
  return result;
}

bool names(const std::string& dims, const std::string& dim) {
  return ("-" + dims + "-").find("-" + dim + "-") != std::string::npos;
}

/// {first, first + step, ...} below `end`.
std::vector<int> range(int first, int end, int step) {
  std::vector<int> ranks;
  for (int rank = first; rank < end; rank += step) ranks.push_back(rank);
  return ranks;
}

}  // namespace

// Megatron-Core, megatron/core/parallel_state.py, initialize_model_parallel: 16 GPUs, tensor 2, pipeline 4.
TEST(RankGrid, MakesTheGroupsOfMegatronsExample) {
  const RankGrid grid{.tp = 2, .dp = 2, .pp = 4};
  EXPECT_EQ(grid.groups("tp"), (Groups{{0, 1}, {2, 3}, {4, 5}, {6, 7}, {8, 9}, {10, 11}, {12, 13}, {14, 15}}));
  EXPECT_EQ(grid.groups("dp"), (Groups{{0, 2}, {1, 3}, {4, 6}, {5, 7}, {8, 10}, {9, 11}, {12, 14}, {13, 15}}));
  EXPECT_EQ(grid.groups("pp"), (Groups{{0, 4, 8, 12}, {1, 5, 9, 13}, {2, 6, 10, 14}, {3, 7, 11, 15}}));
}

// Worked out by hand.
TEST(RankGrid, MakesTheGroupsOfExpertsBesideTheDenseOnes) {
  const RankGrid split_experts{.tp = 2, .dp = 4, .ep = 2};
  EXPECT_EQ(split_experts.groups("etp"), (Groups{{0, 1}, {2, 3}, {4, 5}, {6, 7}}));
  EXPECT_EQ(split_experts.groups("ep"), (Groups{{0, 2}, {1, 3}, {4, 6}, {5, 7}}));
  EXPECT_EQ(split_experts.groups("edp"), (Groups{{0, 4}, {1, 5}, {2, 6}, {3, 7}}));

  const RankGrid whole_experts{.tp = 2, .dp = 4, .ep = 2, .etp = 1};
  EXPECT_EQ(whole_experts.groups("ep"), (Groups{{0, 1}, {2, 3}, {4, 5}, {6, 7}}));
  EXPECT_EQ(whole_experts.groups("edp"), (Groups{{0, 2, 4, 6}, {1, 3, 5, 7}}));
  EXPECT_EQ(whole_experts.groups("tp"), (Groups{{0, 1}, {2, 3}, {4, 5}, {6, 7}}));

  const RankGrid all_kinds{.tp = 2, .cp = 2, .dp = 2, .pp = 2, .ep = 4, .etp = 1};
  EXPECT_EQ(all_kinds.groups("cp"), (Groups{{0, 2}, {1, 3}, {4, 6}, {5, 7}, {8, 10}, {9, 11}, {12, 14}, {13, 15}}));
  EXPECT_EQ(all_kinds.groups("dp"), (Groups{{0, 4}, {1, 5}, {2, 6}, {3, 7}, {8, 12}, {9, 13}, {10, 14}, {11, 15}}));
  EXPECT_EQ(all_kinds.groups("ep"), (Groups{{0, 1, 2, 3}, {4, 5, 6, 7}, {8, 9, 10, 11}, {12, 13, 14, 15}}));
  EXPECT_EQ(all_kinds.groups("edp"), (Groups{{0, 4}, {1, 5}, {2, 6}, {3, 7}, {8, 12}, {9, 13}, {10, 14}, {11, 15}}));
  EXPECT_EQ(all_kinds.groups("ep-edp").front(), range(0, 8, 1));
  EXPECT_EQ(all_kinds.groups("pp").front(), (std::vector<int>{0, 8}));
}

// The sizes of Megatron-Core's tests/unit_tests/test_parallel_state.py, test_rank_generator_for_tp_dp_pp. There as here
// groups are ranges of ranks.
TEST(RankGrid, MakesTheRangesOfMegatronsTests) {
  struct Sizes {
    int ranks;
    int tp;
    int pp;
    int cp;
    int ep;
  };
  const std::vector<Sizes> all = {{1, 1, 1, 1, 1},   {8, 8, 1, 1, 1},    {8, 2, 2, 1, 1},   {8, 2, 4, 1, 1},
                                  {24, 8, 3, 1, 1},  {32, 2, 4, 1, 1},   {64, 8, 8, 1, 1},  {64, 2, 1, 1, 4},
                                  {64, 2, 2, 2, 4},  {64, 2, 1, 4, 8},   {64, 2, 2, 2, 8},  {128, 4, 8, 1, 1},
                                  {128, 4, 8, 1, 4}, {128, 4, 8, 4, 1},  {256, 4, 8, 1, 4}, {256, 8, 8, 4, 1},
                                  {512, 4, 2, 8, 8}, {1024, 4, 2, 8, 8}, {2528, 4, 8, 1, 1}};
  for (const auto& [ranks, tp, pp, cp, ep] : all) {
    const RankGrid grid{.tp = tp, .cp = cp, .dp = ranks / tp / cp / pp, .pp = pp, .ep = ep};
    grid.validate(ranks);
    // The groups of every `block` ranks, each of ranks that are `step` apart.
    const auto ranges = [ranks = ranks](int block, int step) {
      Groups groups;
      for (int begin = 0; begin < ranks; begin += block) {
        for (int i = 0; i < step; ++i) groups.push_back(range(begin + i, begin + block, step));
      }
      return groups;
    };
    const int stage = ranks / pp;
    EXPECT_EQ(grid.groups("tp"), ranges(tp, 1));
    EXPECT_EQ(grid.groups("cp"), ranges(tp * cp, tp));
    EXPECT_EQ(grid.groups("dp"), ranges(stage, tp * cp));
    EXPECT_EQ(grid.groups("cp-dp"), ranges(stage, tp));
    EXPECT_EQ(grid.groups("pp"), ranges(ranks, stage));
    EXPECT_EQ(grid.groups("etp"), ranges(tp, 1));
    EXPECT_EQ(grid.groups("ep"), ranges(tp * ep, tp));
    EXPECT_EQ(grid.groups("edp"), ranges(stage, tp * ep));
  }
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
        const auto place = coordinates(grid, dims, a);
        for (int b = 0; b < grid.world_size(); ++b) {
          bool together = true;
          for (const auto& [dim, coordinate] : coordinates(grid, dims, b)) {
            together = together && (names(dims, dim) || coordinate == place.at(dim));
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
  EXPECT_TRUE(contains(value_error([&] { grid.groups("tp-vp"); }), "unknown parallel dimension 'vp' in 'tp-vp'"));
  EXPECT_TRUE(contains(value_error([&] { grid.groups(""); }), "unknown parallel dimension ''"));
  EXPECT_TRUE(contains(value_error([&] { grid.groups("tp-ep"); }), "'tp-ep' mixes two grids"));
  EXPECT_TRUE(contains(value_error([&] { grid.group_of(2, "tp"); }), "rank 2 is not in a world of 2"));
  EXPECT_TRUE(contains(value_error([&] { grid.group_index_of(-1, "tp"); }), "rank -1"));
}

TEST(RankGrid, ValidateNamesAllSizes) {
  const RankGrid grid{.tp = 2, .cp = 3, .dp = 7, .pp = 11, .ep = 7};
  EXPECT_NO_THROW(grid.validate(462));
  EXPECT_EQ(value_error([&] { grid.validate(8); }),
            "tensor-parallel 2 x context-parallel 3 x data-parallel 7 x pipeline-parallel 11 (expert-parallel 7, "
            "expert-tensor-parallel 2) does not make the 8 ranks that were started");
  EXPECT_THROW((RankGrid{.tp = 0, .dp = 0}.validate(0)), c10::ValueError);
  EXPECT_THROW((RankGrid{.tp = -2, .dp = -2}.validate(4)), c10::ValueError);
  EXPECT_THROW((RankGrid{.tp = 2, .dp = 2, .ep = 0}.validate(4)), c10::ValueError);
  EXPECT_EQ(value_error([] { RankGrid{.tp = 2, .dp = 2, .ep = 2, .etp = 3}.validate(4); }),
            "expert-tensor-parallel 3 x expert-parallel 2 does not divide tensor-parallel 2 x context-parallel 1 x "
            "data-parallel 2");
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
    // Experts laid out as the dense layers use their groups.
    EXPECT_EQ(groups.etp, groups.tp);
    EXPECT_EQ(groups.etp_ep, groups.tp);
    EXPECT_TRUE(groups.edp == groups.dp || groups.dp->getSize() == 1);
    EXPECT_EQ(groups.ep->getSize(), 1);
  }
}

TEST(ProcessGroups, OfExpertsFollowTheirGrid) {
  const int size = test_support::runtime().size();
  const int rank = test_support::runtime().rank();
  for (const int t : test_support::divisors_of_world()) {
    for (const int ep : test_support::divisors_of_world()) {
      for (int etp = 1; etp * ep <= size; ++etp) {
        if (size % (etp * ep) != 0) continue;
        const auto& groups = test_support::groups({.tp = t, .dp = size / t, .ep = ep, .etp = etp});
        for (const auto& [name, dims, member] : kGroupKinds) {
          const auto ranks = all_gather(at::full({1}, rank, at::kInt), groups.*member);
          EXPECT_TRUE(test_support::equal(ranks, at::tensor(groups.grid.group_of(rank, dims), at::kInt))) << name;
        }
      }
    }
  }
}

TEST(ProcessGroups, RefuseGridsOnEveryRank) {
  auto& runtime = test_support::runtime();
  const int size = runtime.size();
  EXPECT_NE(value_error([&] {
              make_process_groups(runtime, {.tp = size + 1});
            }).find("does not make the " + std::to_string(size) + " ranks"),
            std::string::npos);
  if (size == 1) return;  // a grid of one rank has nothing but ones
  EXPECT_NE(value_error([&] { make_process_groups(runtime, {.cp = size}); }).find("not built yet"), std::string::npos);
  EXPECT_NE(value_error([&] { make_process_groups(runtime, {.pp = size}); }).find("not built yet"), std::string::npos);
}

TEST(ProcessGroups, AreFreedWithTheLastCopyOnceDestroyed) {
  auto& runtime = test_support::runtime();
  auto groups = make_process_groups(runtime, {.dp = runtime.size()});
  barrier(groups.dp);
  const c10::weak_intrusive_ptr<c10d::ProcessGroup> dp(groups.dp);
  destroy_process_groups(runtime, groups);
  EXPECT_FALSE(dp.expired());
  groups = {};
  EXPECT_TRUE(dp.expired());
}

}  // namespace megatron_cpp::parallel
