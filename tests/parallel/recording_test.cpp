#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <ostream>
#include <stdexcept>
#include <vector>

#include "parallel/collectives.h"
#include "parallel/recording_backend.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::parallel {
namespace {

using namespace test_support;

/// One collective of `kind` that sends `bytes_sent`; none where the group has one rank.
CommunicationCount one(CollectiveKind kind, int64_t bytes_sent, int t) {
  CommunicationCount count;
  if (t == 1) return count;
  count.collectives[static_cast<size_t>(kind)] = 1;
  count.bytes_sent = bytes_sent;
  return count;
}

}  // namespace

/// What GoogleTest shows of a count.
void PrintTo(const CommunicationCount& count, std::ostream* out) {
  for (int kind = 0; kind < kNumCollectiveKinds; ++kind) {
    *out << collective_name(static_cast<CollectiveKind>(kind)) << " " << count.of(static_cast<CollectiveKind>(kind))
         << ", ";
  }
  *out << count.bytes_sent << " bytes";
}

TEST(Recording, NamesTheKinds) {
  EXPECT_EQ(collective_name(CollectiveKind::kAllReduce), "all_reduce");
  EXPECT_EQ(collective_name(CollectiveKind::kAllGather), "all_gather");
  EXPECT_EQ(collective_name(CollectiveKind::kReduceScatter), "reduce_scatter");
  EXPECT_EQ(collective_name(CollectiveKind::kAllToAll), "all_to_all");
  EXPECT_EQ(collective_name(CollectiveKind::kBroadcast), "broadcast");
}

TEST(Recording, CountsDifferBySubtraction) {
  CommunicationCount earlier;
  earlier.collectives = {1, 2, 3, 4, 5};
  earlier.bytes_sent = 100;
  CommunicationCount later;
  later.collectives = {2, 4, 3, 9, 5};
  later.bytes_sent = 164;
  const auto difference = later - earlier;
  EXPECT_EQ(difference.of(CollectiveKind::kAllReduce), 1);
  EXPECT_EQ(difference.of(CollectiveKind::kAllGather), 2);
  EXPECT_EQ(difference.of(CollectiveKind::kReduceScatter), 0);
  EXPECT_EQ(difference.of(CollectiveKind::kAllToAll), 5);
  EXPECT_EQ(difference.of(CollectiveKind::kBroadcast), 0);
  EXPECT_EQ(difference.total(), 8);
  EXPECT_EQ(difference.bytes_sent, 64);
  EXPECT_EQ(later - later, CommunicationCount{});
}

TEST(Recording, KeepsTheRanksOfItsGroup) {
  for (const int t : test_support::divisors_of_world()) {
    for (const auto& group : {groups(t).tp, groups(t).dp, groups(t).world}) {
      const auto recorded = record(group);
      EXPECT_EQ(recorded.group->getRank(), group->getRank());
      EXPECT_EQ(recorded.group->getSize(), group->getSize());
      // What goes through it reaches the ranks that the group itself reaches.
      const auto input = on_device(at::full({2}, test_support::runtime().rank(), at::kLong));
      EXPECT_TRUE(test_support::equal(all_gather(input, recorded.group), all_gather(input, group)));
    }
  }
}

TEST(Recording, CountsEachCollectiveAndItsBytes) {
  for (const int t : test_support::divisors_of_world()) {
    const auto recorded = record(groups(t).tp);
    const auto& group = recorded.group;
    // Rows divisible by 4, so that each formula gives whole bytes at 2 and 4 ranks.
    for (const auto dtype : {at::kFloat, at::kDouble, at::kBFloat16}) {
      const auto input = on_device(test_support::exact_values({8, 12}, 1 + group->getRank(), dtype));
      const auto width = static_cast<int64_t>(at::elementSize(dtype));
      const int64_t bytes = 8 * 12 * width;
      const auto counted = [&](const auto& action) {
        const auto before = *recorded.count;
        action();
        return *recorded.count - before;
      };
      const auto expect = [&](CollectiveKind kind, int64_t sent, const auto& action) {
        EXPECT_EQ(counted(action), one(kind, sent, t)) << dtype << " over " << t;
      };
      expect(CollectiveKind::kAllReduce, 2 * bytes * (t - 1) / t, [&] { all_reduce(input, group); });
      expect(CollectiveKind::kAllReduce, 2 * bytes * (t - 1) / t, [&] { all_reduce(input, group, Reduction::kMax); });
      expect(CollectiveKind::kAllReduce, 2 * bytes * (t - 1) / t, [&] {
        auto buffer = input.clone();
        all_reduce_in_place(buffer, group);
      });
      expect(CollectiveKind::kAllReduce, 2 * bytes * (t - 1) / t,
             [&] { start_all_reduce_in_place(input.clone(), group).wait(); });
      // (t-1)/t of the result, which is t inputs.
      expect(CollectiveKind::kAllGather, bytes * (t - 1), [&] { all_gather(input, group); });
      expect(CollectiveKind::kAllGather, bytes * (t - 1), [&] { start_all_gather(input, group).wait(); });
      expect(CollectiveKind::kAllGather, bytes * (t - 1), [&] { all_gather_last_dim(input, group); });
      expect(CollectiveKind::kReduceScatter, bytes * (t - 1) / t, [&] { reduce_scatter(input, group); });
      expect(CollectiveKind::kReduceScatter, bytes * (t - 1) / t, [&] { start_reduce_scatter(input, group).wait(); });
      expect(CollectiveKind::kReduceScatter, bytes * (t - 1) / t, [&] { reduce_scatter_last_dim(input, group); });
      expect(CollectiveKind::kAllToAll, bytes * (t - 1) / t, [&] { all_to_all(input, {}, {}, group); });
      expect(CollectiveKind::kBroadcast, bytes * (t - 1) / t, [&] { broadcast(input, t - 1, group); });
      expect(CollectiveKind::kAllReduce, 0, [&] { all_reduce(input.narrow(0, 0, 0), group); });
      EXPECT_EQ(counted([&] { barrier(group); }), CommunicationCount{});
    }
  }
}

TEST(Recording, CountsWhatUnevenExchangesReallySend) {
  for (const int t : test_support::divisors_of_world()) {
    const auto recorded = record(groups(t).tp);
    const int r = recorded.group->getRank();
    // Rank p sends p + q + 1 rows of 3 floats to rank q.
    std::vector<int64_t> splits;
    int64_t rows = 0;
    for (int q = 0; q < t; ++q) {
      splits.push_back(r + q + 1);
      rows += r + q + 1;
    }
    all_to_all(on_device(at::ones({rows, 3})), splits, splits, recorded.group);
    EXPECT_EQ(*recorded.count, one(CollectiveKind::kAllToAll, (rows - (2 * r + 1)) * 3 * 4, t));
  }
}

// Uneven gathering is a function of c10d, not of collectives.h: on the CPU, where MPI does it.
TEST(Recording, CountsUnevenGatheringByWhatThisRankGives) {
  for (const int t : test_support::divisors_of_world()) {
    if (t == 1) continue;
    const auto recorded = record(groups(t).tp);
    const int r = recorded.group->getRank();
    std::vector<std::vector<at::Tensor>> outputs(1);
    for (int p = 0; p < t; ++p) outputs[0].push_back(at::empty({p, 5}));
    std::vector<at::Tensor> inputs{at::ones({r, 5})};
    recorded.group->allgather(outputs, inputs)->wait();
    EXPECT_EQ(*recorded.count, one(CollectiveKind::kAllGather, (t - 1) * r * 5 * 4, t));
  }
}

TEST(Recording, LeavesTheGroupItselfAndOtherRecordingsAlone) {
  const auto& group = test_support::world_tp();
  const int t = group->getSize();
  const auto first = record(group);
  const auto second = record(group);
  const auto nested = record(first.group);
  const auto input = on_device(at::ones({4}));
  all_reduce(input, group);
  EXPECT_EQ(first.count->total(), 0);
  all_reduce(input, first.group);
  EXPECT_EQ(first.count->total(), t == 1 ? 0 : 1);
  EXPECT_EQ(second.count->total(), 0);
  all_reduce(input, nested.group);
  EXPECT_EQ(first.count->total(), t == 1 ? 0 : 2);
  EXPECT_EQ(nested.count->total(), t == 1 ? 0 : 1);
}

TEST(Observing, WhatTheObserverThrowsEndsTheCollectiveBeforeAnythingIsSent) {
  for (const int t : test_support::divisors_of_world()) {
    if (t == 1) continue;  // nothing to send, and nothing to see
    bool refuse = true;
    const auto group = observe(groups(t).tp, [&](CollectiveKind kind, int64_t bytes_sent) {
      EXPECT_EQ(kind, CollectiveKind::kAllReduce);
      EXPECT_EQ(bytes_sent, 2 * (16 * (t - 1) / t));
      if (refuse) throw std::runtime_error("not now");
    });
    const auto input = on_device(at::ones({4}));
    EXPECT_TRUE(
        test_support::throws<c10::DistBackendError>([&] { all_reduce(input, group); }, "all_reduce of [4] Float"));
    refuse = false;  // the group is whole: had a rank sent something, the next sum would be wrong
    EXPECT_TRUE(at::equal(all_reduce(input, group), on_device(at::full({4}, double(t)))));
  }
}

}  // namespace megatron_cpp::parallel
