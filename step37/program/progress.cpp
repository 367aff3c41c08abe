#include "step37/program/progress.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace megatron_cpp::step37 {
namespace {

/// The number of this name; 0 if there is none.
template <class Number>
double number_of(const std::vector<std::pair<std::string, Number>>& numbers, std::string_view name) {
  const auto found = std::ranges::find(numbers, name, [](const auto& number) { return number.first; });
  return found == numbers.end() ? 0.0 : static_cast<double>(found->second);
}

std::string time_text(double seconds) {
  const auto whole = static_cast<int64_t>(seconds);
  return whole >= 3600 ? fmt::format("{}h{:02}m", whole / 3600, whole / 60 % 60)
                       : fmt::format("{}m{:02}s", whole / 60, whole % 60);
}

/// "  0.031 TFLOP/s (38 %)"; nothing if it isn't known.
std::string speed_text(const StepMetrics& metrics) {
  const double rate = number_of(metrics.values, "tflops_per_rank");
  return rate == 0 ? ""
                   : fmt::format("  {:.3g} TFLOP/s ({:.0f} %)", rate, 100 * number_of(metrics.values, "peak_share"));
}

}  // namespace

Progress::Progress(int64_t first_step, int64_t total_steps, ProgressStyle style)
    : first_step_(first_step), total_steps_(total_steps), style_(style), start_(std::chrono::steady_clock::now()) {}

void Progress::show(const StepMetrics& metrics) {
  const int64_t done = metrics.step - first_step_ + 1;
  const bool worth_a_line = done <= 3 || metrics.step % 10 == 0 || metrics.step == total_steps_;
  if (style_ == ProgressStyle::kPlain && !worth_a_line && !metrics.validation_loss) return;
  const double elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  const double rest = elapsed / static_cast<double>(done) * static_cast<double>(total_steps_ - metrics.step);
  auto line = fmt::format(
      "step {}/{}  loss {:.4f}  grad norm {:.3f}  rate {:.2e}  {:.0f} tokens/s  {:.1f} pictures/s{}  ETA {}",
      metrics.step, total_steps_, metrics.result.loss, metrics.result.grad_norm, metrics.result.learning_rate,
      number_of(metrics.counts, "tokens") / metrics.seconds, number_of(metrics.counts, "images") / metrics.seconds,
      speed_text(metrics), time_text(rest));
  if (metrics.validation_loss) line += fmt::format("  validation loss {:.4f}", *metrics.validation_loss);
  if (style_ == ProgressStyle::kPlain) {
    std::puts(line.c_str());
  } else {
    // Lines with a validation loss and of the last step stay on the screen.
    const bool stays = metrics.validation_loss.has_value() || metrics.step == total_steps_;
    std::fputs(fmt::format("\r{}\033[K{}", line, stays ? "\n" : "").c_str(), stdout);
  }
  std::fflush(stdout);
}

}  // namespace megatron_cpp::step37
