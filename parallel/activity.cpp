#include "parallel/activity.h"

#include <fmt/format.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "parallel/host_name.h"

namespace megatron_cpp::parallel {
namespace {

using internal::CollectiveRecord;
using Clock = std::chrono::steady_clock;

template <size_t N>
void copy_text(std::string_view text, std::array<char, N>& to) {
  to = {};
  text.copy(to.data(), N - 1);
}

struct Entered {
  const char* name;
  Clock::time_point time;
};

struct Group {
  int first_rank = -1;
  int64_t next = 0;  ///< number of its next collective
};

struct Begun {
  CollectiveRecord collective;
  Clock::time_point time;

  CollectiveRecord now() const;
};

struct Record {
  std::mutex mutex;
  int64_t step = -1;
  std::map<pid_t, std::vector<Entered>> phases;  ///< by thread
  std::map<std::string, Group, std::less<>> groups;
  std::map<pid_t, Begun> current;  ///< by thread
  std::array<Begun, std::tuple_size_v<decltype(internal::Activity::latest)>> latest;
  size_t num_begun = 0;  ///< collective number n of all groups is in latest[n % latest.size()]
  std::optional<Clock::time_point> last_collective_event;
};

/// Never freed: threads that outlive main() may still write to it.
Record& record() {
  static auto& process = *new Record;
  return process;
}

pid_t own_thread() {
  thread_local const auto id = static_cast<pid_t>(syscall(SYS_gettid));
  return id;
}

bool is_main(pid_t thread) { return thread == getpid(); }

int64_t milliseconds_since(Clock::time_point time) {
  return std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - time).count();
}

CollectiveRecord Begun::now() const {
  auto result = collective;
  result.milliseconds = milliseconds_since(time);
  return result;
}

std::string seconds(int64_t milliseconds) {
  const double value = static_cast<double>(milliseconds) / 1000;
  return value < 10 ? fmt::format("{:.1f} s", value) : fmt::format("{:.0f} s", value);
}

}  // namespace

Phase::Phase(const char* name) {
  auto& all = record();
  const std::scoped_lock lock(all.mutex);
  all.phases[own_thread()].push_back({name, Clock::now()});
}

Phase::~Phase() {
  auto& all = record();
  const std::scoped_lock lock(all.mutex);
  const auto own = all.phases.find(own_thread());
  own->second.pop_back();
  if (own->second.empty()) all.phases.erase(own);
}

void set_step(int64_t step) {
  auto& all = record();
  const std::scoped_lock lock(all.mutex);
  all.step = step;
}

namespace internal {

void know_group(std::string_view group, int first_rank) {
  auto& all = record();
  const std::scoped_lock lock(all.mutex);
  auto& known = all.groups[std::string(group)];
  known = {};
  known.first_rank = first_rank;
}

InCollective::InCollective(const std::string& group, const char* operation, int64_t elements, Sizes sizes,
                           std::optional<int64_t> number) {
  auto& all = record();
  const std::scoped_lock lock(all.mutex);
  if (all.current.contains(own_thread())) return;
  auto& known = all.groups[group];
  number_ = number ? *number : known.next++;
  CollectiveRecord collective{.number = *number_,
                              .elements = elements,
                              .first_rank = known.first_rank,
                              .sizes_may_differ = sizes == Sizes::kMayDiffer};
  copy_text(group, collective.group);
  copy_text(operation, collective.operation);
  const auto now = Clock::now();
  if (!number) all.latest[all.num_begun++ % all.latest.size()] = {collective, now};
  all.current[own_thread()] = {collective, now};
  all.last_collective_event = now;
}

InCollective::~InCollective() {
  if (!number_) return;
  auto& all = record();
  const std::scoped_lock lock(all.mutex);
  all.current.erase(own_thread());
  all.last_collective_event = Clock::now();
}

Activity own_activity() {
  Activity result;
  copy_text(host_name(), result.host);
  auto& all = record();
  const std::scoped_lock lock(all.mutex);
  result.step = all.step;
  for (const auto& [thread, phases] : all.phases) {
    const auto& innermost = phases.back();
    const auto lasted = milliseconds_since(innermost.time);
    if (is_main(thread)) {
      copy_text(innermost.name, result.phase);
      result.phase_milliseconds = lasted;
    } else if (result.other_phase.front() == 0 || lasted > result.other_phase_milliseconds) {
      copy_text(innermost.name, result.other_phase);
      result.other_phase_milliseconds = lasted;
    }
  }
  for (const auto& [thread, begun] : all.current) {
    if (result.current.number < 0 || is_main(thread)) result.current = begun.now();
  }
  const auto size = all.latest.size();
  for (size_t i = 0; i < std::min(all.num_begun, size); ++i) {
    result.latest[i] = all.latest[(all.num_begun - 1 - i) % size].now();
  }
  return result;
}

std::optional<Clock::time_point> last_collective_event() {
  auto& all = record();
  const std::scoped_lock lock(all.mutex);
  return all.step < 0 ? std::nullopt : all.last_collective_event;
}

std::string to_text(const CollectiveRecord& collective) {
  auto text =
      fmt::format("{} number {} of {}", collective.operation.data(), collective.number, collective.group.data());
  if (collective.elements > 0) text += fmt::format(", {} elements", collective.elements);
  return text;
}

std::string to_text(const Activity& activity) {
  const bool is_waiting = activity.current.number >= 0;
  const bool has_phase = activity.phase.front() != 0;
  std::string text;
  if (is_waiting) {
    text = fmt::format("in {}, for {}", to_text(activity.current), seconds(activity.current.milliseconds));
    if (has_phase) text += fmt::format(", {}", activity.phase.data());
  } else if (has_phase) {
    text = fmt::format("{} for {}", activity.phase.data(), seconds(activity.phase_milliseconds));
  } else {
    text = "computing";
  }
  if (activity.step >= 0) text += fmt::format(", step {}", activity.step);
  if (activity.other_phase.front() != 0) {
    text += fmt::format("; another thread: {} for {}", activity.other_phase.data(),
                        seconds(activity.other_phase_milliseconds));
  }
  const auto& last = activity.latest.front();
  if (!is_waiting && last.number >= 0) {
    text += fmt::format("; last collective: {}, {} ago", to_text(last), seconds(last.milliseconds));
  }
  return text;
}

}  // namespace internal
}  // namespace megatron_cpp::parallel
