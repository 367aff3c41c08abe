// How a program on Runtime::run ends, with mpirun on two ranks and alone: its status, what it says, and that
// nothing of it stays.
#include "parallel/runtime.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <string>
#include <utility>

#include "parallel/host_name.h"
#include "tests/support/command.h"
#include "tests/support/environment.h"

namespace megatron_cpp::parallel {
namespace {

using namespace test_support;

/// Which no other process has among its arguments.
std::string mark_of(const std::string& mode) { return "runtime-test-" + std::to_string(getpid()) + "-" + mode; }

std::string program(const std::string& mode) {
  auto command = quoted(test_support::setting("MCPP_TEST_PROGRAM"));
  return command.append(" ").append(mode).append(" ").append(mark_of(mode));
}

Outcome start(const std::string& mode) {
  return test_support::run_command(test_support::mpiexec(2) + " " + program(mode));
}

}  // namespace

TEST(Runtime, EndsWell) {
  const auto outcome = start("fine");
  EXPECT_EQ(outcome.status, 0) << outcome.output;
  EXPECT_EQ(occurrences(outcome.output, "rank 0: the sum is 6\n"), 1) << outcome.output;
  EXPECT_EQ(occurrences(outcome.output, "rank 1: the sum is 6\n"), 1) << outcome.output;
  test_support::expect_no_process_left(mark_of("fine"));
}

TEST(Runtime, IsOneRankWithoutMpirun) {
  const auto outcome = test_support::run_command(program("fine"));
  EXPECT_EQ(outcome.status, 0);
  EXPECT_EQ(outcome.output, "rank 0: the sum is 3\n");
  const auto thrown = test_support::run_command(program("all_throw"));
  EXPECT_EQ(thrown.status, 1);
  EXPECT_EQ(thrown.output, "error: the same on every rank\n");
}

TEST(Runtime, HandsTheStatusOn) {
  const auto outcome = start("status");
  EXPECT_EQ(outcome.status, 3) << outcome.output;
  test_support::expect_no_process_left(mark_of("status"));
}

TEST(Runtime, EndsWithTheStatusOfAnError) {
  for (const auto& [mode, status] : {std::pair{"all_throw_a_status", 71}, {"one_throws_a_status", 74}}) {
    const auto outcome = start(mode);
    EXPECT_EQ(outcome.status, status) << outcome.output;
    test_support::expect_no_process_left(mark_of(mode));
  }
}

TEST(Runtime, SaysOnceWhatEveryRankThrows) {
  const auto outcome = start("all_throw");
  EXPECT_GT(outcome.status, 0) << outcome.output;
  EXPECT_EQ(occurrences(outcome.output, "the same on every rank"), 1) << outcome.output;
  EXPECT_EQ(occurrences(outcome.output, "error: the same on every rank\n"), 1) << outcome.output;
  EXPECT_EQ(occurrences(outcome.output, "MPI_ABORT"), 0) << outcome.output;
  test_support::expect_no_process_left(mark_of("all_throw"));
}

TEST(Runtime, NamesTheRankThatThrowsWhileOthersWait) {
  const auto outcome = start("one_throws");
  EXPECT_GT(outcome.status, 0) << outcome.output;
  EXPECT_EQ(occurrences(outcome.output, "error: rank 1 of 2 on " + host_name() + ": only here\n"), 1) << outcome.output;
  EXPECT_EQ(occurrences(outcome.output, "only here"), 1) << outcome.output;
  EXPECT_EQ(occurrences(outcome.output, "the sum is"), 0) << outcome.output;
  test_support::expect_no_process_left(mark_of("one_throws"));
}

TEST(Runtime, EndsWhenRanksThrowDifferently) {
  const auto outcome = start("each_throws_its_own");
  EXPECT_GT(outcome.status, 0) << outcome.output;
  EXPECT_GE(occurrences(outcome.output, "this is number "), 1) << outcome.output;
  test_support::expect_no_process_left(mark_of("each_throws_its_own"));
}

TEST(Runtime, EndsWhenARankIsKilledWhileOthersWait) {
  const auto outcome = start("one_is_killed");
  EXPECT_NE(outcome.status, 0) << outcome.output;
  EXPECT_EQ(occurrences(outcome.output, "the sum is"), 0) << outcome.output;
  test_support::expect_no_process_left(mark_of("one_is_killed"));
}

}  // namespace megatron_cpp::parallel
