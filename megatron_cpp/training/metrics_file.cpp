#include "megatron_cpp/training/metrics_file.h"

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <unistd.h>

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

}  // namespace

MetricsFile::MetricsFile(const std::filesystem::path& path, int64_t last_step) : path_(path), file_(-1) {
  write_file(path, std::filesystem::exists(path) ? kept_lines(path, last_step) : "");
  file_.reset(::open(path.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666));
  if (file_.get() < 0) throw WriteError(c10::str("cannot write ", path.string(), ": ", std::strerror(errno)));
}

void MetricsFile::write(const StepMetrics& metrics) {
  nlohmann::ordered_json json{{"step", metrics.step}};
  for (const auto& [name, value] : metrics.numbers()) json[name] = value;
  for (const auto& [name, count] : metrics.counts) json[name] = count;  // as integers
  pending_ += json.dump() + "\n";
  flush();
}

void MetricsFile::flush() {
  if (pending_.empty()) return;
  const auto end = ::lseek(file_.get(), 0, SEEK_END);
  try {
    internal::write_all(file_.get(), pending_.data(), pending_.size(), path_.string());
  } catch (const WriteError&) {
    if (::ftruncate(file_.get(), end) != 0) pending_.clear();  // never a part twice
    throw;
  }
  pending_.clear();
}

}  // namespace megatron_cpp
