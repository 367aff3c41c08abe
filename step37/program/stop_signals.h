// Signals that ask a training run to stop.
#pragma once

#include <csignal>
#include <cstdint>
#include <vector>

namespace megatron_cpp::step37 {

/// What a signal means.
enum class SignalMeaning {
  kStop,   ///< the first signal: finish the step and save
  kAgain,  ///< the same request again, because both a launcher and a terminal passed it on: ignore it
  kEnd,    ///< a second request: end at once
};

/// The meaning of a signal at time `now`, if the first one came at `first` (0: none yet). Times in nanoseconds.
SignalMeaning meaning_of_signal(int64_t first, int64_t now);

/// While an object lives, the first SIGTERM, SIGINT or SIGUSR1 is noted instead of ending the process; one that comes
/// more than a tenth of a second later ends the process at once. SIGUSR1 is for launchers: at the other two they kill
/// their ranks, but they pass this one on. A signal that was ignored before stays ignored. One object at a time.
class StopSignals {
 public:
  StopSignals();
  ~StopSignals();
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;

  /// The number of the signal that asked this process to stop; 0: none.
  static int received();

 private:
  struct Former {
    int signal;
    struct sigaction action;
  };
  std::vector<Former> former_;
};

}  // namespace megatron_cpp::step37
