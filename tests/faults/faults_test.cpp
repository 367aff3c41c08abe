// Faults between ranks: wherever in a training step a rank is killed, is stopped or throws, the job ends soon, says
// whose fault it was, and leaves no process behind.
//
// How many faults are tried and their seed: FAULTS (12) and FAULTS_SEED (at random; printed). scripts/faults.sh tries
// 200.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <regex>
#include <string>

#include "tests/support/command.h"
#include "tests/support/environment.h"

namespace megatron_cpp {
namespace {

using Clock = std::chrono::steady_clock;

struct Layout {
  int ranks;
  int tp;
};

struct Fault {
  std::string kind;
  Layout layout;
  int rank;
  int64_t collective;
};

constexpr auto kTimeout = std::chrono::milliseconds(1500);
constexpr auto kEnd = std::chrono::seconds(60);  // on a busy machine, too; a quiet one takes 4

/// Which no other process has among its arguments.
std::string mark() { return "faults-test-" + std::to_string(getpid()); }

std::string command(const Fault& fault) {
  std::string text = "timeout -s KILL 120 ";
  text += test_support::mpiexec(fault.layout.ranks);
  text.append(" ")
      .append(test_support::quoted(test_support::setting("MCPP_TEST_PROGRAM")))
      .append(" ")
      .append(fault.kind);
  for (const int64_t number : {int64_t{fault.rank}, fault.collective, int64_t{fault.layout.tp}, kTimeout.count()}) {
    text.append(" ").append(std::to_string(number));
  }
  return text.append(" ").append(mark());
}

/// The collectives that a rank comes to in the steps of the program, all groups together.
int64_t num_collectives(const Layout& layout, int rank) {
  static std::map<std::array<int, 3>, int64_t> known;
  const auto [entry, is_new] = known.try_emplace({layout.ranks, layout.tp, rank}, 0);
  if (!is_new) return entry->second;
  const auto outcome = test_support::run_command(command({"none", layout, rank, -1}));
  EXPECT_EQ(outcome.status, 0) << outcome.output;
  std::smatch match;
  if (std::regex_search(outcome.output, match, std::regex("([0-9]+) collectives"))) {
    entry->second = std::stoll(match[1].str());
  }
  EXPECT_GT(entry->second, 0) << outcome.output;
  return entry->second;
}

/// Who speaks, and what about.
void expect_named(const Fault& fault, const std::string& output) {
  const auto rank = std::to_string(fault.rank);
  const auto says = [&](const std::string& pattern) {
    EXPECT_TRUE(std::regex_search(output, std::regex(pattern))) << "no " << pattern << " in\n" << output;
  };
  if (fault.kind == "kill") {
    says("process rank " + rank + " .*exited\\s+on\\s+signal 9");
  } else if (fault.kind == "throw") {
    says("error: rank " + rank + " of " + std::to_string(fault.layout.ranks) +
         " on .*: (all_reduce|all_gather|reduce_scatter|all_to_all|broadcast) of \\[.*\\] .* \\(group "
         "(tp|dp|tp_dp|world), "
         "rank [0-9]+ of [0-9]+\\) failed: a fault on purpose");
  } else {
    says(
        "(all_reduce|all_gather|reduce_scatter|all_to_all|broadcast) of [0-9]+ elements timed out after 1500 ms "
        "\\(group (tp|dp|tp_dp|world), rank [0-9]+ of [0-9]+\\): rank [0-9]");
    // The ranks that wait for it may have others waiting for them: all are in the report, once.
    says("What every rank is doing:\n(  rank .*\n)*  rank " + rank + ": silent \\(stopped\\)\n");
    EXPECT_EQ(test_support::occurrences(output, "What every rank is doing"), 1) << output;
  }
}

}  // namespace

TEST(Faults, EndTheJobAndAreNamed) {
  const char* count = std::getenv("FAULTS");
  const char* seed_text = std::getenv("FAULTS_SEED");
  const int num_faults = count == nullptr ? 12 : std::stoi(count);
  const unsigned seed = seed_text == nullptr ? std::random_device{}() : static_cast<unsigned>(std::stoul(seed_text));
  std::printf("FAULTS_SEED=%u\n", seed);
  std::mt19937 random(seed);
  const auto below = [&](int64_t end) { return std::uniform_int_distribution<int64_t>(0, end - 1)(random); };

  constexpr std::array<Layout, 3> kLayouts = {{{2, 2}, {2, 1}, {4, 2}}};
  constexpr std::array<const char*, 3> kKinds = {"kill", "stop", "throw"};
  std::map<std::string, double> longest;
  for (int i = 0; i < num_faults && !testing::Test::HasFailure(); ++i) {
    const auto layout = kLayouts[static_cast<size_t>(below(kLayouts.size()))];
    const auto rank = static_cast<int>(below(layout.ranks));
    const Fault fault{kKinds[static_cast<size_t>(i) % kKinds.size()], layout, rank,
                      below(num_collectives(layout, rank))};
    SCOPED_TRACE(command(fault));
    const auto start = Clock::now();
    const auto outcome = test_support::run_command(command(fault));
    const auto took = Clock::now() - start;
    EXPECT_GT(outcome.status, 0) << outcome.output;
    EXPECT_LT(took, kEnd + (fault.kind == "stop" ? kTimeout : std::chrono::milliseconds(0)));
    expect_named(fault, outcome.output);
    test_support::expect_no_process_left(mark());
    auto& most = longest[fault.kind];
    most = std::max(most, std::chrono::duration<double>(took).count());
  }
  for (const auto& [kind, seconds] : longest) std::printf("%s: ended within %.1f s\n", kind.c_str(), seconds);
}

}  // namespace megatron_cpp
