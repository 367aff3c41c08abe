// Text from outside that has to be UTF-8.
#pragma once

#include <string>
#include <string_view>

namespace step37 {

/// Whether `text` is UTF-8 throughout: no cut or overlong characters, no surrogates, nothing above U+10FFFF.
bool is_utf8(std::string_view text);

/// `text` with U+FFFD, the replacement character, in place of every byte that is part of no character.
std::string to_utf8(std::string_view text);

}  // namespace step37
