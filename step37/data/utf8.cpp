#include "step37/data/utf8.h"

#include <algorithm>
#include <cstddef>

namespace step37 {
namespace {

struct ByteRange {
  unsigned char first;
  unsigned char last;
};

/// Characters that begin with a byte of `lead` are of so many bytes; the second is in `second`, the others are in
/// [0x80, 0xbf].
struct Form {
  ByteRange lead;
  size_t length;
  ByteRange second;
};

// The Unicode Standard, table 3-7, Well-Formed UTF-8 Byte Sequences.
constexpr Form kForms[] = {
    {{0x00, 0x7f}, 1, {}},           {{0xc2, 0xdf}, 2, {0x80, 0xbf}}, {{0xe0, 0xe0}, 3, {0xa0, 0xbf}},
    {{0xe1, 0xec}, 3, {0x80, 0xbf}}, {{0xed, 0xed}, 3, {0x80, 0x9f}}, {{0xee, 0xef}, 3, {0x80, 0xbf}},
    {{0xf0, 0xf0}, 4, {0x90, 0xbf}}, {{0xf1, 0xf3}, 4, {0x80, 0xbf}}, {{0xf4, 0xf4}, 4, {0x80, 0x8f}},
};

bool is_in(char byte, ByteRange range) {
  const auto value = static_cast<unsigned char>(byte);
  return value >= range.first && value <= range.last;
}

/// Bytes of the character that `text`, which isn't empty, begins with; 0 if it begins with none.
size_t first_length(std::string_view text) {
  for (const auto& form : kForms) {
    if (!is_in(text.front(), form.lead)) continue;
    if (text.size() < form.length || (form.length > 1 && !is_in(text[1], form.second))) return 0;
    const auto rest = text.substr(0, form.length).substr(std::min<size_t>(2, form.length));
    const bool ok = std::all_of(rest.begin(), rest.end(), [](char byte) { return is_in(byte, {0x80, 0xbf}); });
    return ok ? form.length : 0;
  }
  return 0;
}

}  // namespace

bool is_utf8(std::string_view text) {
  while (!text.empty()) {
    const auto length = first_length(text);
    if (length == 0) return false;
    text.remove_prefix(length);
  }
  return true;
}

std::string to_utf8(std::string_view text) {
  constexpr std::string_view kReplacement = "\xEF\xBF\xBD";
  std::string result;
  while (!text.empty()) {
    const auto length = first_length(text);
    result += length == 0 ? kReplacement : text.substr(0, length);
    text.remove_prefix(std::max<size_t>(1, length));
  }
  return result;
}

}  // namespace step37
