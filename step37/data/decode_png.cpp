#include <png.h>

#include <array>
#include <csetjmp>
#include <cstddef>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

#include "step37/data/decoders.h"

namespace megatron_cpp::step37 {
namespace internal {
namespace {

// libpng reports errors by longjmp, which skips destructors: functions that call it keep all their objects in here.
struct PngDecoding {
  std::span<const uint8_t> bytes;
  int64_t max_pixels = 0;
  StoredPicture picture;
  std::array<char, 200> error{};
  png_structp png = nullptr;
  png_infop info = nullptr;
  std::vector<png_bytep> rows;
  ~PngDecoding() { png_destroy_read_struct(&png, &info, nullptr); }
};

[[noreturn]] void png_failed(png_structp png, png_const_charp message) {
  auto& decoding = *static_cast<PngDecoding*>(png_get_error_ptr(png));
  std::strncpy(decoding.error.data(), message, decoding.error.size() - 1);
  png_longjmp(png, 1);
}

void read_png_bytes(png_structp png, png_bytep target, size_t count) {
  auto& bytes = static_cast<PngDecoding*>(png_get_io_ptr(png))->bytes;
  if (count > bytes.size()) png_error(png, "the file ends too early");
  std::memcpy(target, bytes.data(), count);
  bytes = bytes.subspan(count);
}

/// libpng 1.6.39 allocates whatever length an eXIf chunk claims.
/// @throws std::runtime_error if a chunk before the pixels is longer than the file.
void check_chunks(std::span<const uint8_t> bytes) {
  constexpr size_t kSignature = 8;
  constexpr size_t kAround = 12;  // length, name and check sum
  for (size_t at = kSignature; at + 8 <= bytes.size();) {
    const auto* chunk = bytes.data() + at;
    if (std::memcmp(chunk + 4, "IDAT", 4) == 0) return;
    size_t length = 0;
    for (size_t i = 0; i < 4; ++i) length = length << 8U | chunk[i];
    if (length > bytes.size() - at) throw std::runtime_error("the file ends too early");
    at += length + kAround;
  }
}

/// False if the file is broken; decoding.error says how.
bool decode_png(PngDecoding& decoding) {
  if (setjmp(png_jmpbuf(decoding.png)) != 0) return false;
  png_structp png = decoding.png;
  png_set_read_fn(png, &decoding, read_png_bytes);
#if defined(MCPP_FUZZ)
  png_set_crc_action(png, PNG_CRC_QUIET_USE, PNG_CRC_QUIET_USE);  // or the checksums would reject every mutated file
#endif
  png_read_info(png, decoding.info);
  decoding.picture.width = png_get_image_width(png, decoding.info);
  decoding.picture.height = png_get_image_height(png, decoding.info);
#if defined(PNG_eXIf_SUPPORTED)
  png_uint_32 exif_size = 0;
  png_bytep exif = nullptr;
  if (png_get_eXIf_1(png, decoding.info, &exif_size, &exif) != 0) {
    decoding.picture.orientation = exif_orientation({exif, exif_size});
  }
#endif
  if (!is_wanted(decoding.picture, decoding.max_pixels)) return true;

  png_set_expand(png);
  png_set_strip_16(png);
  png_set_gray_to_rgb(png);
  png_set_add_alpha(png, 0xff, PNG_FILLER_AFTER);
  png_set_interlace_handling(png);
  png_read_update_info(png, decoding.info);
  const size_t row_bytes = png_get_rowbytes(png, decoding.info);
  if (row_bytes != static_cast<size_t>(decoding.picture.width) * 4) png_error(png, "its rows aren't RGBA");
  decoding.picture.pixels.resize(row_bytes * static_cast<size_t>(decoding.picture.height));
  decoding.rows.resize(static_cast<size_t>(decoding.picture.height));
  for (size_t row = 0; row < decoding.rows.size(); ++row) {
    decoding.rows[row] = decoding.picture.pixels.data() + row * row_bytes;
  }
  png_read_image(png, decoding.rows.data());
  return true;
}

}  // namespace

StoredPicture decode_png(std::span<const uint8_t> bytes, int64_t max_pixels) {
  check_chunks(bytes);
  PngDecoding decoding;
  decoding.bytes = bytes;
  decoding.max_pixels = max_pixels;
  const auto ignore_warning = [](png_structp, png_const_charp) {};
  decoding.png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &decoding, png_failed, ignore_warning);
  if (decoding.png == nullptr) throw std::runtime_error("libpng is another one than this program was built with");
  decoding.info = png_create_info_struct(decoding.png);
  if (decoding.info == nullptr) throw std::bad_alloc();
  if (!decode_png(decoding)) throw std::runtime_error(decoding.error.data());
  return std::move(decoding.picture);
}

}  // namespace internal

std::string encode_png(std::span<const uint8_t> rgb, int64_t width, int64_t height) {
  png_image image{};
  image.version = PNG_IMAGE_VERSION;
  image.width = static_cast<png_uint_32>(width);
  image.height = static_cast<png_uint_32>(height);
  image.format = PNG_FORMAT_RGB;
  if (static_cast<int64_t>(rgb.size()) != 3 * width * height) throw std::runtime_error("not of width x height pixels");
  std::string file(PNG_IMAGE_PNG_SIZE_MAX(image), '\0');
  png_alloc_size_t size = file.size();
  const int ok = png_image_write_to_memory(&image, file.data(), &size, 0, rgb.data(), 0, nullptr);
  if (ok == 0) throw std::runtime_error(image.message);
  file.resize(size);
  return file;
}

}  // namespace megatron_cpp::step37
