// What is read off a profiler's events, on events made by hand: kernels that outlast the calls that started them, and
// copies on either side of the end of the backward pass.
#include "benchmarks/gpu_check/step_trace.h"

#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

namespace megatron_cpp {
namespace {

using gpu_check::last_but_one_step;
using gpu_check::TraceEvent;

/// A step of a millisecond from `begin` on, its update at the end in `updates` calls.
class Step {
 public:
  explicit Step(int64_t begin) : begin_(begin) {}

  Step& on_host(const std::string& name, int64_t at, int64_t length = 1000) {
    events_.push_back({name, false, begin_ + at, begin_ + at + length, 0});
    return *this;
  }
  /// Started by a call at `at`, runs from `runs` on.
  Step& on_device(const std::string& name, int64_t at, int64_t runs, int64_t length) {
    const auto id = static_cast<uint64_t>(begin_ + static_cast<int64_t>(events_.size()) + 1);
    events_.push_back({"cudaLaunchKernel", false, begin_ + at, begin_ + at + 10, id});
    events_.push_back({name, true, begin_ + runs, begin_ + runs + length, id});
    return *this;
  }
  std::vector<TraceEvent> with_updates(int updates) const {
    auto result = events_;
    for (int i = 0; i < updates; ++i) {
      result.push_back({"aten::_fused_adamw_", false, begin_ + 990000, begin_ + 995000 + i, 0});
    }
    return result;
  }

 private:
  int64_t begin_;
  std::vector<TraceEvent> events_;
};

std::vector<TraceEvent> joined(const std::vector<std::vector<TraceEvent>>& steps) {
  std::vector<TraceEvent> all;
  for (const auto& step : steps) all.insert(all.end(), step.begin(), step.end());
  return all;
}

}  // namespace

TEST(StepTrace, CountsTheLastButOneStepAlone) {
  Step noisy(0);
  noisy.on_host("cudaDeviceSynchronize", 10).on_device("Memcpy DtoH (Device -> Pinned)", 20, 30, 40);
  Step looked_at(1000000);
  looked_at.on_host("aten::mm", 0)
      .on_device("gemm", 1000, 2000, 3000)  // busy 2000 .. 5000
      .on_device("add", 1100, 4000, 2000)   // beside it, to 6000
      .on_device("Memset (Device)", 1200, 9000, 1000)
      .on_host("autograd::engine::evaluate_function: MmBackward0", 3000, 7000)  // ends at 10000
      .on_device("Memcpy HtoD (Pinned -> Device)", 3100, 20000, 1000)
      .on_device("Memcpy DtoH (Device -> Pageable)", 9999, 30000, 1000)  // started before the end of backward
      .on_device("Memcpy DtoH (Device -> Pinned)", 10001, 40000, 1000)   // after it
      .on_host("cudaStreamSynchronize", 11000)
      .on_host("cudaStreamSynchronize", 12000)
      .on_host("cudaEventSynchronize", 13000)
      .on_host("cudaMemcpyAsync", 14000);
  // Started in this step, though it runs in the next.
  looked_at.on_device("late", 900000, 1001000, 500);
  const auto facts = last_but_one_step(joined({noisy.with_updates(2), looked_at.with_updates(2),
                                               Step(2000000).on_host("cudaDeviceSynchronize", 5).with_updates(2)}),
                                       3);
  EXPECT_DOUBLE_EQ(facts.host_ms, 1.0);
  EXPECT_EQ(facts.num_synchronizing(), 3);
  EXPECT_EQ(facts.synchronizing.at("cudaStreamSynchronize"), 2);
  EXPECT_EQ(facts.copies_to_host, 2);
  EXPECT_EQ(facts.copies_to_host_in_passes, 1);
  EXPECT_EQ(facts.copies_to_device, 1);
  EXPECT_EQ(facts.kernels, 3);  // gemm, add, late
  EXPECT_EQ(facts.backward_functions, 1);
  EXPECT_EQ(facts.operators, 3);  // aten::mm and two updates
  // 2000-6000, 9000-10000, 20000-21000, 30000-31000, 40000-41000, 1001000-1001500.
  EXPECT_DOUBLE_EQ(facts.device_busy_ms, 0.0085);
  EXPECT_DOUBLE_EQ(facts.gaps_ms, (1001500.0 - 2000.0 - 8500.0) / 1e6);
  EXPECT_DOUBLE_EQ(facts.largest_gap_ms, (1001000.0 - 41000.0) / 1e6);
}

TEST(StepTrace, RefusesATraceThatDoesNotShowTheSteps) {
  const auto steps = joined({Step(0).with_updates(2), Step(1000000).with_updates(2), Step(2000000).with_updates(1)});
  EXPECT_THROW(last_but_one_step(steps, 3), c10::ValueError);
  EXPECT_THROW(last_but_one_step({}, 3), c10::ValueError);
  EXPECT_THROW(last_but_one_step(joined({Step(0).with_updates(1), Step(1000000).with_updates(1)}), 2), c10::ValueError);
}

}  // namespace megatron_cpp
