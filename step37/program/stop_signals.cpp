#include "step37/program/stop_signals.h"

#include <c10/util/Exception.h>

#include <atomic>
#include <ctime>

namespace megatron_cpp::step37 {
namespace {

// Lock-free atomics, the only variables that a signal handler may use.
std::atomic<int> stop_signal{0};
std::atomic<int64_t> first_time{0};
static_assert(std::atomic<int>::is_always_lock_free && std::atomic<int64_t>::is_always_lock_free);

int64_t nanoseconds() {
  timespec time{};
  clock_gettime(CLOCK_MONOTONIC, &time);
  return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

void handle(int signal) {
  const int64_t now = nanoseconds();
  int64_t first = 0;
  if (first_time.compare_exchange_strong(first, now)) {
    stop_signal = signal;
  } else if (meaning_of_signal(first, now) == SignalMeaning::kEnd) {
    std::signal(signal, SIG_DFL);
    std::raise(signal);  // takes effect when this handler returns
  }
}

}  // namespace

SignalMeaning meaning_of_signal(int64_t first, int64_t now) {
  constexpr int64_t kSameRequest = 100'000'000;
  if (first == 0) return SignalMeaning::kStop;
  return now - first > kSameRequest ? SignalMeaning::kEnd : SignalMeaning::kAgain;
}

StopSignals::StopSignals() {
  stop_signal = 0;
  first_time = 0;
  for (const int signal : {SIGTERM, SIGINT, SIGUSR1}) {
    struct sigaction action {};
    action.sa_handler = handle;
    action.sa_flags = SA_RESTART;
    sigemptyset(&action.sa_mask);
    struct sigaction before {};
    TORCH_INTERNAL_ASSERT(sigaction(signal, nullptr, &before) == 0);
    if (before.sa_handler == SIG_IGN) continue;
    TORCH_INTERNAL_ASSERT(sigaction(signal, &action, nullptr) == 0);
    former_.push_back({signal, before});
  }
}

StopSignals::~StopSignals() {
  for (const auto& [signal, action] : former_) sigaction(signal, &action, nullptr);
}

int StopSignals::received() { return stop_signal; }

}  // namespace megatron_cpp::step37
