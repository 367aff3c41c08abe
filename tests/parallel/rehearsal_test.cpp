// A rehearsed group: what one rank of many would send and get, with nobody else there.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include "parallel/collectives.h"
#include "parallel/recording_backend.h"
#include "parallel/rehearsal_backend.h"
#include "tests/support/test_world.h"

namespace {

using parallel::CollectiveKind;
using parallel::make_rehearsal_group;
using test_support::exact_values;

}  // namespace

TEST(Rehearsal, OthersContributeZeros) {
  constexpr int kT = 3;
  for (int rank = 0; rank < kT; ++rank) {
    const auto group = make_rehearsal_group(rank, kT);
    const auto input = exact_values({6, 2}, rank + 1);
    EXPECT_TRUE(test_support::equal(parallel::all_reduce(input, group), input));
    EXPECT_TRUE(test_support::equal(parallel::reduce_scatter(input, group), input.narrow(0, 2 * rank, 2)));
    auto gathered = at::zeros({18, 2});
    gathered.narrow(0, 6 * rank, 6).copy_(input);
    EXPECT_TRUE(test_support::equal(parallel::all_gather(input, group), gathered));
    auto uneven = at::zeros({6 + 2 * kT - 2, 2});  // the others have two rows each
    uneven.narrow(0, 2 * rank, 6).copy_(input);
    std::vector<int64_t> rows(kT, 2);
    rows[static_cast<size_t>(rank)] = 6;
    EXPECT_TRUE(test_support::equal(parallel::all_gather_uneven(input, rows, group), uneven));
    auto kept = at::zeros({6, 2});
    kept.narrow(0, 2 * rank, 2).copy_(input.narrow(0, 2 * rank, 2));
    EXPECT_TRUE(test_support::equal(parallel::all_to_all(input, {}, {}, group), kept));
    EXPECT_TRUE(test_support::equal(parallel::broadcast(input, 1, group), rank == 1 ? input : at::zeros({6, 2})));
    parallel::barrier(group);
  }
}

// The formulas at sizes that no test could run.
TEST(Rehearsal, CountsWhatARankOfThousandsSends) {
  for (const int t : {1, 64, 4096, 262144}) {
    const auto recorded = parallel::record(make_rehearsal_group(t - 1, t));
    const auto input = at::zeros({t, 1});
    const int64_t share = t == 1 ? 0 : 4 * (t - 1);
    parallel::all_reduce(input, recorded.group);
    EXPECT_EQ(recorded.count->bytes_sent, 2 * share) << t;
    parallel::reduce_scatter(input, recorded.group);
    EXPECT_EQ(recorded.count->bytes_sent, 3 * share) << t;
    parallel::all_gather(at::zeros({1, 1}), recorded.group);
    EXPECT_EQ(recorded.count->bytes_sent, 4 * share) << t;
    parallel::all_to_all(input, {}, {}, recorded.group);
    EXPECT_EQ(recorded.count->bytes_sent, 5 * share) << t;
    EXPECT_EQ(recorded.count->of(CollectiveKind::kAllToAll), t == 1 ? 0 : 1);
  }
}

TEST(Rehearsal, RefusesRanksThatAreNotInTheGroup) {
  EXPECT_THROW(make_rehearsal_group(4, 4), c10::ValueError);
  EXPECT_THROW(make_rehearsal_group(-1, 4), c10::ValueError);
}
