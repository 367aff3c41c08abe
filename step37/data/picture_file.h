// Decodes picture files in memory: PNG, JPEG, WebP, GIF, BMP and TIFF, each with its own library.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace megatron_cpp::step37 {

/// A decoded picture, row by row from the top.
struct RgbaPicture {
  int64_t width = 0;
  int64_t height = 0;
  std::vector<uint8_t> pixels;  ///< [height, width, 4]: red, green, blue, opacity
  std::string damage;           ///< what is wrong with a file that has pixels nevertheless, or empty
};

/// Decodes a picture file in memory; the format is recognised by its bytes. Gray and palette pictures become RGB,
/// 16-bit samples keep their upper 8 bits, CMYK becomes RGB without a colour profile; gamma isn't applied. The picture
/// is turned upright by its EXIF or TIFF orientation (in a PNG only if it comes before the pixels). Animations give
/// their first frame, files of several pages their first page. A truncated JPEG gives the pixels that are there and
/// sets `damage`. Not collective; safe to call from several threads.
/// @param max_pixels  the pixels of larger pictures stay empty. With 0, the beginning of a file is usually enough.
/// @throws std::runtime_error with what is wrong with the file ("it is HEIF, which isn't read").
RgbaPicture decode_picture_file(std::span<const uint8_t> bytes, int64_t max_pixels);

/// Whether a file that begins with `bytes` (12 are enough) has a format that decode_picture_file reads.
bool is_picture_file(std::span<const uint8_t> bytes);

/// A PNG file of [height, width, 3] red, green, blue.
/// @throws std::runtime_error with libpng's reason.
std::string encode_png(std::span<const uint8_t> rgb, int64_t width, int64_t height);

}  // namespace megatron_cpp::step37
