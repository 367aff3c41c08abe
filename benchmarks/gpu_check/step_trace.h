// Extracts one optimizer step from the events of a profiler. Needs no GPU, so that it can be tested without one.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace megatron_cpp::gpu_check {

/// One operator, call of the CUDA runtime, kernel or copy in LibTorch's profiler. Times in nanoseconds.
struct TraceEvent {
  std::string name;
  bool on_device = false;  ///< a kernel, copy or fill on the GPU; else an event on the host
  int64_t begin = 0;
  int64_t end = 0;
  uint64_t correlation = 0;  ///< equal for a runtime call and what it started on the device; 0: none
};

/// Counts and times of one step.
struct StepFacts {
  double host_ms = 0.0;                          ///< from the end of the previous update to the end of this one
  std::map<std::string, int64_t> synchronizing;  ///< calls that wait for the device, by name
  int64_t copies_to_host = 0;                    ///< device-to-host copies
  int64_t copies_to_host_in_passes = 0;          ///< those that were started before the backward pass ended
  int64_t copies_to_device = 0;                  ///< host-to-device copies
  int64_t kernels = 0;                           ///< started in the step
  double device_busy_ms = 0.0;                   ///< time with at least one kernel or copy running
  double gaps_ms = 0.0;                          ///< time between the first and the last of them with none running
  double largest_gap_ms = 0.0;
  int64_t operators = 0;           ///< "aten::" and our own, on the host
  int64_t backward_functions = 0;  ///< number of functions that autograd evaluated

  /// Number of calls, over all names in `synchronizing`.
  int64_t num_synchronizing() const;
};

/// The last but one step: from the end of the optimizer update before it to the end of its own; the last step also has
/// what a run does at its end. Steps are separated by the operator "aten::_fused_adamw_", which each step calls equally
/// often.
/// @throws c10::ValueError if the number of updates isn't a multiple of `steps`, or there are fewer than three steps.
StepFacts last_but_one_step(const std::vector<TraceEvent>& events, int64_t steps);

}  // namespace megatron_cpp::gpu_check
