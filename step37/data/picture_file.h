// PNG and JPEG files to pixels, by libpng and libjpeg-turbo.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace step37 {

/// What a file holds, row by row from the top.
struct RgbaPicture {
  int64_t width = 0;
  int64_t height = 0;
  std::vector<uint8_t> pixels;  ///< [height, width, 4]: red, green, blue, opacity
};

/// Decodes a PNG or JPEG file that is in memory. Gray and palette pictures become RGB, 16-bit samples keep their upper
/// 8 bits, CMYK becomes RGB without a colour profile; EXIF orientation and gamma aren't applied. Of a JPEG cut short
/// there is what arrived. Not collective; safe to call from several threads.
/// @param max_pixels  larger pictures aren't decoded: their pixels stay empty.
/// @throws std::runtime_error with what is wrong with the file.
RgbaPicture decode_picture_file(std::span<const uint8_t> bytes, int64_t max_pixels);

}  // namespace step37
