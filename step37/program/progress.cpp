#include "step37/program/progress.h"

#include <c10/util/Exception.h>
#include <fcntl.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "megatron_cpp/checkpoint/safetensors.h"

namespace step37 {
namespace {

/// The lines of `path` whose step is at most `last_step`.
std::string kept_lines(const std::filesystem::path& path, int64_t last_step) {
  std::ifstream file(path);
  TORCH_CHECK_VALUE(file.is_open(), "cannot read ", path.string(), ": ", std::strerror(errno));
  std::string kept;
  std::string line;
  while (std::getline(file, line)) {
    const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    const bool whole = json.is_object() && json.contains("step") && json["step"].is_number_integer();
    if (whole && json["step"].get<int64_t>() <= last_step) kept += line + "\n";
  }
  TORCH_CHECK_VALUE(!file.bad(), "cannot read ", path.string(), ": ", std::strerror(errno));
  return kept;
}

std::string time_text(double seconds) {
  const auto whole = static_cast<int64_t>(seconds);
  char text[32];
  if (whole >= 3600) {
    std::snprintf(text, sizeof(text), "%lldh%02lldm", static_cast<long long>(whole / 3600),
                  static_cast<long long>(whole / 60 % 60));
  } else {
    std::snprintf(text, sizeof(text), "%lldm%02llds", static_cast<long long>(whole / 60),
                  static_cast<long long>(whole % 60));
  }
  return text;
}

}  // namespace

MetricsFile::MetricsFile(const std::filesystem::path& path, int64_t last_step) : path_(path), file_(-1) {
  megatron::write_file(path, std::filesystem::exists(path) ? kept_lines(path, last_step) : "");
  file_.reset(::open(path.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666));
  TORCH_CHECK_VALUE(file_.get() >= 0, "cannot write ", path.string(), ": ", std::strerror(errno));
}

void MetricsFile::write(const StepMetrics& metrics) {
  nlohmann::ordered_json json{{"step", metrics.step},
                              {"loss", metrics.loss},
                              {"grad_norm", metrics.grad_norm},
                              {"learning_rate", metrics.learning_rate},
                              {"tokens", metrics.tokens},
                              {"images", metrics.images},
                              {"tokens_per_second", static_cast<double>(metrics.tokens) / metrics.step_seconds},
                              {"step_seconds", metrics.step_seconds}};
  if (metrics.validation_loss) json["validation_loss"] = *metrics.validation_loss;
  const auto line = json.dump() + "\n";
  megatron::internal::write_all(file_.get(), line.data(), line.size(), path_.string());
}

Progress::Progress(int64_t first_step, int64_t total_steps, ProgressStyle style)
    : first_step_(first_step), total_steps_(total_steps), style_(style), start_(std::chrono::steady_clock::now()) {}

void Progress::show(const StepMetrics& metrics) {
  const int64_t done = metrics.step - first_step_ + 1;
  const bool worth_a_line = done <= 3 || metrics.step % 10 == 0 || metrics.step == total_steps_;
  if (style_ == ProgressStyle::kPlain && !worth_a_line && !metrics.validation_loss) return;
  const double elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  const double rest = elapsed / static_cast<double>(done) * static_cast<double>(total_steps_ - metrics.step);
  char text[256];
  std::snprintf(text, sizeof(text),
                "step %lld/%lld  loss %.4f  grad norm %.3f  rate %.2e  %.0f tokens/s  %.1f pictures/s  ETA %s",
                static_cast<long long>(metrics.step), static_cast<long long>(total_steps_), metrics.loss,
                metrics.grad_norm, metrics.learning_rate, static_cast<double>(metrics.tokens) / metrics.step_seconds,
                static_cast<double>(metrics.images) / metrics.step_seconds, time_text(rest).c_str());
  std::string line = text;
  if (metrics.validation_loss) {
    std::snprintf(text, sizeof(text), "  validation loss %.4f", *metrics.validation_loss);
    line += text;
  }
  if (style_ == ProgressStyle::kPlain) {
    std::printf("%s\n", line.c_str());
  } else {
    // A measured validation loss and the last step stay on the screen.
    const bool stays = metrics.validation_loss.has_value() || metrics.step == total_steps_;
    std::printf("\r%s\033[K%s", line.c_str(), stays ? "\n" : "");
  }
  std::fflush(stdout);
}

}  // namespace step37
