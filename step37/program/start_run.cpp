#include "step37/program/start_run.h"

#include <fmt/format.h>

#include <chrono>
#include <cstdio>

#include "parallel/activity.h"
#include "parallel/agree.h"
#include "parallel/runtime.h"
#include "step37/program/shell_text.h"

namespace megatron_cpp::step37 {

RunConfig read_run_config(const std::filesystem::path& path, const std::vector<std::string>& overrides, bool warns) {
  check_no_tilde("--config", path);
  auto config = parallel::in_phase("reading the configuration", [&] { return load_run_config(path, overrides); });
  if (warns) {
    for (const auto& warning : config.warnings) std::fputs(fmt::format("warning: {}\n", warning).c_str(), stderr);
  }
  return config;
}

parallel::ProcessGroups make_run_groups(parallel::Runtime& runtime, const RunConfig& config) {
  parallel::ProcessGroupsOptions options;
  options.timeout = std::chrono::seconds(config.run.timeout_seconds);
  options.master_address = config.run.master_address;
  return parallel::make_process_groups(runtime, rank_grid(config, runtime.size()), options);
}

void check_equal_settings(const RunConfig& config, const parallel::GroupPtr& world) {
  std::vector<parallel::NamedText> values;
  for (const auto& [key, value] : settings(config)) values.push_back({key, value});
  parallel::check_equal_texts(values, world);
}

}  // namespace megatron_cpp::step37
