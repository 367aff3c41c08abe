// One optimizer step out of a profiler's list of events. Pure: no GPU is needed to test it.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace megatron_cpp::gpu_check {

/// What LibTorch's profiler says of one operator, call of the CUDA runtime, kernel or copy. Nanoseconds.
struct TraceEvent {
  std::string name;
  bool on_device = false;  ///< a kernel, copy or fill on the GPU; else something on the host
  int64_t begin = 0;
  int64_t end = 0;
  uint64_t correlation = 0;  ///< the same for a call of the runtime and what it started on the device; 0: none
};

/// What a step did.
struct StepFacts {
  double host_ms = 0.0;                          ///< from the end of the optimizer's update before to that of its own
  std::map<std::string, int64_t> synchronizing;  ///< calls that wait for the device, by name
  int64_t copies_to_host = 0;                    ///< device-to-host copies
  int64_t copies_to_host_in_passes = 0;          ///< those that were started before the backward pass had ended
  int64_t copies_to_device = 0;                  ///< host-to-device copies
  int64_t kernels = 0;                           ///< started in the step
  double device_busy_ms = 0.0;                   ///< with at least one kernel or copy at work
  double gaps_ms = 0.0;                          ///< between the first and the last of them, with none at work
  double largest_gap_ms = 0.0;
  int64_t operators = 0;           ///< "aten::" and our own, on the host
  int64_t backward_functions = 0;  ///< that autograd evaluated

  /// Calls of all names in `synchronizing`.
  int64_t num_synchronizing() const;
};

/// The step that is the last but one: the update before it ended its forerunner, its own ends it, and nothing follows
/// that belongs to the end of a run. Steps are told apart by the optimizer's kernel "aten::_fused_adamw_", of which
/// each step calls equally many.
/// @throws c10::ValueError if the events don't show `steps` steps of equally many updates each, or fewer than three.
StepFacts last_but_one_step(const std::vector<TraceEvent>& events, int64_t steps);

}  // namespace megatron_cpp::gpu_check
