#include <tiffio.h>

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "step37/data/decoders.h"

namespace megatron_cpp::step37::internal {
namespace {

struct TiffBytes {
  std::span<const uint8_t> bytes;
  uint64_t position = 0;
  std::array<char, 200> error{};  ///< the first error
};

TiffBytes& bytes_of(thandle_t handle) { return *static_cast<TiffBytes*>(handle); }

tmsize_t read_tiff(thandle_t handle, void* target, tmsize_t count) {
  auto& [bytes, position, error] = bytes_of(handle);
  if (position >= bytes.size() || count <= 0) return 0;
  const auto taken = std::min<uint64_t>(static_cast<uint64_t>(count), bytes.size() - position);
  std::memcpy(target, bytes.data() + position, taken);
  position += taken;
  return static_cast<tmsize_t>(taken);
}

toff_t seek_tiff(thandle_t handle, toff_t offset, int whence) {
  auto& [bytes, position, error] = bytes_of(handle);
  position = offset + (whence == SEEK_CUR ? position : whence == SEEK_END ? bytes.size() : 0);
  return position;
}

int keep_error(TIFF*, void* user, const char*, const char* format, std::va_list arguments) {
  auto& error = static_cast<TiffBytes*>(user)->error;
  if (error[0] == 0) std::vsnprintf(error.data(), error.size(), format, arguments);
  return 1;  // libtiff doesn't print it
}

TIFF* open_tiff(TiffBytes& file, int64_t max_pixels) {
  const std::unique_ptr<TIFFOpenOptions, decltype(&TIFFOpenOptionsFree)> options(TIFFOpenOptionsAlloc(),
                                                                                 TIFFOpenOptionsFree);
  if (options == nullptr) throw std::bad_alloc();
  const auto ignore = [](TIFF*, void*, const char*, const char*, std::va_list) { return 1; };
  TIFFOpenOptionsSetErrorHandlerExtR(options.get(), keep_error, &file);
  TIFFOpenOptionsSetWarningHandlerExtR(options.get(), ignore, nullptr);
  // Limits allocations for sizes that tags claim; a pixel may have several samples of 16 bits.
  TIFFOpenOptionsSetMaxSingleMemAlloc(options.get(), std::max<int64_t>(max_pixels * 16, 1 << 24));
  return TIFFClientOpenExt(
      "TIFF", "r", &file, read_tiff, [](thandle_t, void*, tmsize_t) { return tmsize_t{0}; }, seek_tiff,
      [](thandle_t) { return 0; }, [](thandle_t handle) { return toff_t{bytes_of(handle).bytes.size()}; },
      [](thandle_t, void**, toff_t*) { return 0; }, [](thandle_t, void*, toff_t) {}, options.get());
}

/// Frees what TIFFRGBAImageBegin allocated.
struct RgbaImage {
  TIFFRGBAImage image{};
  bool begun = false;
  ~RgbaImage() {
    if (begun) TIFFRGBAImageEnd(&image);
  }
};

}  // namespace

StoredPicture decode_tiff(std::span<const uint8_t> bytes, int64_t max_pixels) {
  TiffBytes file{bytes};
  const auto fail = [&file](const char* otherwise) {
    throw std::runtime_error(file.error[0] == 0 ? otherwise : file.error.data());
  };
  const std::unique_ptr<TIFF, decltype(&TIFFClose)> tiff(open_tiff(file, max_pixels), TIFFClose);
  if (tiff == nullptr) fail("its TIFF header is broken");
  StoredPicture picture;
  uint32_t width = 0;
  uint32_t height = 0;
  uint16_t orientation = 1;
  if (TIFFGetField(tiff.get(), TIFFTAG_IMAGEWIDTH, &width) == 0 ||
      TIFFGetField(tiff.get(), TIFFTAG_IMAGELENGTH, &height) == 0) {
    fail("its TIFF header gives no size");
  }
  TIFFGetFieldDefaulted(tiff.get(), TIFFTAG_ORIENTATION, &orientation);
  constexpr uint32_t kMaxSide = 1U << 30U;
  if (width > kMaxSide || height > kMaxSide) throw std::runtime_error("its sides have more than 2^30 pixels");
  picture.width = width;
  picture.height = height;
  picture.orientation = orientation;
  if (!is_wanted(picture, max_pixels)) return picture;

  RgbaImage reader;
  std::array<char, 1024> reason{};
  reader.begun = TIFFRGBAImageBegin(&reader.image, tiff.get(), /*stop=*/1, reason.data()) != 0;
  if (!reader.begun) throw std::runtime_error(reason.data());
  reader.image.req_orientation = reader.image.orientation;  // rows as they are stored; they are turned later
  std::vector<uint32_t> raster(static_cast<size_t>(picture.width * picture.height));
  if (TIFFRGBAImageGet(&reader.image, raster.data(), width, height) == 0) fail("its TIFF pixels are broken");
  picture.pixels.resize(raster.size() * 4);
  for (size_t i = 0; i < raster.size(); ++i) {
    // libtiff has multiplied colours by alpha: adding 255 - alpha puts them over white.
    const uint32_t white = 255 - TIFFGetA(raster[i]);
    const uint32_t colours[] = {TIFFGetR(raster[i]), TIFFGetG(raster[i]), TIFFGetB(raster[i])};
    for (size_t channel = 0; channel < 3; ++channel) {
      picture.pixels[4 * i + channel] = static_cast<uint8_t>(std::min<uint32_t>(255, colours[channel] + white));
    }
    picture.pixels[4 * i + 3] = 255;
  }
  return picture;
}

}  // namespace megatron_cpp::step37::internal
