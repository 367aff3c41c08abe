#include <fmt/format.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>

#include "step37/data/decoders.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#define STBI_ONLY_BMP
#define STBI_NO_STDIO
#define STB_IMAGE_STATIC
#define STB_IMAGE_IMPLEMENTATION
#include <stb/stb_image.h>
#pragma GCC diagnostic pop

namespace megatron_cpp::step37::internal {
namespace {

/// The header, to check the size of the file: stb_image would read zeros after its end.
struct BmpHeader {
  int64_t pixels_at = 0;
  int64_t width = 0;
  int64_t height = 0;
  int64_t bits = 0;

  int64_t file_size() const { return pixels_at + (width * bits + 31) / 32 * 4 * height; }
};

BmpHeader bmp_header(std::span<const uint8_t> bytes) {
  const auto number = [&](size_t at, size_t size) {
    if (at + size > bytes.size()) throw std::runtime_error("the file ends too early");
    int64_t value = 0;
    for (size_t i = size; i > 0; --i) value = value << 8 | bytes[at + i - 1];
    return value;
  };
  const auto signed_number = [&](size_t at) { return int64_t{static_cast<int32_t>(number(at, 4))}; };
  if (number(14, 4) == 12) return {number(10, 4), number(18, 2), number(20, 2), number(24, 2)};  // OS/2
  const int64_t compression = number(30, 4);
  if (compression != 0 && compression != 3) throw std::runtime_error("it is a compressed BMP file, which isn't read");
  return {number(10, 4), signed_number(18), std::abs(signed_number(22)), number(28, 2)};
}

}  // namespace

StoredPicture decode_bmp(std::span<const uint8_t> bytes, int64_t max_pixels) {
  constexpr int64_t kMaxSide = 1 << 24;  // limit of stb_image
  const auto header = bmp_header(bytes);
  if (header.width <= 0 || header.height <= 0 || header.width > kMaxSide || header.height > kMaxSide) {
    throw std::runtime_error(fmt::format("its sides are {} x {}", header.width, header.height));
  }
  StoredPicture picture;
  picture.width = header.width;
  picture.height = header.height;
  if (!is_wanted(picture, max_pixels)) return picture;
  const auto size = static_cast<int64_t>(bytes.size());
  if (size > std::numeric_limits<int>::max()) throw std::runtime_error("it has more than 2 GiB");
  if (header.file_size() > size) throw std::runtime_error("the file ends too early");
  int width = 0;
  int height = 0;
  int channels = 0;
  const std::unique_ptr<uint8_t, decltype(&std::free)> pixels(
      stbi_load_from_memory(bytes.data(), static_cast<int>(size), &width, &height, &channels, 4), std::free);
  if (pixels == nullptr || width != header.width || height != header.height) {
    throw std::runtime_error("its BMP data are broken, or of a kind that isn't read");
  }
  picture.pixels.assign(pixels.get(), pixels.get() + picture.width * picture.height * 4);
  return picture;
}

}  // namespace megatron_cpp::step37::internal
