#include "step37/program/shell_text.h"

#include <c10/util/Exception.h>

#include <algorithm>

namespace megatron_cpp::step37 {

void check_no_tilde(const std::string& option, const std::filesystem::path& path) {
  const auto text = path.string();
  TORCH_CHECK_VALUE(!text.starts_with('~'), option, " ", text,
                    " starts with ~, which isn't expanded here: write the folder it stands for, or ./~ for that name");
}

std::string shell_quoted(const std::string& text) {
  const auto is_plain = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
           std::string("_-./=:,+@%").find(c) != std::string::npos;
  };
  if (!text.empty() && std::all_of(text.begin(), text.end(), is_plain)) return text;
  std::string quoted = "'";
  for (const char c : text) {
    if (c == '\'') {
      quoted += "'\\''";
    } else {
      quoted += c;
    }
  }
  return quoted + "'";
}

std::string shell_quoted_path(const std::filesystem::path& path) {
  const auto text = path.string();
  const bool is_plain_name = text.find('/') == std::string::npos;
  return shell_quoted(text.starts_with('-') || is_plain_name ? "./" + text : text);
}

}  // namespace megatron_cpp::step37
