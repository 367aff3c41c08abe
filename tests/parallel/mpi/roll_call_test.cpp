// Who is missing from a collective that has timed out, as the others find out.
#include "parallel/mpi/roll_call.h"

#include <gtest/gtest.h>

#include <string>

#include "parallel/collectives.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::parallel {
namespace {

using test_support::runtime;

/// The group's `number`th call.
CollectiveCall call(const char* operation, int64_t elements, int64_t number, RollCall& roll_call) {
  return {operation, elements,  std::chrono::milliseconds(300), "group test", runtime().world().get(),
          number,    &roll_call};
}

}  // namespace

TEST(RollCall, AllThatWaitInTheSameAreNotBlamed) {
  RollCall roll_call(runtime().world());
  EXPECT_EQ(roll_call.reason(call("all_reduce", 5, 7, roll_call)),
            "every rank waits in it, so the messages between them are lost or too slow");
}

TEST(RollCall, WhoDoesNotAnswerIsSilent) {
  const int t = runtime().size();
  if (t == 1) return;
  RollCall roll_call(runtime().world());
  if (runtime().rank() != t - 1) {
    EXPECT_EQ(roll_call.reason(call("all_reduce", 5, 7, roll_call)), "rank " + std::to_string(t - 1) + " is silent");
  }
  barrier(test_support::world_tp());
}

TEST(RollCall, WhoWaitsElsewhereSaysWhere) {
  const int t = runtime().size();
  if (t == 1) return;
  RollCall roll_call(runtime().world());
  const bool is_odd = runtime().rank() == t - 1;
  const auto reason =
      roll_call.reason(is_odd ? call("all_gather", 12, 7, roll_call) : call("all_reduce", 5, 7, roll_call));
  EXPECT_EQ(reason, is_odd ? "rank 0 waits in all_reduce of 5 elements"
                           : "rank " + std::to_string(t - 1) + " waits in all_gather of 12 elements");
}

// A question of a collective that was given up stays in the mail; it must not pass for presence in the next one.
TEST(RollCall, AnOldQuestionIsNoAnswer) {
  const int t = runtime().size();
  if (t == 1) return;
  RollCall roll_call(runtime().world());
  const bool is_last = runtime().rank() == t - 1;
  if (is_last) roll_call.reason(call("barrier", 0, 3, roll_call));
  barrier(test_support::world_tp());
  if (!is_last) {
    EXPECT_EQ(roll_call.reason(call("all_reduce", 5, 4, roll_call)), "rank " + std::to_string(t - 1) + " is silent");
  }
  barrier(test_support::world_tp());
}

TEST(SilentRanks, AreNamedByTheirNumbersInTheWorldToo) {
  const int rank = runtime().rank();
  const auto alone = runtime().world().split(rank);
  EXPECT_EQ(silent_ranks({0}, alone.get()),
            rank == 0 ? "rank 0 is silent" : "rank 0 (of the world: " + std::to_string(rank) + ") is silent");
  if (runtime().size() < 4) return;
  EXPECT_EQ(silent_ranks({1, 3}, runtime().world().get()), "ranks 1 and 3 are silent");
}

}  // namespace megatron_cpp::parallel
