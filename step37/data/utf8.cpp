#include "step37/data/utf8.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace megatron_cpp::step37 {
namespace {

struct ByteRange {
  unsigned char first;
  unsigned char last;
};

/// A character that begins with a byte in `lead` has `length` bytes: the second in `second`, others in [0x80, 0xbf].
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

/// Number of bytes of the first character of `text`, which isn't empty; 0 if it doesn't begin with a character.
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

/// Whether one UTF-8 character is a C0 or C1 control or DEL.
bool is_control(std::string_view character) {
  const auto first = static_cast<unsigned char>(character.front());
  if (character.size() == 1) return first < 0x20 || first == 0x7f;
  return first == 0xc2 && static_cast<unsigned char>(character[1]) < 0xa0;
}

/// U+200E, U+200F, U+2028 to U+202E, U+2066 to U+2069: they would break or reverse the printed line.
bool is_line_or_direction_mark(std::string_view character) {
  if (!character.starts_with("\xe2")) return false;
  const auto code = (character[1] & 0x3f) << 6 | (character[2] & 0x3f);  // below U+2000
  return code == 0x0e || code == 0x0f || (code >= 0x28 && code <= 0x2e) || (code >= 0x66 && code <= 0x69);
}

void append_utf8(std::string& text, uint32_t code) {
  const auto add = [&text](uint32_t byte) { text.push_back(static_cast<char>(byte)); };
  if (code > 0x10ffff || (code >= 0xd800 && code <= 0xdfff)) code = 0xfffd;
  if (code < 0x80) {
    add(code);
  } else if (code < 0x800) {
    add(0xc0 | code >> 6);
    add(0x80 | (code & 0x3f));
  } else {
    if (code < 0x10000) {
      add(0xe0 | code >> 12);
    } else {
      add(0xf0 | code >> 18);
      add(0x80 | (code >> 12 & 0x3f));
    }
    add(0x80 | (code >> 6 & 0x3f));
    add(0x80 | (code & 0x3f));
  }
}

/// Code units of `size` bytes to UTF-8. A truncated unit becomes U+FFFD, as does half of a surrogate pair.
std::string from_units(std::string_view text, size_t size, bool little_endian) {
  const auto unit = [&](size_t at) -> uint32_t {
    if (at + size > text.size()) return 0xfffd;
    uint32_t value = 0;
    for (size_t i = 0; i < size; ++i) {
      value = value << 8 | static_cast<unsigned char>(text[little_endian ? at + size - 1 - i : at + i]);
    }
    return value;
  };
  std::string result;
  for (size_t at = 0; at < text.size(); at += size) {
    uint32_t code = unit(at);
    if (size == 2 && code >= 0xd800 && code <= 0xdbff) {
      const auto low = unit(at + 2);
      if (low >= 0xdc00 && low <= 0xdfff) {
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
        at += size;
      }
    }
    append_utf8(result, code);
  }
  return result;
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

std::string printable(std::string_view text) {
  std::string result;
  while (!text.empty()) {
    const auto length = first_length(text);
    const auto character = text.substr(0, std::max<size_t>(1, length));
    if (length > 0 && !is_control(character) && !is_line_or_direction_mark(character)) {
      result += character;
    } else {
      for (const char byte : character) result += fmt::format("\\x{:02x}", static_cast<unsigned char>(byte));
    }
    text.remove_prefix(character.size());
  }
  return result;
}

bool has_control_character(std::string_view text) {
  while (!text.empty()) {
    const auto character = text.substr(0, std::max<size_t>(1, first_length(text)));
    if (is_control(character) && character != "\t") return true;
    text.remove_prefix(character.size());
  }
  return false;
}

std::string decoded_by_mark(std::string_view text) {
  using namespace std::string_view_literals;
  // UTF-32's little-endian mark begins with UTF-16's.
  if (text.starts_with("\xff\xfe\0\0"sv)) return from_units(text.substr(4), 4, true);
  if (text.starts_with("\0\0\xfe\xff"sv)) return from_units(text.substr(4), 4, false);
  if (text.starts_with("\xff\xfe")) return from_units(text.substr(2), 2, true);
  if (text.starts_with("\xfe\xff")) return from_units(text.substr(2), 2, false);
  if (text.starts_with("\xef\xbb\xbf")) return std::string(text.substr(3));
  return std::string(text);
}

}  // namespace megatron_cpp::step37
