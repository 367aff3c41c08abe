// Reads a YAML file with one document.
#pragma once

#include <yaml-cpp/node/node.h>

#include <filesystem>
#include <string>

namespace megatron_cpp::step37 {

/// The document in the file; null if it is empty. Not collective.
/// @throws c10::ValueError naming file and line: it can't be read, isn't YAML, or holds a second document.
YAML::Node parse_yaml_file(const std::filesystem::path& path);

/// "file:line", lines counted from 1.
std::string location(const std::filesystem::path& path, const YAML::Mark& mark);

}  // namespace megatron_cpp::step37
