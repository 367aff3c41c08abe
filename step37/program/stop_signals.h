// Signals that ask a training run to stop.
#pragma once

#include <csignal>
#include <cstdint>
#include <vector>

namespace megatron_cpp::step37 {

/// The exit status of a run that was asked to stop and has saved a checkpoint: start it again, and it goes on.
/// (sysexits.h calls it EX_TEMPFAIL.)
inline constexpr int kInterruptedStatus = 75;

/// What a signal means.
enum class SignalMeaning {
  kStop,   ///< the first: finish the step and save
  kAgain,  ///< the same request a second time: a launcher and a terminal both pass it on
  kEnd,    ///< a further one: end at once
};

/// What a signal means `now`, if the first came at `first` (0: none has). Times in nanoseconds.
SignalMeaning meaning_of_signal(int64_t first, int64_t now);

/// While it lives, the first SIGTERM, SIGINT or SIGUSR1 of this process is noted instead of ending it; one that comes
/// more than a tenth of a second later ends it at once, as that signal does by itself. SIGUSR1 is for launchers, which
/// end their ranks at the other two, but pass this one on. A signal that was ignored before stays ignored. One at a
/// time.
class StopSignals {
 public:
  StopSignals();
  ~StopSignals();
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;

  /// The number of the signal that asked this process to stop; 0: none has.
  static int received();

 private:
  struct Former {
    int signal;
    struct sigaction action;
  };
  std::vector<Former> former_;
};

}  // namespace megatron_cpp::step37
