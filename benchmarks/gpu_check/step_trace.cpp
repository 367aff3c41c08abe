#include "benchmarks/gpu_check/step_trace.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <string_view>
#include <unordered_map>
#include <utility>

namespace megatron_cpp::gpu_check {
namespace {

constexpr double kNanosecondsPerMillisecond = 1e6;

/// Calls of the CUDA runtime (and driver) after which the host has waited. cudaMemcpy is the blocking one;
/// cudaMemcpyAsync to pageable memory waits as well, but LibTorch synchronises the stream after it anyway.
bool waits_for_device(std::string_view name) {
  constexpr std::array<std::string_view, 7> kNames = {
      "cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy",
      "cuCtxSynchronize",      "cuStreamSynchronize",   "cuEventSynchronize"};
  return std::find(kNames.begin(), kNames.end(), name) != kNames.end();
}

bool is_copy_to_host(std::string_view name) { return name.starts_with("Memcpy DtoH"); }
bool is_copy_to_device(std::string_view name) { return name.starts_with("Memcpy HtoD"); }
bool is_kernel(std::string_view name) { return !name.starts_with("Memcpy") && !name.starts_with("Memset"); }

/// Ends of the steps: of the last update of each.
std::vector<int64_t> ends_of_steps(const std::vector<TraceEvent>& events, int64_t steps) {
  std::vector<int64_t> updates;
  for (const auto& event : events) {
    if (!event.on_device && event.name == "aten::_fused_adamw_") updates.push_back(event.end);
  }
  std::sort(updates.begin(), updates.end());
  const auto count = static_cast<int64_t>(updates.size());
  TORCH_CHECK_VALUE(steps >= 3 && count > 0 && count % steps == 0, "the trace has ", count,
                    " calls of the optimizer for ", steps, " steps");
  std::vector<int64_t> ends;
  for (int64_t i = count / steps; i <= count; i += count / steps) ends.push_back(updates[static_cast<size_t>(i) - 1]);
  return ends;
}

struct Gaps {
  double busy = 0.0;
  double idle = 0.0;
  double largest = 0.0;
};

/// Of intervals that may overlap.
Gaps gaps_between(std::vector<std::pair<int64_t, int64_t>> intervals) {
  Gaps gaps;
  if (intervals.empty()) return gaps;
  std::sort(intervals.begin(), intervals.end());
  int64_t reached = intervals.front().first;
  for (const auto& [begin, end] : intervals) {
    if (begin > reached) {
      const auto gap = static_cast<double>(begin - reached);
      gaps.idle += gap;
      gaps.largest = std::max(gaps.largest, gap);
    }
    gaps.busy += static_cast<double>(std::max<int64_t>(0, end - std::max(begin, reached)));
    reached = std::max(reached, end);
  }
  return gaps;
}

}  // namespace

int64_t StepFacts::num_synchronizing() const {
  int64_t sum = 0;
  for (const auto& [name, count] : synchronizing) sum += count;
  return sum;
}

StepFacts last_but_one_step(const std::vector<TraceEvent>& events, int64_t steps) {
  const auto ends = ends_of_steps(events, steps);
  const int64_t begin = ends[ends.size() - 3];
  const int64_t end = ends[ends.size() - 2];
  const auto in_step = [&](int64_t time) { return time > begin && time <= end; };

  StepFacts facts;
  facts.host_ms = static_cast<double>(end - begin) / kNanosecondsPerMillisecond;
  int64_t backward_end = begin;
  // When the host started what the device did: a kernel may run long after.
  std::unordered_map<uint64_t, int64_t> started;
  for (const auto& event : events) {
    if (event.on_device) continue;
    if (event.correlation != 0 && event.name.starts_with("cu")) started[event.correlation] = event.begin;
    if (!in_step(event.begin)) continue;
    if (waits_for_device(event.name)) ++facts.synchronizing[event.name];
    if (event.name.find("::") != std::string::npos) ++facts.operators;
    if (event.name.starts_with("autograd::engine::evaluate_function")) {
      ++facts.backward_functions;
      backward_end = std::max(backward_end, event.end);
    }
  }
  facts.operators -= facts.backward_functions;
  std::vector<std::pair<int64_t, int64_t>> intervals;
  for (const auto& event : events) {
    if (!event.on_device) continue;
    const auto found = started.find(event.correlation);
    const int64_t start = found == started.end() ? event.begin : found->second;
    if (!in_step(start)) continue;
    intervals.emplace_back(event.begin, event.end);
    if (is_kernel(event.name)) ++facts.kernels;
    if (is_copy_to_device(event.name)) ++facts.copies_to_device;
    if (is_copy_to_host(event.name)) {
      ++facts.copies_to_host;
      if (start < backward_end) ++facts.copies_to_host_in_passes;
    }
  }
  const auto gaps = gaps_between(std::move(intervals));
  facts.device_busy_ms = gaps.busy / kNanosecondsPerMillisecond;
  facts.gaps_ms = gaps.idle / kNanosecondsPerMillisecond;
  facts.largest_gap_ms = gaps.largest / kNanosecondsPerMillisecond;
  return facts;
}

}  // namespace megatron_cpp::gpu_check
