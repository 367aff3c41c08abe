// A job in which one rank is stuck ends with one report that says what every rank is doing, with mpirun on two and four
// ranks and over the backends of the tests.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <regex>
#include <string>

#include "tests/support/command.h"
#include "tests/support/environment.h"

namespace megatron_cpp::parallel {
namespace {

using namespace test_support;

/// Which no other process has among its arguments.
std::string mark() { return "stall-test-" + fmt::to_string(getpid()); }

/// Rank `rank` is stuck in the way that `kind` names (stall_program.cpp).
std::string output_of(const std::string& kind, int ranks, int rank, const std::string& backend) {
  setenv("TEST_BACKEND", backend.c_str(), 1);
  auto command = "timeout -s KILL 120 " + mpiexec(ranks);
  command.append(" ").append(quoted(setting("MCPP_TEST_PROGRAM"))).append(" ").append(kind);
  command.append(" ").append(fmt::to_string(rank)).append(" 1000 ").append(mark());
  const auto outcome = run_command(command);
  EXPECT_GT(outcome.status, 0) << outcome.output;
  expect_no_process_left(mark());
  return outcome.output;
}

void expect_once(const std::string& output, const std::string& pattern) {
  const std::regex expression(pattern);
  const auto count = std::distance(std::sregex_iterator(output.begin(), output.end(), expression), {});
  EXPECT_EQ(count, 1) << pattern << " in\n" << output;
}

/// One report, with one line of each rank.
void expect_one_report(const std::string& output, int ranks) {
  expect_once(output, "What every rank is doing:\n");
  for (int rank = 0; rank < ranks; ++rank) expect_once(output, "\n  rank " + fmt::to_string(rank) + "[ :][^\n]*\n");
}

const char kSeconds[] = "[0-9.]+ s";

std::string line(int rank, const std::string& rest) {
  return "\n  rank " + fmt::to_string(rank) + " \\(host [^ )]+\\): " + rest + "\n";
}

const std::string kWaits =
    std::string("in all_reduce number 1 of tp, 50000 elements, for ") + kSeconds + ", training, step 118";

}  // namespace

class StallOverBackend : public testing::TestWithParam<const char*> {};

TEST(Stall, OnTheHost) {
  const auto output = output_of("phase", 2, 1, "like_nccl");
  expect_one_report(output, 2);
  expect_once(output, line(0, kWaits));
  expect_once(output, line(1, std::string("counting sheep for ") + kSeconds +
                                  ", step 118; last collective: all_reduce number 0 of tp, 50000 elements, " +
                                  kSeconds + " ago"));
  expect_once(output,
              "all_reduce of 50000 elements timed out after 1000 ms \\(group tp, rank 0 of 2\\): rank 1 isn't there: "
              "counting sheep for ");
}

TEST(Stall, Stopped) {
  const auto output = output_of("stop", 4, 2, "staged");
  expect_one_report(output, 4);
  expect_once(output, "\n  rank 2: silent \\(stopped\\)\n");
  for (const int rank : {0, 1, 3}) expect_once(output, line(rank, kWaits));
}

TEST(Stall, OfTheRankThatWouldCollect) {
  const auto output = output_of("stop", 2, 0, "");
  expect_one_report(output, 2);
  expect_once(output, "\n  rank 0: silent \\(stopped\\)\n");
}

TEST(Stall, StoppedWhenTheOthersEndMpi) {
  for (const int rank : {0, 2}) {
    const auto output = output_of("end", 3, rank, "");
    expect_once(output, fmt::format("error: rank {} of 3 on [^ ]+: rank {} is stopped by a signal, and MPI can't end",
                                    rank == 0 ? 1 : 0, rank));
  }
}

TEST_P(StallOverBackend, InAnotherCollective) {
  const auto output = output_of("gather", 2, 0, GetParam());
  expect_one_report(output, 2);
  expect_once(output,
              "\n  ranks 0 and 1 differ: all_gather number 1 of tp, 12 elements; all_reduce number 1 of tp, "
              "50000 elements\n");
}

// Those that pass less have what they need, and go on.
TEST(Stall, WithMoreElements) {
  const auto output = output_of("size", 2, 1, "");
  expect_one_report(output, 2);
  expect_once(output, line(0, std::string("in barrier number 2 of tp, for ") + kSeconds + ", training, step 118"));
  expect_once(output,
              "\n  ranks 0 and 1 differ: all_reduce number 1 of tp, 50000 elements; all_reduce number 1 of tp, "
              "200000 elements\n");
}

INSTANTIATE_TEST_SUITE_P(Backends, StallOverBackend, testing::Values("", "like_nccl", "staged"));

TEST(StallWatch, SeesAJobInWhichNoRankIsInACollective) {
  const auto output = output_of("watched", 2, 1, "");
  const auto rest = std::string(" for ") + kSeconds +
                    ", step 118; last collective: all_reduce number 1 of tp, 50000 elements, " + kSeconds + " ago";
  // The other rank may print a report of its own, as the program ends while it looks.
  for (const auto& own : {line(0, "training" + rest), line(1, "counting sheep" + rest)}) {
    EXPECT_TRUE(std::regex_search(output, std::regex(own))) << own << " in\n" << output;
  }
}

}  // namespace megatron_cpp::parallel
