// Prints the progress of a training run.
#pragma once

#include <chrono>
#include <cstdint>

#include "megatron_cpp/training/training_loop.h"

namespace megatron_cpp::step37 {

/// How progress is shown.
enum class ProgressStyle {
  kLine,   ///< one line, rewritten: for a terminal
  kPlain,  ///< a line now and then: for a file or a pipe
};

class Progress {
 public:
  /// Starts the clock. `first_step` is the first step that this start trains, counted from 1.
  Progress(int64_t first_step, int64_t total_steps, ProgressStyle style);
  void show(const StepMetrics& metrics);

 private:
  int64_t first_step_;
  int64_t total_steps_;
  ProgressStyle style_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace megatron_cpp::step37
