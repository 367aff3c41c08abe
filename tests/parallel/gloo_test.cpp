// What only groups from environment variables have: gloo_test.npN runs the tests of collectives and layers over them.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <string>

#include "parallel/collectives.h"
#include "parallel/environment_groups.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::parallel {

using namespace test_support;

TEST(Gloo, CarriesTheGroups) {
  for (const auto& [name, dims, member] : kGroupKinds) {
    EXPECT_EQ((test_support::groups(1).*member)->getBackend(at::kCPU)->getBackendName(), "gloo");
  }
}

TEST(Gloo, GroupsAreThoseOfTheGrid) {
  const int rank = test_support::world_tp()->getRank();
  for (const int t : test_support::divisors_of_world()) {
    const auto& groups = test_support::groups(t);
    for (const auto& [name, dims, member] : kGroupKinds) {
      const auto ranks = all_gather(at::full({1}, rank, at::kInt), groups.*member);
      EXPECT_TRUE(test_support::equal(ranks, at::tensor(groups.grid.group_of(rank, dims), at::kInt))) << name;
    }
  }
}

TEST(Gloo, GridsThatDifferAreRefusedOnEveryRank) {
  const int size = test_support::world_tp()->getSize();
  if (size == 1) return;
  const RankGrid wide{.tp = size};
  const RankGrid deep{.dp = size};
  EXPECT_TRUE(contains(error_of<AgreedError>([&] {
                         process_groups_from_environment(test_support::world_tp()->getRank() == 0 ? wide : deep);
                       }),
                       "ranks disagree: the layout of the ranks is '" + wide.text() + "' on rank 0"));
}

TEST(Gloo, ARankThatIsGoneIsAnErrorThatNamesTheCollective) {
  const int size = test_support::world_tp()->getSize();
  if (size == 1) return;
  const auto tp = process_groups_from_environment({.tp = size}).tp;
  if (tp->getRank() != 0) return;  // and its group ends
  EXPECT_TRUE(contains(error_of<c10::DistBackendError>([&] {
                         start_all_gather(at::ones({3, 2}), tp).wait();
                       }),
                       "all_gather of [3, 2] Float (group tp, rank 0 of " + std::to_string(size) + ") failed: "));
}

}  // namespace megatron_cpp::parallel
