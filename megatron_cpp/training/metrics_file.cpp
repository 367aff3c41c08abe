#include "megatron_cpp/training/metrics_file.h"

#include <c10/util/Exception.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

namespace megatron_cpp {
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

/// Leaves those lines in the file, which is created if it isn't there. Returns its path.
std::filesystem::path cut_back(const std::filesystem::path& path, int64_t last_step) {
  write_file(path, std::filesystem::exists(path) ? kept_lines(path, last_step) : "");
  return path;
}

}  // namespace

MetricsFile::MetricsFile(const std::filesystem::path& path, int64_t last_step) : file_(cut_back(path, last_step)) {}

void MetricsFile::write(const StepMetrics& metrics) {
  nlohmann::ordered_json json{{"step", metrics.step}};
  for (const auto& [name, value] : metrics.numbers()) json[name] = value;
  for (const auto& [name, count] : metrics.counts) json[name] = count;  // as integers
  pending_ += json.dump() + "\n";
  flush();
}

void MetricsFile::flush() {
  if (pending_.empty()) return;
  try {
    file_.append(pending_);
  } catch (const WriteError&) {
    if (file_.is_cut_short()) pending_.clear();  // never a part twice
    throw;
  }
  pending_.clear();
}

}  // namespace megatron_cpp
