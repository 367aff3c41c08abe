// What this process is doing, for the report on a stalled job (mpi/stall_watch.h).
//
// The record belongs to the process, not to a runtime or a group: whoever asks wants to know where the process hangs,
// whatever it has called. It is written by all threads, behind one lock; an entry costs a fraction of a microsecond.
// Nothing here communicates.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace megatron_cpp::parallel {

/// While an object lives, its thread is in a phase of work on the host: "decoding pictures". Phases nest, and end in
/// the reverse order. For what may take longer than a collective may wait: reading, saving, decoding.
class Phase {
 public:
  /// @param name  a text that is never freed, such as a literal; 47 letters of it are shown.
  explicit Phase(const char* name);
  ~Phase();
  Phase(const Phase&) = delete;
  Phase& operator=(const Phase&) = delete;
};

/// What `action` returns, called in a Phase of this name.
template <class Action>
decltype(auto) in_phase(const char* name, const Action& action) {
  const Phase phase(name);
  return action();
}

/// Sets the training step that this process is at. A training loop calls it as each step begins.
/// @param step  -1: none, as at the start.
void set_step(int64_t step);

namespace internal {

/// Whether the ranks of a group pass the same number of elements to a collective.
enum class Sizes { kEqual, kMayDiffer };

/// Makes a group known, whose number of collectives begins at 0.
/// @param first_rank  of the world: tells groups of one name apart.
void know_group(std::string_view group, int first_rank);

/// While an object lives, this thread is in a collective. One inside another on the same thread, such as a backend's
/// inside a layer's, is the same collective and isn't recorded.
class InCollective {
 public:
  /// @param group     its name.
  /// @param elements  that this rank passes.
  /// @param number    of an earlier collective of the group, which this thread now waits for; nothing: the group's
  /// next.
  InCollective(const std::string& group, const char* operation, int64_t elements, Sizes sizes,
               std::optional<int64_t> number = std::nullopt);
  ~InCollective();
  InCollective(const InCollective&) = delete;
  InCollective& operator=(const InCollective&) = delete;

  /// The collective's number in its group, counted from 0: the same on every rank. Nothing if it isn't recorded.
  std::optional<int64_t> number() const { return number_; }

 private:
  std::optional<int64_t> number_;
};

/// One collective; texts end in 0. Sent between ranks as it is.
struct CollectiveRecord {
  std::array<char, 32> group{};
  std::array<char, 24> operation{};
  int64_t number = -1;            ///< -1: there is none
  int64_t elements = 0;           ///< that the rank passes
  int64_t milliseconds = 0;       ///< since it began
  int32_t first_rank = -1;        ///< of its group, in the world; -1: unknown
  bool sizes_may_differ = false;  ///< Sizes::kMayDiffer
};

/// What a process is doing at one moment. Sent between ranks as it is.
struct Activity {
  std::array<char, 64> host{};
  int64_t step = -1;                          ///< -1: none
  std::array<char, 48> phase{};               ///< innermost one of the main thread; empty: none
  int64_t phase_milliseconds = 0;             ///< since it began
  std::array<char, 48> other_phase{};         ///< of another thread: the one that has lasted longest
  int64_t other_phase_milliseconds = 0;       ///< since it began
  CollectiveRecord current;                   ///< that a thread is in
  std::array<CollectiveRecord, 16> latest{};  ///< the last ones of all groups, the latest first
};

/// Of this process, now.
Activity own_activity();

/// When the last collective began or ended; nothing as long as there is no step.
std::optional<std::chrono::steady_clock::time_point> last_collective_event();

/// "decoding pictures for 63 s, step 118; last collective: all_reduce number 5121 of dp, 4096 elements, 64 s ago".
/// Pure.
std::string to_text(const Activity& activity);

/// "all_reduce number 5121 of dp, 4096 elements". Pure.
std::string to_text(const CollectiveRecord& collective);

}  // namespace internal
}  // namespace megatron_cpp::parallel
