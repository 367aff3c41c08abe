// Whether a rank that should answer is waited for, by what its process does.
#include "parallel/mpi/peer_process.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <optional>
#include <string>

namespace megatron_cpp::parallel {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

ProcessLook look(char state, milliseconds cpu_time) { return {.state = state, .cpu_time = cpu_time, .start = 1}; }

bool is_over(const std::optional<ProcessLook>& now, milliseconds waited, bool mostly_asleep = false) {
  return PeerPatience::is_over(look('R', milliseconds(0)), now, waited, mostly_asleep);
}

}  // namespace

TEST(ProcessStat, IsReadWhateverTheProgramIsCalled) {
  const auto found = parse_process_stat(
      "42 (a) R (b) T 1 42 42 0 -1 4194304 100 0 0 0 150 25 7 8 20 0 3 0 987654 1000 200 18446744073709551615", 100);
  ASSERT_TRUE(found);
  EXPECT_EQ(found->state, 'T');
  EXPECT_EQ(found->cpu_time, milliseconds(1750));
  EXPECT_EQ(found->start, 987654);
  EXPECT_FALSE(parse_process_stat("", 100));
  EXPECT_FALSE(parse_process_stat("42 (cut off) R 1 42", 100));
}

TEST(PeerPatience, IsOverAtOnceForWhoIsStoppedOrGone) {
  EXPECT_TRUE(is_over(std::nullopt, milliseconds(0)));
  for (const char state : {'T', 't', 'Z', 'X'}) EXPECT_TRUE(is_over(look(state, milliseconds(0)), milliseconds(0)));
}

TEST(PeerPatience, GoesByWhatAProcessDoesWithItsTime) {
  // A rank that gets little of a busy machine's time is waited for.
  EXPECT_FALSE(is_over(look('R', milliseconds(900)), seconds(50)));
  EXPECT_FALSE(is_over(look('R', milliseconds(0)), seconds(50)));
  EXPECT_TRUE(is_over(look('R', seconds(1)), seconds(2)));
  // Several threads use up a second in no time.
  EXPECT_FALSE(is_over(look('R', seconds(8)), milliseconds(1900)));
  // Asleep all the time: in a read, say.
  EXPECT_TRUE(is_over(look('S', milliseconds(0)), seconds(2), true));
  EXPECT_FALSE(is_over(look('S', milliseconds(0)), seconds(2), false));
  EXPECT_FALSE(is_over(look('S', milliseconds(60)), seconds(2), true));
  EXPECT_TRUE(is_over(look('R', milliseconds(0)), seconds(60)));
}

TEST(PeerPatience, SeesRealProcesses) {
  const auto own = own_process();
  EXPECT_EQ(own.pid, getpid());
  // The number was given out again: the process of that start is gone.
  PeerProcess earlier{.place = own.place, .pid = own.pid, .start = own.start - 1};
  EXPECT_TRUE(PeerPatience(earlier, PeerPatience::Clock::now()).is_over(PeerPatience::Clock::now()));
  PeerPatience of_this(own, PeerPatience::Clock::now());
  EXPECT_FALSE(of_this.is_over(PeerPatience::Clock::now()));
  PeerProcess elsewhere{.place = own.place + 1, .pid = own.pid, .start = own.start};
  const auto begin = PeerPatience::Clock::now();
  PeerPatience of_another_host(elsewhere, begin);
  EXPECT_FALSE(of_another_host.is_over(begin + seconds(9)));
  EXPECT_TRUE(of_another_host.is_over(begin + seconds(10)));
}

}  // namespace megatron_cpp::parallel
