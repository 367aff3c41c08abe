#include <gif_lib.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "step37/data/decoders.h"

namespace megatron_cpp::step37::internal {
namespace {

int read_gif_bytes(GifFileType* gif, GifByteType* target, int count) {
  auto& bytes = *static_cast<std::span<const uint8_t>*>(gif->UserData);
  const auto taken = std::min(bytes.size(), static_cast<size_t>(count));
  if (taken > 0) std::memcpy(target, bytes.data(), taken);
  bytes = bytes.subspan(taken);
  return static_cast<int>(taken);
}

[[noreturn]] void fail(int error) {
  const char* text = GifErrorString(error);
  throw std::runtime_error(text == nullptr ? "its GIF data are broken" : text);
}

void check(const GifFileType& gif, int status) {
  if (status != GIF_OK) fail(gif.Error);
}

/// Reads up to the descriptor of the first frame.
/// @return the transparent colour of the frame, -1 if it has none.
int find_first_frame(GifFileType& gif) {
  int transparent = NO_TRANSPARENT_COLOR;
  for (;;) {
    GifRecordType record = UNDEFINED_RECORD_TYPE;
    check(gif, DGifGetRecordType(&gif, &record));
    if (record == IMAGE_DESC_RECORD_TYPE) {
      check(gif, DGifGetImageDesc(&gif));
      return transparent;
    }
    if (record != EXTENSION_RECORD_TYPE) throw std::runtime_error("it holds no picture");
    int code = 0;
    GifByteType* block = nullptr;
    check(gif, DGifGetExtension(&gif, &code, &block));
    while (block != nullptr) {
      GraphicsControlBlock control{};
      if (code == GRAPHICS_EXT_FUNC_CODE && DGifExtensionToGCB(block[0], block + 1, &control) == GIF_OK) {
        transparent = control.TransparentColor;
      }
      check(gif, DGifGetExtensionNext(&gif, &block));
    }
  }
}

/// Copies one row of the frame to the picture; pixels outside the picture are left out.
void paint(const std::vector<GifPixelType>& line, const GifImageDesc& frame, int row, const ColorMapObject& colours,
           int transparent, StoredPicture& picture) {
  const int64_t y = int64_t{frame.Top} + row;
  if (y >= picture.height) return;
  const int64_t columns = std::min<int64_t>(frame.Width, picture.width - frame.Left);
  for (int64_t column = 0; column < columns; ++column) {
    const int index = line[static_cast<size_t>(column)];
    if (index == transparent) continue;
    const auto colour = index < colours.ColorCount ? colours.Colors[index] : GifColorType{0, 0, 0};
    uint8_t* pixel = picture.pixels.data() + 4 * (y * picture.width + frame.Left + column);
    pixel[0] = colour.Red;
    pixel[1] = colour.Green;
    pixel[2] = colour.Blue;
    pixel[3] = 255;
  }
}

}  // namespace

StoredPicture decode_gif(std::span<const uint8_t> bytes, int64_t max_pixels) {
  int error = 0;
  const auto close = [](GifFileType* gif) { DGifCloseFile(gif, nullptr); };
  const std::unique_ptr<GifFileType, decltype(close)> gif(DGifOpen(&bytes, read_gif_bytes, &error), close);
  if (gif == nullptr) fail(error);
  StoredPicture picture;
  picture.width = gif->SWidth;
  picture.height = gif->SHeight;
  if (!is_wanted(picture, max_pixels) || picture.width == 0 || picture.height == 0) return picture;

  const int transparent = find_first_frame(*gif);
  const auto& frame = gif->Image;
  const ColorMapObject* colours = frame.ColorMap != nullptr ? frame.ColorMap : gif->SColorMap;
  if (colours == nullptr) throw std::runtime_error("it has no colours");
  if (frame.Width <= 0 || frame.Height <= 0 || int64_t{frame.Width} * frame.Height > max_pixels) {
    throw std::runtime_error("its first frame is too large, or empty");
  }
  picture.pixels.resize(static_cast<size_t>(picture.width * picture.height * 4));  // transparent
  std::vector<GifPixelType> line(static_cast<size_t>(frame.Width));
  struct Pass {
    int first;
    int step;
  };
  constexpr Pass kInterlaced[] = {{0, 8}, {4, 8}, {2, 4}, {1, 2}};
  constexpr Pass kPlain[] = {{0, 1}};
  for (const auto& [first, step] :
       frame.Interlace ? std::span<const Pass>(kInterlaced) : std::span<const Pass>(kPlain)) {
    for (int row = first; row < frame.Height; row += step) {
      check(*gif, DGifGetLine(gif.get(), line.data(), frame.Width));
      paint(line, frame, row, *colours, transparent, picture);
    }
  }
  return picture;
}

}  // namespace megatron_cpp::step37::internal
