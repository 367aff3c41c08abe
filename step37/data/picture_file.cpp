#include "step37/data/picture_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "step37/data/decoders.h"

namespace megatron_cpp::step37 {
namespace {

using internal::StoredPicture;
using Decoder = StoredPicture (*)(std::span<const uint8_t>, int64_t);

std::string_view text_of(std::span<const uint8_t> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

/// The decoder for the signature at the beginning of a file; null if there is none.
Decoder decoder_of(std::string_view file) {
  using namespace std::string_view_literals;
  if (file.starts_with("\x89PNG\r\n\x1a\n")) return internal::decode_png;
  if (file.starts_with("\xff\xd8")) return internal::decode_jpeg;
  if (file.starts_with("RIFF") && file.substr(std::min<size_t>(8, file.size())).starts_with("WEBP")) {
    return internal::decode_webp;
  }
  if (file.starts_with("GIF87a") || file.starts_with("GIF89a")) return internal::decode_gif;
  if (file.starts_with("BM")) return internal::decode_bmp;
  for (const auto mark : {"II*\0"sv, "MM\0*"sv, "II+\0"sv, "MM\0+"sv}) {
    if (file.starts_with(mark)) return internal::decode_tiff;
  }
  return nullptr;
}

/// The name of a known format without decoder, by the beginning of the file.
std::string_view other_format(std::string_view file) {
  using namespace std::string_view_literals;
  constexpr std::pair<std::string_view, std::string_view> kMarks[] = {
      {"version https://git-lfs"sv, "a pointer of Git LFS (git lfs pull gets the picture)"sv},
      {"\0\0\0\x0cJXL "sv, "JPEG XL"sv},
      {"\xff\x0a"sv, "JPEG XL"sv},
      {"\0\0\0\x0cjP"sv, "JPEG 2000"sv},
      {"\xff\x4f\xff\x51"sv, "JPEG 2000"sv},
      {"8BPS"sv, "a Photoshop file"sv},
      {"%PDF"sv, "PDF"sv},
      {"\x76\x2f\x31\x01"sv, "OpenEXR"sv},
      {"\0\0\1\0"sv, "an icon"sv},
      {"<"sv, "SVG, HTML or other XML"sv},
      {"qoif"sv, "QOI"sv},
      {"PK\3\4"sv, "an archive"sv},
  };
  for (const auto& [mark, name] : kMarks) {
    if (file.starts_with(mark)) return name;
  }
  if (file.size() >= 12 && file.substr(4, 4) == "ftyp") {
    const auto brand = file.substr(8, 4);
    if (brand.starts_with("avi")) return "AVIF";
    return brand.starts_with("he") || brand.starts_with("mif1") || brand.starts_with("msf1") ? "HEIF" : "a video";
  }
  return {};
}

/// Turns the picture upright. Orientations above 4 swap width and height.
RgbaPicture upright(StoredPicture stored) {
  const int orientation = stored.orientation;
  RgbaPicture picture = std::move(stored);
  if (orientation <= 1 || orientation > 8) return picture;
  const int64_t w = picture.width;
  const int64_t h = picture.height;
  const bool transposed = orientation > 4;
  if (transposed) std::swap(picture.width, picture.height);
  if (picture.pixels.empty()) return picture;
  const bool from_right = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
  const bool from_below = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  const auto before = std::exchange(picture.pixels, std::vector<uint8_t>(picture.pixels.size()));
  uint8_t* to = picture.pixels.data();
  for (int64_t row = 0; row < picture.height; ++row) {
    for (int64_t column = 0; column < picture.width; ++column, to += 4) {
      const int64_t x = transposed ? row : column;
      const int64_t y = transposed ? column : row;
      std::memcpy(to, before.data() + 4 * ((from_below ? h - 1 - y : y) * w + (from_right ? w - 1 - x : x)), 4);
    }
  }
  return picture;
}

}  // namespace

RgbaPicture decode_picture_file(std::span<const uint8_t> bytes, int64_t max_pixels) {
  const auto file = text_of(bytes);
  const auto decoder = decoder_of(file);
  if (decoder == nullptr) {
    const auto name = other_format(file);
    throw std::runtime_error(name.empty() ? "it is none of PNG, JPEG, WebP, GIF, BMP, TIFF"
                                          : fmt::format("it is {}, which isn't read", name));
  }
  auto stored = decoder(bytes, max_pixels);
  if (stored.width <= 0 || stored.height <= 0) throw std::runtime_error("it has no pixels");
  return upright(std::move(stored));
}

bool is_picture_file(std::span<const uint8_t> bytes) { return decoder_of(text_of(bytes)) != nullptr; }

namespace internal {

int exif_orientation(std::span<const uint8_t> exif) {
  using namespace std::string_view_literals;
  if (text_of(exif).starts_with("Exif\0\0"sv)) exif = exif.subspan(6);
  const bool little = text_of(exif).starts_with("II*\0"sv);
  if (!little && !text_of(exif).starts_with("MM\0*"sv)) return 1;
  const auto number = [&](size_t at, size_t size) -> std::optional<uint32_t> {
    if (at + size > exif.size()) return std::nullopt;
    uint32_t value = 0;
    for (size_t i = 0; i < size; ++i) value = value << 8U | exif[little ? at + size - 1 - i : at + i];
    return value;
  };
  const size_t directory = number(4, 4).value_or(0);
  const size_t num_entries = number(directory, 2).value_or(0);
  constexpr uint32_t kOrientation = 0x0112;
  constexpr uint32_t kShort = 3;
  for (size_t i = 0; i < num_entries; ++i) {
    const size_t entry = directory + 2 + 12 * i;
    if (number(entry, 2) != kOrientation) continue;
    const auto value = number(entry + 8, 2).value_or(1);
    return number(entry + 2, 2) == kShort && value >= 1 && value <= 8 ? static_cast<int>(value) : 1;
  }
  return 1;
}

}  // namespace internal
}  // namespace megatron_cpp::step37
