// What commands that run a configuration begin with.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "parallel/group.h"
#include "parallel/process_groups.h"
#include "step37/program/run_config.h"

namespace megatron_cpp::parallel {
class Runtime;
}  // namespace megatron_cpp::parallel

namespace megatron_cpp::step37 {

/// load_run_config of the option --config and its overrides. Not collective.
/// @param warns  whether this rank prints RunConfig::warnings on stderr
/// @throws c10::ValueError if the path starts with ~, and as load_run_config.
RunConfig read_run_config(const std::filesystem::path& path, const std::vector<std::string>& overrides, bool warns);

/// The groups of rank_grid(config), with the configuration's timeout and address. Collective over all ranks.
/// @throws as rank_grid and parallel::make_process_groups.
parallel::ProcessGroups make_run_groups(parallel::Runtime& runtime, const RunConfig& config);

/// Compares the settings of all ranks, each of which has read the configuration file on its own host. Collective over
/// the world.
/// @throws as parallel::check_equal_texts.
void check_equal_settings(const RunConfig& config, const parallel::GroupPtr& world);

}  // namespace megatron_cpp::step37
