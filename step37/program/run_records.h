// What a run writes of its steps while it trains.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>

#include "megatron_cpp/training/metrics_file.h"
#include "megatron_cpp/training/tensorboard_file.h"
#include "megatron_cpp/training/training_loop.h"
#include "step37/program/report.h"
#include "step37/program/run_config.h"
#include "step37/program/training_run.h"

namespace megatron_cpp::step37 {

/// metrics.jsonl, TensorBoard's event file and the report so far, which has no pictures yet. For world rank 0; nothing
/// is collective.
class RunRecords {
 public:
  /// @param report     of the run that goes on: total_steps is set
  /// @param last_step  the run goes on after it
  /// @throws c10::ValueError or WriteError as MetricsFile and TensorBoardFile.
  RunRecords(const RunFiles& files, const RunConfig& config, ReportInput report, int64_t last_step);

  /// Writes a step's numbers, and now and then the report. What can't be written is an error, or with
  /// WriteErrorAction::kContinue a warning, the first of several: a line of metrics is then written with a later one.
  void write(const StepMetrics& line);

  /// Writes lines that could not be written before. @throws WriteError
  void flush();

  /// Call it before the last checkpoint is saved: a run that is killed after it then still gets the report of its end.
  void remove_report() const;

 private:
  void write_report();

  std::filesystem::path report_file_;
  WriteErrorAction on_error_;
  ReportInput report_;
  MetricsFile metrics_;
  std::optional<TensorBoardFile> tensorboard_;
  std::chrono::steady_clock::time_point next_report_;
  bool lacks_metrics_ = false;  ///< the last line is still to be written
};

}  // namespace megatron_cpp::step37
