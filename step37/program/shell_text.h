// Text from and for a shell's command line.
#pragma once

#include <filesystem>
#include <string>

namespace megatron_cpp::step37 {

/// Refuses a path that starts with ~: shells don't expand it in `--checkpoint=~/a` or `run.directory=~/a`, and nobody
/// does in a YAML file.
/// @throws c10::ValueError naming `option` if the path starts with ~.
void check_no_tilde(const std::string& option, const std::filesystem::path& path);

/// `text` as one word of a POSIX shell command line: in single quotes, unless it needs none.
std::string shell_quoted(const std::string& text);

/// A path as such a word, written so that it is neither an option (starts with -) nor a command in PATH (has no /).
std::string shell_quoted_path(const std::filesystem::path& path);

}  // namespace megatron_cpp::step37
