#include "step37/program/training_run.h"

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <nlohmann/json.hpp>
#include <numeric>
#include <system_error>
#include <utility>
#include <vector>

#include "megatron_cpp/checkpoint/json_integer.h"

namespace step37 {

namespace {

int64_t integer_at(const nlohmann::json& json, const char* key) {
  const auto value = megatron::internal::integer_of(json.at(key));
  TORCH_CHECK_VALUE(value.has_value(), key, " is not a 64-bit integer");
  return *value;
}

}  // namespace

RunLock::RunLock(const std::filesystem::path& path) : file_(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666)) {
  const auto reason = [] { return std::generic_category().message(errno); };
  TORCH_CHECK_VALUE(file_ >= 0, "cannot open ", path.string(), ": ", reason());
  if (flock(file_, LOCK_EX | LOCK_NB) == 0) return;
  if (errno == EWOULDBLOCK) {
    close(file_);
    TORCH_CHECK_VALUE(false, "another process trains in ", path.parent_path().string(), ": it holds ", path.string());
  }
  TORCH_WARN("cannot lock ", path.string(), ": ", reason(), "; nothing keeps a second run out of this folder");
}

RunLock::~RunLock() { close(file_); }

std::string to_text(const RunState& state) {
  auto kept = nlohmann::ordered_json::array();
  for (const auto& [key, value] : settings(state.config)) kept.push_back({key, value});
  return nlohmann::ordered_json{{"settings", std::move(kept)},
                                {"sampler", {{"epoch", state.sampler.epoch}, {"position", state.sampler.position}}},
                                {"optimizer_steps", state.optimizer_steps}}
      .dump();
}

RunState run_state_from_text(const std::string& text, const std::string& where) {
  RunState state;
  try {
    const auto json = nlohmann::json::parse(text);
    std::vector<std::string> kept;
    for (const auto& entry : json.at("settings")) {
      kept.push_back(entry.at(0).get<std::string>() + "=" + entry.at(1).get<std::string>());
    }
    state.config = run_config_from_settings(kept);
    state.sampler = {integer_at(json.at("sampler"), "epoch"), integer_at(json.at("sampler"), "position")};
    state.optimizer_steps = integer_at(json, "optimizer_steps");
  } catch (const nlohmann::json::exception& error) {
    TORCH_CHECK_VALUE(false, where, ": the state is no training run's: ", error.what());
  } catch (const c10::ValueError& error) {
    TORCH_CHECK_VALUE(false, where, ": the state is no training run's: ", error.what_without_backtrace());
  }
  return state;
}

int64_t padding_multiple(int tensor_parallel_size) {
  return std::lcm<int64_t>(64, std::lcm<int64_t>(tensor_parallel_size, 16));
}

CaptionerOptions captioner_options(const RunConfig& config, const Tokenizer& tokenizer,
                                   const std::filesystem::path& folder, int tensor_parallel_size) {
  CaptionerOptions options;
  options.format = caption_format(tokenizer, crop_options(config));
  options.folder = folder;
  options.pad_to = config.parallel.sequence_parallel ? tensor_parallel_size : 1;
  options.pad_id = tokenizer.pad_id();
  options.max_new_tokens = config.report.max_new_tokens;
  return options;
}

}  // namespace step37
