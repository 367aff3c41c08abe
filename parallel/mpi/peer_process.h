// Whether another rank's process still runs, to decide how long to wait for it.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "parallel/mpi/mpi_communicator.h"

namespace megatron_cpp::parallel {

/// Identifies one process of a job, on any host and in any container.
struct PeerProcess {
  uint64_t place = 0;  ///< hash of boot id and PID namespace: equal for processes that see each other in /proc
  int64_t pid = 0;     ///< in that namespace
  int64_t start = 0;   ///< when it was started, in ticks since boot: PIDs are reused
};

/// This process. Not collective.
PeerProcess own_process();

/// The processes of a communicator's ranks. Collective over it.
std::vector<PeerProcess> processes_of(const MpiCommunicator& communicator);

/// What /proc says of a process at one moment.
struct ProcessLook {
  char state = '?';                       ///< R: running or runnable, S: sleeps, T and t: stopped, Z and X: gone
  std::chrono::milliseconds cpu_time{0};  ///< of all its threads, since it began
  int64_t start = 0;                      ///< as PeerProcess::start
};

/// Parses the text of /proc/PID/stat; nothing if it has another form. Pure.
/// @param ticks_per_second  what sysconf(_SC_CLK_TCK) says.
std::optional<ProcessLook> parse_process_stat(const std::string& text, int64_t ticks_per_second);

/// ProcessLook::state of a process now, 'X' if there is no such process any more; nothing if it can't be seen from
/// here.
std::optional<char> state_of(const PeerProcess& peer);

/// Decides when to stop waiting for a rank that should answer. The time until the answer depends on how busy the
/// machine is, so on one host the state of the process counts, too: one that waits for its peers is runnable, and
/// answers within milliseconds of CPU time.
class PeerPatience {
 public:
  using Clock = std::chrono::steady_clock;

  /// @param peer   the process to wait for.
  /// @param begin  when it was asked to answer.
  PeerPatience(const PeerProcess& peer, Clock::time_point begin);

  /// Looks at the process. True if waiting should stop: the process is stopped or gone; or, after two seconds, it has
  /// used a second of CPU time or has slept nearly all the time; or 60 seconds have passed. A process that can't be
  /// seen from here (another host or container) is given ten seconds.
  bool is_over(Clock::time_point now);

  /// "stopped" or "gone" if the last is_over() has seen that; otherwise "".
  std::string_view seen() const { return seen_; }

  /// The decision alone. Pure.
  /// @param first           what was seen when it was asked to answer.
  /// @param now             what is seen now; nothing if it is gone.
  /// @param mostly_asleep   whether nine of ten looks so far have found it asleep.
  static bool is_over(const ProcessLook& first, const std::optional<ProcessLook>& now, std::chrono::milliseconds waited,
                      bool mostly_asleep);

 private:
  PeerProcess peer_;
  Clock::time_point begin_;
  bool is_here_;  ///< whether the process can be seen from here
  std::optional<ProcessLook> first_;
  std::string_view seen_;
  int64_t num_looks_ = 0;
  int64_t num_asleep_ = 0;  ///< of these looks
};

}  // namespace megatron_cpp::parallel
