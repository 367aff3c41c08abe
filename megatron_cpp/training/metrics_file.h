// metrics.jsonl: one JSON object per step.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "megatron_cpp/checkpoint/complete_file.h"
#include "megatron_cpp/training/training_loop.h"

namespace megatron_cpp {

/// Appends one JSON object per optimizer step, without buffering: step, and StepMetrics::numbers. One rank of a run
/// writes it.
class MetricsFile {
 public:
  /// Opens the file for a run that goes on after `last_step`. Lines of later steps, and a line cut short by a kill, are
  /// removed first, so that every step has exactly one line.
  /// @throws c10::ValueError or WriteError naming the file and the system's reason if it can't be read or written.
  MetricsFile(const std::filesystem::path& path, int64_t last_step);

  /// Appends the line of a step, behind those that could not be written before.
  /// @throws WriteError naming the file and the system's reason. Then nothing of these lines is in the file, and the
  ///         next write() or flush() tries again.
  void write(const StepMetrics& metrics);

  /// Writes the lines that could not be written before, if there are some. Throws as write().
  void flush();

 private:
  internal::AppendedFile file_;
  std::string pending_;  ///< lines that are to be written
};

}  // namespace megatron_cpp
