// Checks and converts text to UTF-8.
#pragma once

#include <string>
#include <string_view>

namespace megatron_cpp::step37 {

/// Whether `text` is valid UTF-8: no truncated or overlong characters, no surrogates, nothing above U+10FFFF.
bool is_utf8(std::string_view text);

/// Replaces every byte of `text` that is part of no character by U+FFFD, the replacement character.
std::string to_utf8(std::string_view text);

/// `text` as printable UTF-8 on one line: the bytes of control characters, of line and direction marks, and bytes that
/// are part of no character are written \xNN. File names may contain any byte.
std::string printable(std::string_view text);

/// Whether `text`, in UTF-8, has a control character other than a tab.
bool has_control_character(std::string_view text);

/// Converts `text` to UTF-8 and removes the mark, if it begins with a byte order mark of UTF-8, UTF-16 or UTF-32;
/// invalid UTF-16 and UTF-32 characters become U+FFFD. Text without a mark is returned unchanged.
std::string decoded_by_mark(std::string_view text);

}  // namespace megatron_cpp::step37
