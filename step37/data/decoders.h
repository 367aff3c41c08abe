// One decoder per format, for picture_file.cpp.
#pragma once

#include <cstdint>
#include <span>

#include "step37/data/picture_file.h"

namespace megatron_cpp::step37::internal {

/// A picture as stored in its file, before it is turned upright.
struct StoredPicture : RgbaPicture {
  int orientation = 1;  ///< as in EXIF: 1 is upright, 2 to 8 mirrored or rotated
};

/// Whether the pixels are to be decoded. Decoders ask before they allocate memory for pixels.
inline bool is_wanted(const RgbaPicture& picture, int64_t max_pixels) {
  return picture.width * picture.height <= max_pixels;
}

// As decode_picture_file. `bytes` must begin with the signature of the format.
StoredPicture decode_png(std::span<const uint8_t> bytes, int64_t max_pixels);
StoredPicture decode_jpeg(std::span<const uint8_t> bytes, int64_t max_pixels);
StoredPicture decode_webp(std::span<const uint8_t> bytes, int64_t max_pixels);
StoredPicture decode_gif(std::span<const uint8_t> bytes, int64_t max_pixels);
StoredPicture decode_bmp(std::span<const uint8_t> bytes, int64_t max_pixels);
StoredPicture decode_tiff(std::span<const uint8_t> bytes, int64_t max_pixels);

/// The orientation in a block of EXIF data, with or without "Exif\0\0" before it; 1 if it has none or is broken.
int exif_orientation(std::span<const uint8_t> exif);

}  // namespace megatron_cpp::step37::internal
