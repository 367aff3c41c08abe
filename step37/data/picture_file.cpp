#include "step37/data/picture_file.h"

// jpeglib.h wants <cstdio> before it.
// clang-format off
#include <cstdio>
#include <jpeglib.h>
// clang-format on
#include <png.h>

#include <algorithm>
#include <array>
#include <csetjmp>
#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <string>

namespace step37 {
namespace {

// Both libraries report errors by leaving through longjmp, which skips destructors: the functions that call them own
// nothing, and work on one of these.
struct Decoding {
  std::span<const uint8_t> bytes;
  int64_t max_pixels = 0;
  RgbaPicture picture;
  std::array<char, JMSG_LENGTH_MAX> error{};
};

bool is_wanted(const Decoding& decoding) {
  return decoding.picture.width * decoding.picture.height <= decoding.max_pixels;
}

// ------------------------------------------------------------------------------------------------------------- PNG

struct PngDecoding : Decoding {
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

/// False if the file is broken; decoding.error says how.
bool decode_png(PngDecoding& decoding) {
  if (setjmp(png_jmpbuf(decoding.png)) != 0) return false;
  png_structp png = decoding.png;
  png_set_read_fn(png, &decoding, read_png_bytes);
#if defined(MCPP_FUZZ)
  png_set_crc_action(png, PNG_CRC_QUIET_USE, PNG_CRC_QUIET_USE);  // nothing would get past the check sums
#endif
  png_read_info(png, decoding.info);
  decoding.picture.width = png_get_image_width(png, decoding.info);
  decoding.picture.height = png_get_image_height(png, decoding.info);
  if (!is_wanted(decoding)) return true;

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

RgbaPicture decode_png(std::span<const uint8_t> bytes, int64_t max_pixels) {
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

// ------------------------------------------------------------------------------------------------------------ JPEG

struct JpegDecoding : Decoding {
  jpeg_decompress_struct jpeg{};
  jpeg_error_mgr errors{};
  jpeg_progress_mgr progress{};
  std::jmp_buf jump{};
  std::vector<uint8_t> cmyk_row;
  ~JpegDecoding() { jpeg_destroy_decompress(&jpeg); }
};

[[noreturn]] void jpeg_failed(j_common_ptr jpeg) {
  auto& decoding = *static_cast<JpegDecoding*>(jpeg->client_data);
  jpeg->err->format_message(jpeg, decoding.error.data());
  std::longjmp(decoding.jump, 1);
}

/// A progressive file may hold thousands of scans, each as slow as a picture, in few bytes.
void check_scans(j_common_ptr jpeg) {
  constexpr int kMostScans = 500;
  auto& decoding = *static_cast<JpegDecoding*>(jpeg->client_data);
  if (decoding.jpeg.input_scan_number <= kMostScans) return;
  std::strncpy(decoding.error.data(), "it has more than 500 scans", decoding.error.size() - 1);
  std::longjmp(decoding.jump, 1);
}

/// Four inks to three lights; Adobe's files, which are nearly all, hold what isn't printed.
void cmyk_to_rgba(const uint8_t* cmyk, uint8_t* rgba, int64_t num_pixels, bool is_inverted) {
  for (int64_t i = 0; i < 4 * num_pixels; i += 4) {
    for (int64_t channel = 0; channel < 3; ++channel) {
      const int ink = is_inverted ? cmyk[i + channel] : 255 - cmyk[i + channel];
      const int black = is_inverted ? cmyk[i + 3] : 255 - cmyk[i + 3];
      rgba[i + channel] = static_cast<uint8_t>((ink * black + 127) / 255);
    }
    rgba[i + 3] = 255;
  }
}

/// False if the file is broken; decoding.error says how.
bool decode_jpeg(JpegDecoding& decoding) {
  if (setjmp(decoding.jump) != 0) return false;
  auto& jpeg = decoding.jpeg;
  jpeg_create_decompress(&jpeg);
  jpeg.client_data = &decoding;
  jpeg.progress = &decoding.progress;
  jpeg_mem_src(&jpeg, decoding.bytes.data(), decoding.bytes.size());
  jpeg_read_header(&jpeg, TRUE);
  decoding.picture.width = jpeg.image_width;
  decoding.picture.height = jpeg.image_height;
  if (!is_wanted(decoding)) return true;

  const bool is_cmyk = jpeg.jpeg_color_space == JCS_CMYK || jpeg.jpeg_color_space == JCS_YCCK;
  jpeg.out_color_space = is_cmyk ? JCS_CMYK : JCS_EXT_RGBA;
  jpeg_start_decompress(&jpeg);
  const size_t row_bytes = static_cast<size_t>(decoding.picture.width) * 4;
  decoding.picture.pixels.resize(row_bytes * static_cast<size_t>(decoding.picture.height));
  if (is_cmyk) decoding.cmyk_row.resize(row_bytes);
  while (jpeg.output_scanline < jpeg.output_height) {
    uint8_t* target = decoding.picture.pixels.data() + jpeg.output_scanline * row_bytes;
    uint8_t* row = is_cmyk ? decoding.cmyk_row.data() : target;
    jpeg_read_scanlines(&jpeg, &row, 1);
    if (is_cmyk) cmyk_to_rgba(row, target, decoding.picture.width, jpeg.saw_Adobe_marker != 0);
  }
  jpeg_finish_decompress(&jpeg);
  return true;
}

RgbaPicture decode_jpeg(std::span<const uint8_t> bytes, int64_t max_pixels) {
  JpegDecoding decoding;
  decoding.bytes = bytes;
  decoding.max_pixels = max_pixels;
  decoding.jpeg.err = jpeg_std_error(&decoding.errors);
  decoding.jpeg.client_data = &decoding;
  decoding.errors.error_exit = jpeg_failed;
  decoding.errors.output_message = [](j_common_ptr) {};
  decoding.progress.progress_monitor = check_scans;
  if (!decode_jpeg(decoding)) throw std::runtime_error(decoding.error.data());
  return std::move(decoding.picture);
}

}  // namespace

RgbaPicture decode_picture_file(std::span<const uint8_t> bytes, int64_t max_pixels) {
  constexpr size_t kPngSignature = 8;
  if (bytes.size() >= kPngSignature && png_sig_cmp(bytes.data(), 0, kPngSignature) == 0) {
    return decode_png(bytes, max_pixels);
  }
  if (bytes.size() >= 2 && bytes[0] == 0xff && bytes[1] == 0xd8) return decode_jpeg(bytes, max_pixels);
  throw std::runtime_error("it is neither PNG nor JPEG");
}

}  // namespace step37
