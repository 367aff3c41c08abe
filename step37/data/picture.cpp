#include "step37/data/picture.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <limits>
#include <optional>
#include <stdexcept>
#include <system_error>
#include <vector>

#include "step37/data/picture_file.h"

namespace step37 {
namespace {

/// At most `limit` bytes from the file's beginning; nothing if it can't be opened.
/// @throws std::runtime_error if it can't be read.
std::optional<std::vector<uint8_t>> read_bytes(const std::filesystem::path& path, int64_t limit) {
  std::error_code not_there;
  if (!std::filesystem::is_regular_file(path, not_there)) return std::nullopt;
  std::ifstream file(path, std::ios::binary);
  if (!file) return std::nullopt;
  std::vector<uint8_t> bytes(static_cast<size_t>(std::min<int64_t>(limit, static_cast<int64_t>(file_size(path)))));
  file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  if (file.bad()) throw std::runtime_error("reading it failed");
  bytes.resize(static_cast<size_t>(file.gcount()));
  return bytes;
}

constexpr int64_t kWholeFile = std::numeric_limits<int64_t>::max();

/// A file of a few bytes may say that it holds gigabytes of pixels.
constexpr int64_t kMaxPixels = 1 << 27;

/// What the header says. Throws as decode_picture_file does.
PictureSize size_in_header(const std::vector<uint8_t>& bytes) {
  const auto header = decode_picture_file(bytes, /*max_pixels=*/0);
  return {header.width, header.height};
}

/// The pixels of a picture; of a sliver, those of the square that plan_crops may have it padded to.
bool is_too_large(const PictureSize& size) {
  const auto [shorter, longer] = std::minmax(size.width, size.height);
  return (shorter < 32 ? longer : shorter) * longer > kMaxPixels;
}

/// `value` with opacity `alpha` over white. 255 is odd, so there are no ties and adding 127 rounds to nearest.
uint8_t over_white(int value, int alpha) {
  return static_cast<uint8_t>((value * alpha + 255 * (255 - alpha) + 127) / 255);
}

/// [3, height, width].
at::Tensor planes_over_white(const RgbaPicture& picture) {
  auto pixels = at::empty({3, picture.height, picture.width}, at::kByte);
  auto* out = pixels.mutable_data_ptr<uint8_t>();
  const int64_t num_pixels = picture.height * picture.width;
  for (int64_t i = 0; i < num_pixels; ++i) {
    const uint8_t* pixel = picture.pixels.data() + 4 * i;
    for (int64_t channel = 0; channel < 3; ++channel) {
      out[channel * num_pixels + i] = over_white(pixel[channel], pixel[3]);
    }
  }
  return pixels;
}

void check_pictures(const at::Tensor& pictures, const char* function) {
  TORCH_CHECK_VALUE(pictures.scalar_type() == at::kByte, function, " wants uint8 pictures, got ",
                    pictures.scalar_type());
  TORCH_CHECK_VALUE(pictures.dim() >= 3 && pictures.dim() <= 4 && pictures.size(-3) == 3, function,
                    " wants pictures [3, H, W] or [N, 3, H, W], got ", pictures.sizes());
}

/// The size that the first `limit` bytes of a file give; nothing if they don't, or it is too large.
std::optional<PictureSize> size_within(const std::filesystem::path& path, int64_t limit) {
  try {
    const auto bytes = read_bytes(path, limit);
    if (!bytes) return std::nullopt;
    const auto size = size_in_header(*bytes);
    return is_too_large(size) ? std::nullopt : std::optional(size);
  } catch (const std::runtime_error&) {
    return std::nullopt;
  }
}

}  // namespace

DecodedPicture decode_picture(const std::filesystem::path& path) {
  const auto failure = [&path](const std::string& reason) {
    return DecodedPicture{{}, "picture " + path.string() + " " + reason};
  };
  try {
    const auto bytes = read_bytes(path, kWholeFile);
    if (!bytes) return failure("can't be opened");
    if (bytes->empty()) return failure("is empty");
    if (const auto size = size_in_header(*bytes); is_too_large(size)) {
      return failure("has " + std::to_string(size.width) + " x " + std::to_string(size.height) + " pixels; at most " +
                     std::to_string(kMaxPixels) + " are read, where a sliver counts as a square");
    }
    return {planes_over_white(decode_picture_file(*bytes, kMaxPixels)), {}};
  } catch (const std::runtime_error& error) {
    return failure(std::string("can't be decoded: ") + error.what());
  }
}

std::optional<PictureSize> picture_size(const std::filesystem::path& path) {
  // Few files have more than 64 KiB before their size; a run looks at every picture before it begins.
  const auto size = size_within(path, int64_t{1} << 16);
  return size ? size : size_within(path, kWholeFile);
}

at::Tensor black_picture(int64_t height, int64_t width) {
  TORCH_CHECK_VALUE(height > 0 && width > 0, "a picture of ", height, " x ", width, " pixels");
  return at::zeros({3, height, width}, at::kByte);
}

at::Tensor resize(const at::Tensor& picture, int64_t height, int64_t width) {
  check_pictures(picture, "resize");
  TORCH_CHECK_VALUE(picture.is_cpu(), "resize wants a picture on the CPU, got ", picture.device());
  TORCH_CHECK_VALUE(picture.size(-2) > 0 && picture.size(-1) > 0 && height > 0 && width > 0, "resize from ",
                    picture.size(-2), " x ", picture.size(-1), " to ", height, " x ", width, " pixels");
  if (picture.size(-2) == height && picture.size(-1) == width) return picture;
  const bool is_batch = picture.dim() == 4;
  const auto batch = (is_batch ? picture : picture.unsqueeze(0)).contiguous();
  const auto resized = at::_upsample_bilinear2d_aa(batch, {height, width}, /*align_corners=*/false);
  return is_batch ? resized : resized.squeeze(0);
}

at::Tensor normalize(const at::Tensor& pictures) {
  check_pictures(pictures, "normalize");
  TORCH_CHECK_VALUE(pictures.dim() == 4, "normalize wants pictures [N, 3, H, W], got ", pictures.sizes());
  // https://github.com/openai/CLIP, clip.py: _transform. Numbers, not tensors: making a tensor on a GPU waits for it.
  constexpr std::array<double, 3> kMean{0.48145466, 0.4578275, 0.40821073};
  constexpr std::array<double, 3> kDeviation{0.26862954, 0.26130258, 0.27577711};
  const auto normalized = pictures.to(at::kFloat).div_(255);
  for (size_t channel = 0; channel < kMean.size(); ++channel) {
    normalized.select(1, static_cast<int64_t>(channel)).sub_(kMean[channel]).div_(kDeviation[channel]);
  }
  return normalized;
}

}  // namespace step37
