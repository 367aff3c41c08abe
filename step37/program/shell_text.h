// Texts that a shell has made, or is to read.
#pragma once

#include <filesystem>
#include <string>

namespace megatron_cpp::step37 {

/// Refuses a path that a shell would have expanded where it stood alone: `--checkpoint=~/a` and `run.directory=~/a`
/// come here as they are, and so does what a YAML file says.
/// @throws c10::ValueError naming `option` if the path starts with ~.
void check_no_tilde(const std::string& option, const std::filesystem::path& path);

/// `text` as one word of a POSIX shell's command line: in single quotes, unless it needs none.
std::string shell_quoted(const std::string& text);

/// A path as such a word: one that starts with - is no option, one without / no command in PATH.
std::string shell_quoted_path(const std::filesystem::path& path);

}  // namespace megatron_cpp::step37
