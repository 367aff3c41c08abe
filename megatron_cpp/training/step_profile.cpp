#include "megatron_cpp/training/step_profile.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/profiler_kineto.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <set>
#include <string>
#include <system_error>
#include <tuple>
#include <utility>

#include "megatron_cpp/checkpoint/complete_file.h"

namespace megatron_cpp {
namespace {

namespace fs = std::filesystem;
namespace profiler = torch::autograd::profiler;
using torch::profiler::impl::ActivityType;
using torch::profiler::impl::ProfilerConfig;
using torch::profiler::impl::ProfilerState;

std::vector<ProfiledEvent> events_of(const profiler::ProfilerResult& result) {
  std::vector<ProfiledEvent> events;
  for (const auto& event : result.events()) {
    events.push_back({.name = event.name(),
                      .is_range = event.scope() == static_cast<uint8_t>(at::RecordScope::USER_SCOPE),
                      .thread = event.startThreadId(),
                      .begin = static_cast<int64_t>(event.startNs()),
                      .nanoseconds = static_cast<int64_t>(event.durationNs())});
  }
  std::ranges::stable_sort(events, {},
                           [](const ProfiledEvent& event) { return std::tuple(event.begin, -event.nanoseconds); });
  return events;
}

/// Kineto doesn't say whether it could write.
bool is_whole(const fs::path& file) {
  std::ifstream stream(file, std::ios::binary | std::ios::ate);
  const auto end = static_cast<int64_t>(stream.tellg());
  const auto length = std::min<int64_t>(end, 16);
  std::string tail(static_cast<size_t>(std::max<int64_t>(length, 0)), '\0');
  stream.seekg(end - length);
  stream.read(tail.data(), length);
  const auto last = tail.find_last_not_of(" \n");
  return stream && last != std::string::npos && tail[last] == '}';
}

void write_trace(profiler::ProfilerResult& result, const fs::path& file) {
  std::error_code error;
  if (file.has_parent_path()) fs::create_directories(file.parent_path(), error);
  const fs::path partial = file.string() + ".partial";
  result.save(partial.string());
  const bool is_written = is_whole(partial);
  if (is_written) {
    fs::rename(partial, file, error);
    if (!error) return;
  }
  std::error_code ignored;
  fs::remove(partial, ignored);
  throw WriteError(fmt::format("the trace {} can't be written{}", file.string(), error ? ": " + error.message() : ""));
}

}  // namespace

StepProfile::StepProfile(StepRange steps, fs::path file, c10::Device device)
    : steps_(steps), file_(std::move(file)), device_(device) {
  TORCH_CHECK_VALUE(steps.first == 0 || (steps.first > 0 && steps.first <= steps.last), "a profile of steps ",
                    steps.first, " to ", steps.last);
}

StepProfile::~StepProfile() {
  if (is_recording_) profiler::disableProfiler();
}

void StepProfile::begin_step(int64_t step) {
  if (is_recording_ || !steps_.contains(step)) return;
  // Kineto would report that there are no GPUs as an error, beside other lines of its own.
  setenv("KINETO_LOG_LEVEL", "99", /*overwrite=*/0);
  const ProfilerConfig config(ProfilerState::KINETO);
  std::set<ActivityType> activities{ActivityType::CPU};
  if (device_.is_cuda()) activities.insert(ActivityType::CUDA);
  profiler::prepareProfiler(config, activities);
  profiler::enableProfiler(config, activities);
  is_recording_ = true;
}

bool StepProfile::end_step(int64_t step) { return step >= steps_.last && finish(); }

bool StepProfile::finish() {
  if (!std::exchange(is_recording_, false)) return false;
  const auto result = profiler::disableProfiler();
  events_ = events_of(*result);
  if (!file_.empty()) write_trace(*result, file_);
  return true;
}

}  // namespace megatron_cpp
