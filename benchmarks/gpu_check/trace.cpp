// (h) A training run under LibTorch's profiler (Kineto, with CUPTI where there is a GPU), and what one step of it did.
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/profiler_kineto.h>

#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "benchmarks/gpu_check/check.h"
#include "benchmarks/gpu_check/step_trace.h"
#include "parallel/runtime.h"
#include "step37/program/pretrain.h"
#include "step37/program/run_config.h"

namespace megatron_cpp::gpu_check {
namespace {

namespace profiler = torch::autograd::profiler;
using torch::profiler::impl::ActivityType;
using torch::profiler::impl::ProfilerConfig;
using torch::profiler::impl::ProfilerState;

/// A step waits for its loss, and for its gradient's norm.
constexpr int64_t kAllowedSynchronizations = 2;

std::vector<TraceEvent> events_of(const profiler::ProfilerResult& result) {
  std::vector<TraceEvent> events;
  for (const auto& event : result.events()) {
    events.push_back({event.name(), event.deviceType() != c10::DeviceType::CPU, static_cast<int64_t>(event.startNs()),
                      static_cast<int64_t>(event.endNs()), event.correlationId()});
  }
  return events;
}

}  // namespace

void check_trace(const Target& target, Report& report, const TraceArguments& arguments) {
  const int64_t steps = step37::load_run_config(arguments.config, arguments.overrides).training.steps;
  const ProfilerConfig config(ProfilerState::KINETO);
  const std::set<ActivityType> activities = target.is_gpu()
                                                ? std::set<ActivityType>{ActivityType::CPU, ActivityType::CUDA}
                                                : std::set<ActivityType>{ActivityType::CPU};
  std::unique_ptr<profiler::ProfilerResult> result;
  const int status = parallel::Runtime::run([&](parallel::Runtime& runtime) {
    profiler::prepareProfiler(config, activities);
    profiler::enableProfiler(config, activities, {at::RecordScope::FUNCTION, at::RecordScope::BACKWARD_FUNCTION});
    const int exit_status =
        step37::pretrain(runtime, {arguments.config, arguments.overrides, step37::ProgressStyle::kPlain});
    target.synchronize();
    result = profiler::disableProfiler();
    return exit_status;
  });
  TORCH_CHECK(status == 0 && result != nullptr, "the traced run ended with status ", status);
  if (!arguments.trace.empty()) result->save(arguments.trace.string());
  const auto facts = last_but_one_step(events_of(*result), steps);
  report.row({{"what", "one step on the host"},
              {"host_ms", facts.host_ms},
              {"operators", facts.operators},
              {"backward_functions", facts.backward_functions}});
  if (!target.is_gpu()) {
    report.no_gpu("synchronisations, copies, kernels and gaps of the step");
    return;
  }
  report.verdict({{"what", "synchronisations of the step"},
                  {"count", facts.num_synchronizing()},
                  {"allowed", kAllowedSynchronizations},
                  {"calls", facts.synchronizing}},
                 facts.num_synchronizing() <= kAllowedSynchronizations);
  report.verdict({{"what", "device-to-host copies of the step"},
                  {"in_forward_and_backward", facts.copies_to_host_in_passes},
                  {"allowed", 0},
                  {"all", facts.copies_to_host}},
                 facts.copies_to_host_in_passes == 0);
  // Without kernels the profiler has seen nothing, and the verdicts above mean nothing.
  report.verdict({{"what", "the step on the device"},
                  {"kernels", facts.kernels},
                  {"copies_to_device", facts.copies_to_device},
                  {"busy_ms", facts.device_busy_ms},
                  {"gaps_ms", facts.gaps_ms},
                  {"largest_gap_ms", facts.largest_gap_ms}},
                 facts.kernels > 0);
}

}  // namespace megatron_cpp::gpu_check
