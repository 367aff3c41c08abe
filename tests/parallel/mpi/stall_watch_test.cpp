// Who is missing from a collective that has timed out, as the others find out, and the report on it.
#include "parallel/mpi/stall_watch.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <string>

#include "parallel/collectives.h"
#include "parallel/mpi/collective_call.h"
#include "parallel/mpi/mpi_backend.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::parallel {
namespace {

using internal::CollectiveRecord;
using test_support::runtime;

CollectiveRecord collective(const std::string& operation, int64_t elements) {
  CollectiveRecord record{.number = 7, .elements = elements, .first_rank = 0};
  operation.copy(record.operation.data(), record.operation.size() - 1);
  std::string("tp").copy(record.group.data(), 2);
  return record;
}

RankActivity in(const CollectiveRecord& record) {
  RankActivity rank{.has_answered = true};
  std::string("a").copy(rank.activity.host.data(), 1);
  rank.activity.current = record;
  rank.activity.latest[0] = record;
  return rank;
}

RankActivity silent(const std::string& state) {
  RankActivity rank;
  state.copy(rank.state.data(), rank.state.size() - 1);
  return rank;
}

constexpr char kWaits[] = "(host a): in all_reduce number 7 of tp, 5 elements, for 0.0 s\n";

}  // namespace

TEST(StallReport, HasALineForEachRank) {
  EXPECT_EQ(
      stall_report({in(collective("all_reduce", 5)), silent("stopped"), silent(""), silent("gone")}),
      std::string("  rank 0 ") + kWaits + "  rank 1: silent (stopped)\n  rank 2: silent\n  rank 3: silent (gone)\n");
}

TEST(StallReport, PointsOutWhatDiffersInTheSamePlace) {
  const auto first = in(collective("all_reduce", 5));
  const auto same = stall_report({first, first});
  EXPECT_EQ(same, std::string("  rank 0 ") + kWaits + "  rank 1 " + kWaits);
  const auto line_of = [&](const RankActivity& other) {
    const auto report = stall_report({first, first, other});
    const auto begin = report.find("  ranks ");
    return begin == std::string::npos ? "" : report.substr(begin);
  };
  EXPECT_EQ(line_of(in(collective("all_reduce", 6))),
            "  ranks 0 and 2 differ: all_reduce number 7 of tp, 5 elements; all_reduce number 7 of tp, 6 elements\n");
  EXPECT_EQ(line_of(in(collective("all_gather", 5))),
            "  ranks 0 and 2 differ: all_reduce number 7 of tp, 5 elements; all_gather number 7 of tp, 5 elements\n");
  auto other_place = in(collective("all_gather", 6));
  other_place.activity.latest[0].number = 8;
  EXPECT_EQ(line_of(other_place), "");
  auto other_group = in(collective("all_gather", 6));
  other_group.activity.latest[0].first_rank = 2;
  EXPECT_EQ(line_of(other_group), "") << "another group of the same name";
}

TEST(StallReport, UnevenSharesDoNotDiffer) {
  auto uneven = collective("all_gather", 5);
  uneven.sizes_may_differ = true;
  auto other = uneven;
  other.elements = 6;
  EXPECT_EQ(stall_report({in(uneven), in(other)}).find("differ"), std::string::npos);
}

TEST(StallWatch, AnswersWhileTheRankDoesSomethingElse) {
  if (runtime().size() == 1) return;
  const int r = runtime().rank();
  barrier(test_support::world_tp());
  const auto last = runtime().size() - 1;
  {
    const Phase phase(r == last ? "thinking" : "not asking");
    if (r == 0) {
      const auto all = StallWatch::existing()->ask();
      ASSERT_EQ(all.size(), static_cast<size_t>(runtime().size()));
      for (const auto& rank : all) EXPECT_TRUE(rank.has_answered);
      EXPECT_STREQ(all.back().activity.phase.data(), "thinking");
      EXPECT_STREQ(all.front().activity.phase.data(), "not asking");
    }
    barrier(test_support::world_tp());
  }
}

// All ask at the same time, again and again: each gets all answers.
TEST(StallWatch, AnswersAll) {
  if (runtime().size() == 1) return;
  for (int i = 0; i < 3; ++i) {
    const auto all = StallWatch::existing()->ask();
    ASSERT_EQ(all.size(), static_cast<size_t>(runtime().size()));
    for (const auto& rank : all) EXPECT_TRUE(rank.has_answered);
  }
  barrier(test_support::world_tp());
}

TEST(StallWatch, IsOneForAllRuntimes) {
  const auto first = StallWatch::existing();
  EXPECT_EQ(first == nullptr, runtime().size() == 1);
  const Runtime second;
  EXPECT_EQ(StallWatch::existing(), first);
}

namespace {

/// The error of a collective of rank 0 to which the others don't come, since they are in `phase` or in a barrier.
std::string error_of_rank_0(const char* phase, const std::function<void(MpiBackend&)>& collective_of_rank_0) {
  const auto backend = c10::make_intrusive<MpiBackend>(runtime().world().split(0), "lonely",
                                                       MpiBackendOptions{.timeout = std::chrono::milliseconds(300)});
  std::string message;
  const auto attempt = [&] {
    try {
      collective_of_rank_0(*backend);
    } catch (const c10::DistBackendError& error) {
      message = error.what_without_backtrace();
    }
  };
  if (runtime().rank() == 0) attempt();
  std::optional<Phase> in;
  if (phase != nullptr && runtime().rank() > 0) in.emplace(phase);
  barrier(test_support::world_tp());
  in.reset();
  if (runtime().rank() > 0) attempt();  // so that no request is open when the communicator is freed
  barrier(test_support::world_tp());
  return message;
}

}  // namespace

TEST(TimedOut, TellsWhatTheMissingRankDoes) {
  if (runtime().size() == 1) return;
  const auto message = error_of_rank_0("counting sheep", [](MpiBackend& backend) { backend.barrier({}); });
  if (runtime().rank() > 0) return;
  EXPECT_EQ(message.find("barrier of 0 elements timed out after 300 ms (group lonely, rank 0 of " +
                         fmt::to_string(runtime().size()) + "): rank 1 isn't there: in barrier number "),
            0U)
      << message;
  EXPECT_NE(message.find(", counting sheep"), std::string::npos) << message;
}

TEST(SilentRanks, AreNamedByTheirNumbersInTheWorldToo) {
  const int rank = runtime().rank();
  const auto alone = runtime().world().split(rank);
  EXPECT_EQ(silent_ranks({0}, alone.get()),
            rank == 0 ? "rank 0 is silent" : "rank 0 (of the world: " + fmt::to_string(rank) + ") is silent");
  if (runtime().size() < 4) return;
  EXPECT_EQ(silent_ranks({1, 3}, runtime().world().get()), "ranks 1 and 3 are silent");
}

}  // namespace megatron_cpp::parallel
