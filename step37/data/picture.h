// Picture files to tensors: decoding, resizing, normalising.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <string>

namespace megatron_cpp::step37 {

/// Where in a file a picture is. The default: it is the whole file.
struct PicturePlace {
  int64_t offset = 0;  ///< of its first byte
  int64_t bytes = 0;   ///< 0: up to the end of the file
};

/// What messages call a picture: "a.png", or in an archive "a.tar, byte 512".
std::string picture_name(const std::filesystem::path& path, const PicturePlace& place = {});

/// A decoded picture, or the reason why there is none.
struct DecodedPicture {
  at::Tensor pixels;   ///< [3, height, width] uint8 RGB on the CPU; undefined if decoding failed
  std::string error;   ///< empty, or a sentence that names the file
  std::string damage;  ///< empty, or a sentence that names the file: it is damaged, and some pixels are made up

  bool ok() const { return error.empty(); }
};

/// Decodes a picture file of any format that decode_picture_file knows, by its bytes, not its name. Transparent
/// pictures are composited over white: round((alpha * value + (255 - alpha) * 255) / 255), exactly. At most 2^27
/// pixels, where a picture less than 32 pixels wide or high counts as the square that plan_crops may pad it to. Safe to
/// call from several threads. A missing, empty or broken file sets `error` instead of throwing: a data set of millions
/// has some, and training continues with black_picture and a warning. A truncated JPEG gives the pixels that are there,
/// and sets `damage`.
DecodedPicture decode_picture(const std::filesystem::path& path, const PicturePlace& place = {});

/// Sides of a picture in pixels.
struct PictureSize {
  int64_t width = 0;
  int64_t height = 0;
};

/// The sides of a picture as decode_picture gives them, or the reason why there are none.
struct PictureHeader {
  PictureSize size;
  std::string error;  ///< empty, or the reason without the name of the file: "it is HEIF, which isn't read"

  bool ok() const { return error.empty(); }
};

/// The size that the beginning of a picture file gives, without decoding it.
PictureHeader read_picture_header(const std::filesystem::path& path, const PicturePlace& place = {});

/// [3, height, width] uint8, all zero.
/// @throws c10::ValueError if a side isn't positive.
at::Tensor black_picture(int64_t height, int64_t width);

/// A PNG file of `picture`, [3, H, W] uint8 on the CPU, scaled down to at most `max_side` pixels a side.
std::string thumbnail(const at::Tensor& picture, int64_t max_side);

/// Bilinear resize with antialiasing, as at::_upsample_bilinear2d_aa(align_corners=false) does it on uint8 (and so
/// torchvision, which the reference pipeline uses).
/// @param picture [3, H, W] or [N, 3, H, W] uint8 on the CPU
/// @return same rank, [.., 3, height, width] uint8; `picture` itself if it has that size
/// @throws c10::ValueError for another dtype, device or shape, an empty picture, or a side that isn't positive.
at::Tensor resize(const at::Tensor& picture, int64_t height, int64_t width);

/// (pixels / 255 - mean) / std with CLIP's mean and standard deviation per channel.
/// @param pictures [N, 3, H, W] uint8, any device; N may be 0
/// @return [N, 3, H, W] float32 on the same device
/// @throws c10::ValueError for another dtype or shape.
at::Tensor normalize(const at::Tensor& pictures);

}  // namespace megatron_cpp::step37
