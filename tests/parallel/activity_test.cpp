// What a process says it is doing.
#include "parallel/activity.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>

#include "parallel/collectives.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::parallel {
namespace {

using internal::InCollective;
using internal::own_activity;
using internal::Sizes;

internal::CollectiveRecord collective(const std::string& operation, int64_t number, int64_t elements,
                                      int64_t milliseconds) {
  internal::CollectiveRecord record{.number = number, .elements = elements, .milliseconds = milliseconds};
  operation.copy(record.operation.data(), record.operation.size() - 1);
  std::string("dp").copy(record.group.data(), 2);
  return record;
}

}  // namespace

TEST(Activity, NamesTheInnermostPhase) {
  EXPECT_STREQ(own_activity().phase.data(), "");
  {
    const Phase outer("validating");
    EXPECT_EQ(in_phase("decoding pictures", [] { return std::string(own_activity().phase.data()); }),
              "decoding pictures");
    EXPECT_STREQ(own_activity().phase.data(), "validating");
    EXPECT_THROW(in_phase("failing", [] { throw std::runtime_error("on purpose"); }), std::runtime_error);
    EXPECT_STREQ(own_activity().phase.data(), "validating");
  }
  EXPECT_STREQ(own_activity().phase.data(), "");
}

TEST(Activity, CutsLongNames) {
  const std::string name(100, 'x');
  const Phase phase(name.c_str());
  EXPECT_EQ(own_activity().phase.data(), name.substr(0, 47));
}

TEST(Activity, NamesThePhaseOfAnotherThread) {
  std::atomic<bool> has_begun = false;
  std::atomic<bool> may_end = false;
  std::thread other([&] {
    const Phase phase("decoding pictures");
    has_begun = true;
    while (!may_end) std::this_thread::yield();
  });
  while (!has_begun) std::this_thread::yield();
  EXPECT_STREQ(own_activity().other_phase.data(), "decoding pictures");
  EXPECT_STREQ(own_activity().phase.data(), "");
  may_end = true;
  other.join();
  EXPECT_STREQ(own_activity().other_phase.data(), "");
}

TEST(Activity, CountsTheCollectivesOfAGroup) {
  internal::know_group("counted", 3);
  {
    const InCollective first("counted", "all_gather", 5, Sizes::kMayDiffer);
    const InCollective inside("counted", "all_to_all", 7, Sizes::kEqual);  // the backend's, for instance
    EXPECT_EQ(first.number(), 0);
    EXPECT_EQ(inside.number(), std::nullopt);
    const auto current = own_activity().current;
    EXPECT_EQ(to_text(current), "all_gather number 0 of counted, 5 elements");
    EXPECT_EQ(current.first_rank, 3);
    EXPECT_TRUE(current.sizes_may_differ);
  }
  EXPECT_EQ(own_activity().current.number, -1);
  { const InCollective second("counted", "barrier", 0, Sizes::kEqual); }
  {
    const InCollective waiting("counted", "all_gather", 5, Sizes::kMayDiffer, 0);  // for the first
    EXPECT_EQ(to_text(own_activity().current), "all_gather number 0 of counted, 5 elements");
  }
  EXPECT_EQ(to_text(own_activity().latest.front()), "barrier number 1 of counted");
  internal::know_group("counted", 3);
  EXPECT_EQ(InCollective("counted", "barrier", 0, Sizes::kEqual).number(), 0);
}

// Over whatever backend: MPI, one like NCCL, staged.
TEST(Activity, KnowsTheCollectivesOfTheLibrary) {
  if (test_support::runtime().size() == 1) return;
  const auto& group = test_support::world_tp();
  barrier(group);
  const auto before = own_activity().latest.front().number;
  EXPECT_EQ(to_text(own_activity().latest.front()), "barrier number " + fmt::to_string(before) + " of tp");
  auto pending = start_all_gather(at::ones({3}), group);
  all_reduce(at::ones({5}), group);
  EXPECT_EQ(to_text(own_activity().latest.front()),
            "all_reduce number " + fmt::to_string(before + 2) + " of tp, 5 elements");
  pending.wait();
  EXPECT_EQ(own_activity().latest.front().number, before + 2);
  EXPECT_EQ(own_activity().latest.front().first_rank, 0);
  EXPECT_EQ(own_activity().current.number, -1);
}

TEST(Activity, KnowsSinceWhenNoCollectiveIsMovingInTraining) {
  { const InCollective any("counted", "barrier", 0, Sizes::kEqual); }
  EXPECT_FALSE(internal::last_collective_event()) << "there is no step";
  set_step(7);
  const auto last = internal::last_collective_event();
  EXPECT_TRUE(last);
  in_phase("reading", [&] { EXPECT_EQ(internal::last_collective_event(), last); });
  { const InCollective any("counted", "barrier", 0, Sizes::kEqual); }
  EXPECT_GT(internal::last_collective_event(), last);
  EXPECT_EQ(own_activity().step, 7);
  set_step(-1);
  EXPECT_FALSE(internal::last_collective_event());
}

TEST(Activity, IsOneLine) {
  internal::Activity activity;
  EXPECT_EQ(to_text(activity), "computing");
  activity.step = 118;
  activity.latest[0] = collective("all_reduce", 5121, 4096, 64'000);
  EXPECT_EQ(to_text(activity),
            "computing, step 118; last collective: all_reduce number 5121 of dp, 4096 elements, 64 s ago");
  std::string("waiting for pictures").copy(activity.phase.data(), 47);
  activity.phase_milliseconds = 63'400;
  std::string("decoding pictures").copy(activity.other_phase.data(), 47);
  activity.other_phase_milliseconds = 2'100;
  EXPECT_EQ(to_text(activity),
            "waiting for pictures for 63 s, step 118; another thread: decoding pictures for 2.1 s; last collective: "
            "all_reduce number 5121 of dp, 4096 elements, 64 s ago");
  activity.other_phase = {};
  activity.current = collective("barrier", 5122, 0, 60'000);
  EXPECT_EQ(to_text(activity), "in barrier number 5122 of dp, for 60 s, waiting for pictures, step 118");
}

}  // namespace megatron_cpp::parallel
