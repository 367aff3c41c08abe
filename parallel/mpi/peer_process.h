// Whether the process of another rank is there, for those who wait for it.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "parallel/mpi/mpi_communicator.h"

namespace megatron_cpp::parallel {

/// Tells one process of a job from all others, on any host and in any container.
struct PeerProcess {
  uint64_t place = 0;  ///< of the processes that can look at each other: a hash of the machine and its PID namespace
  int64_t pid = 0;     ///< there
  int64_t start = 0;   ///< when it was started, in ticks since the machine was: a PID is given out again
};

/// This process. Not collective.
PeerProcess own_process();

/// The processes of a communicator's ranks. Collective over it.
std::vector<PeerProcess> processes_of(const MpiCommunicator& communicator);

/// What /proc says of a process at one moment.
struct ProcessLook {
  char state = '?';                       ///< R: runs or would, S: sleeps, T and t: stopped, Z and X: gone
  std::chrono::milliseconds cpu_time{0};  ///< of all its threads, since it began
  int64_t start = 0;                      ///< as PeerProcess::start
};

/// Reads the text of /proc/PID/stat; none if it isn't one. Pure.
/// @param ticks_per_second  what sysconf(_SC_CLK_TCK) says.
std::optional<ProcessLook> parse_process_stat(const std::string& text, int64_t ticks_per_second);

/// Decides when a rank that should answer is waited for no longer. How long that takes on a busy machine depends on the
/// machine, so on one host what counts is what the process does with the time it gets: one that waits for its peers
/// runs, or would, and answers within milliseconds of it.
class PeerPatience {
 public:
  using Clock = std::chrono::steady_clock;

  /// @param peer   whom to wait for.
  /// @param begin  when it was asked.
  PeerPatience(const PeerProcess& peer, Clock::time_point begin);

  /// Looks at the process. True once it is over: the process is stopped or gone, or has spent a second of computing, or
  /// two asleep, on something else than the answer. Of another host nothing is seen: after ten seconds.
  bool is_over(Clock::time_point now);

  /// The decision alone. Pure.
  /// @param first           what was seen when it was asked, if the process can be seen from here.
  /// @param now             what is seen now; none: it is gone.
  /// @param always_asleep   whether every look so far has found it asleep.
  static bool is_over(const ProcessLook& first, const std::optional<ProcessLook>& now, std::chrono::milliseconds waited,
                      bool always_asleep);

 private:
  PeerProcess peer_;
  Clock::time_point begin_;
  bool is_here_;  ///< where this process is, so that it can be looked at
  std::optional<ProcessLook> first_;
  bool always_asleep_ = true;
};

}  // namespace megatron_cpp::parallel
