#include "step37/program/run_records.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <utility>

#include "megatron_cpp/checkpoint/complete_file.h"

namespace megatron_cpp::step37 {

RunRecords::RunRecords(const RunFiles& files, const RunConfig& config, ReportInput report, int64_t last_step)
    : report_file_(files.report()),
      on_error_(config.checkpoint.on_error),
      report_(std::move(report)),
      metrics_(files.metrics(), last_step) {
  if (config.report.tensorboard) tensorboard_.emplace(files.tensorboard(), last_step);
}

void RunRecords::write(const StepMetrics& line) {
  try {
    metrics_.write(line);
    if (tensorboard_) tensorboard_->write(line);
    write_report();
    lacks_metrics_ = false;
  } catch (const WriteError& error) {
    if (on_error_ == WriteErrorAction::kStop) throw;
    if (!std::exchange(lacks_metrics_, true)) {
      TORCH_WARN(error.what(), "; training goes on");
    }
  }
}

void RunRecords::flush() { metrics_.flush(); }

void RunRecords::remove_report() const { remove_run_file(report_file_); }

void RunRecords::write_report() {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  if (start < next_report_) return;
  write_file(report_file_, render_report(report_));
  // To read the metrics of a long run takes a while: at most a fiftieth of the run's time.
  next_report_ = start + std::max<Clock::duration>(std::chrono::seconds(10), 50 * (Clock::now() - start));
}

}  // namespace megatron_cpp::step37
