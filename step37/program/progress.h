// What a training run tells while it runs: metrics.jsonl and a line on the screen.
#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "megatron_cpp/checkpoint/complete_file.h"

namespace step37 {

/// One line of metrics.jsonl.
struct StepMetrics {
  int64_t step = 0;
  double loss = 0.0;
  double grad_norm = 0.0;
  double learning_rate = 0.0;
  int64_t tokens = 0;  ///< of the global batch, padding left out
  int64_t images = 0;
  double step_seconds = 0.0;
  std::optional<double> validation_loss;
};

/// Appends one JSON object per optimizer step, each flushed when it is written.
class MetricsFile {
 public:
  /// Opens the file for a run that goes on after `last_step`: lines of later steps, and a line cut short by a kill, are
  /// removed first, so that every step has exactly one.
  /// @throws c10::Error naming the file and the system's reason if it can't be read or written.
  MetricsFile(const std::filesystem::path& path, int64_t last_step);
  /// @throws c10::Error naming the file and the system's reason.
  void write(const StepMetrics& metrics);

 private:
  std::filesystem::path path_;
  megatron::internal::FileDescriptor file_;
};

/// How progress is shown.
enum class ProgressStyle {
  kLine,   ///< one line, rewritten: for a terminal
  kPlain,  ///< a line now and then: for a file or a pipe
};

class Progress {
 public:
  /// Counts time from here. `first_step` is the first of this run, counted from 1.
  Progress(int64_t first_step, int64_t total_steps, ProgressStyle style);
  void show(const StepMetrics& metrics);

 private:
  int64_t first_step_;
  int64_t total_steps_;
  ProgressStyle style_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace step37
