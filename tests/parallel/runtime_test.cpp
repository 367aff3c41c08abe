// How a program on parallel::Runtime::run ends, with mpirun on two ranks and alone: its status, what it says, and that
// nothing of it stays.
#include "parallel/runtime.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>

#include "tests/support/command.h"

namespace {

using test_support::occurrences;
using test_support::Outcome;
using test_support::quoted;

/// Which no other process has among its arguments.
std::string mark_of(const std::string& mode) { return "runtime-test-" + std::to_string(getpid()) + "-" + mode; }

std::string program(const std::string& mode) {
  auto command = quoted(MCPP_RUNTIME_PROGRAM);
  return command.append(" ").append(mode).append(" ").append(mark_of(mode));
}

Outcome start(const std::string& mode) {
  auto command = quoted(MCPP_MPIEXEC);
  return test_support::run_command(command.append(" " MCPP_MPIEXEC_FLAGS " ").append(program(mode)));
}

/// Processes with `mark` among their arguments.
int processes_with(const std::string& mark) {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    const auto name = entry.path().filename().string();
    if (!std::all_of(name.begin(), name.end(), [](unsigned char letter) { return std::isdigit(letter) != 0; }))
      continue;
    std::ifstream file(entry.path() / "cmdline", std::ios::binary);
    const std::string arguments(std::istreambuf_iterator<char>(file), {});
    if (arguments.find(mark) != std::string::npos) ++count;
  }
  return count;
}

/// mpirun's daemons may take a moment to end what they started.
void expect_no_process_left(const std::string& mode) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(5);
  while (processes_with(mark_of(mode)) > 0 && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  EXPECT_EQ(processes_with(mark_of(mode)), 0);
}

std::string host_name() {
  std::array<char, 256> host{};
  gethostname(host.data(), host.size() - 1);
  return host.data();
}

}  // namespace

TEST(Runtime, EndsWell) {
  const auto outcome = start("fine");
  EXPECT_EQ(outcome.status, 0) << outcome.output;
  EXPECT_EQ(occurrences(outcome.output, "rank 0: the sum is 6\n"), 1) << outcome.output;
  EXPECT_EQ(occurrences(outcome.output, "rank 1: the sum is 6\n"), 1) << outcome.output;
  expect_no_process_left("fine");
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
  expect_no_process_left("status");
}

TEST(Runtime, SaysOnceWhatEveryRankThrows) {
  const auto outcome = start("all_throw");
  EXPECT_GT(outcome.status, 0) << outcome.output;
  EXPECT_EQ(occurrences(outcome.output, "the same on every rank"), 1) << outcome.output;
  EXPECT_EQ(occurrences(outcome.output, "error: the same on every rank\n"), 1) << outcome.output;
  EXPECT_EQ(occurrences(outcome.output, "MPI_ABORT"), 0) << outcome.output;
  expect_no_process_left("all_throw");
}

TEST(Runtime, NamesTheRankThatThrowsWhileOthersWait) {
  const auto outcome = start("one_throws");
  EXPECT_GT(outcome.status, 0) << outcome.output;
  EXPECT_EQ(occurrences(outcome.output, "error: rank 1 of 2 on " + host_name() + ": only here\n"), 1) << outcome.output;
  EXPECT_EQ(occurrences(outcome.output, "only here"), 1) << outcome.output;
  EXPECT_EQ(occurrences(outcome.output, "the sum is"), 0) << outcome.output;
  expect_no_process_left("one_throws");
}

TEST(Runtime, EndsWhenRanksThrowDifferently) {
  const auto outcome = start("each_throws_its_own");
  EXPECT_GT(outcome.status, 0) << outcome.output;
  EXPECT_GE(occurrences(outcome.output, "this is number "), 1) << outcome.output;
  expect_no_process_left("each_throws_its_own");
}

TEST(Runtime, EndsWhenARankIsKilledWhileOthersWait) {
  const auto outcome = start("one_is_killed");
  EXPECT_NE(outcome.status, 0) << outcome.output;
  EXPECT_EQ(occurrences(outcome.output, "the sum is"), 0) << outcome.output;
  expect_no_process_left("one_is_killed");
}
