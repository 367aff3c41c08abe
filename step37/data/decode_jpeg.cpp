// jpeglib.h needs <cstdio> before it.
// clang-format off
#include <cstdio>
#include <jpeglib.h>
#include <jerror.h>
// clang-format on

#include <array>
#include <csetjmp>
#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "step37/data/decoders.h"

namespace megatron_cpp::step37::internal {
namespace {

// libjpeg reports errors by longjmp, which skips destructors: functions that call it keep all their objects in here.
struct JpegDecoding {
  std::span<const uint8_t> bytes;
  int64_t max_pixels = 0;
  StoredPicture picture;
  std::array<char, JMSG_LENGTH_MAX> error{};
  std::array<char, JMSG_LENGTH_MAX> damage{};
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

/// Keeps the first warning that means lost pixels; other warnings are ignored.
void note_damage(j_common_ptr jpeg, int level) {
  auto& damage = static_cast<JpegDecoding*>(jpeg->client_data)->damage;
  if (level >= 0 || damage[0] != 0) return;
  switch (jpeg->err->msg_code) {
    case JWRN_ARITH_BAD_CODE:
    case JWRN_BOGUS_PROGRESSION:
    case JWRN_HIT_MARKER:
    case JWRN_HUFF_BAD_CODE:
    case JWRN_JPEG_EOF:
    case JWRN_MUST_RESYNC:
    case JWRN_NOT_SEQUENTIAL:
      jpeg->err->format_message(jpeg, damage.data());
      break;
    default:
      break;
  }
}

/// A small progressive file may have thousands of scans, each as slow to decode as a whole picture.
void check_scans(j_common_ptr jpeg) {
  constexpr int kMostScans = 500;
  auto& decoding = *static_cast<JpegDecoding*>(jpeg->client_data);
  if (decoding.jpeg.input_scan_number <= kMostScans) return;
  std::strncpy(decoding.error.data(), "it has more than 500 scans", decoding.error.size() - 1);
  std::longjmp(decoding.jump, 1);
}

/// CMYK to RGB. Files written by Adobe programs (nearly all) store 255 minus each value.
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
  jpeg_save_markers(&jpeg, JPEG_APP0 + 1, 0xffff);  // EXIF
  jpeg_read_header(&jpeg, TRUE);
  decoding.picture.width = jpeg.image_width;
  decoding.picture.height = jpeg.image_height;
  for (auto marker = jpeg.marker_list; marker != nullptr; marker = marker->next) {
    const std::span<const uint8_t> data(marker->data, marker->data_length);
    if (data.size() < 6 || std::memcmp(data.data(), "Exif\0\0", 6) != 0) continue;
    decoding.picture.orientation = exif_orientation(data);
    break;
  }
  if (!is_wanted(decoding.picture, decoding.max_pixels)) return true;

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

}  // namespace

StoredPicture decode_jpeg(std::span<const uint8_t> bytes, int64_t max_pixels) {
  JpegDecoding decoding;
  decoding.bytes = bytes;
  decoding.max_pixels = max_pixels;
  decoding.jpeg.err = jpeg_std_error(&decoding.errors);
  decoding.jpeg.client_data = &decoding;
  decoding.errors.error_exit = jpeg_failed;
  decoding.errors.emit_message = note_damage;
  decoding.progress.progress_monitor = check_scans;
  if (!decode_jpeg(decoding)) throw std::runtime_error(decoding.error.data());
  decoding.picture.damage = decoding.damage.data();
  return std::move(decoding.picture);
}

}  // namespace megatron_cpp::step37::internal
