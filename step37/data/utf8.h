// Text from outside that has to be UTF-8.
#pragma once

#include <string>
#include <string_view>

namespace megatron_cpp::step37 {

/// Whether `text` is UTF-8 throughout: no cut or overlong characters, no surrogates, nothing above U+10FFFF.
bool is_utf8(std::string_view text);

/// `text` with U+FFFD, the replacement character, in place of every byte that is part of no character.
std::string to_utf8(std::string_view text);

/// `text` as it can be printed, in UTF-8 and on one line: control characters, line and direction marks, and bytes that
/// are part of no character, are written \xNN, byte by byte. Names of files may hold any byte.
std::string printable(std::string_view text);

/// Whether `text`, in UTF-8, has a control character other than a tab.
bool has_control_character(std::string_view text);

/// `text` in UTF-8, if it begins with the byte order mark of UTF-8, UTF-16 or UTF-32, without the mark; what isn't a
/// character there becomes U+FFFD. Text without a mark is returned as it is, whatever it holds.
std::string decoded_by_mark(std::string_view text);

}  // namespace megatron_cpp::step37
