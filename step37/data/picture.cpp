#include "step37/data/picture.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <fstream>
#include <limits>
#include <new>
#include <span>
#include <stdexcept>
#include <system_error>
#include <vector>

#include "step37/data/picture_file.h"
#include "step37/data/utf8.h"

namespace megatron_cpp::step37 {
namespace {

constexpr int64_t kWholeFile = std::numeric_limits<int64_t>::max();

/// Limits memory: the header of a small file may claim gigabytes of pixels.
constexpr int64_t kMaxPixels = 1 << 27;

/// At most `limit` bytes from the picture's beginning.
/// @throws std::runtime_error with the reason if there are none.
std::vector<uint8_t> read_bytes(const std::filesystem::path& path, const PicturePlace& place, int64_t limit) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (status.type() == std::filesystem::file_type::not_found) throw std::runtime_error("it isn't there");
  if (error) throw std::runtime_error(error.message());
  // Opening a pipe would block until another process writes to it.
  if (!std::filesystem::is_regular_file(status)) throw std::runtime_error("it isn't a file");
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(std::generic_category().message(errno));
  const auto size = static_cast<int64_t>(std::filesystem::file_size(path, error));
  if (error) throw std::runtime_error(error.message());
  const int64_t rest = std::max<int64_t>(0, size - place.offset);
  if (place.bytes > rest) throw std::runtime_error("its file is cut");
  std::vector<uint8_t> bytes(static_cast<size_t>(std::min(limit, place.bytes > 0 ? place.bytes : rest)));
  file.seekg(place.offset);
  file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  if (file.bad()) throw std::runtime_error("reading it failed");
  bytes.resize(static_cast<size_t>(file.gcount()));
  if (bytes.empty()) throw std::runtime_error("it is empty");
  return bytes;
}

/// Very narrow pictures count as the square that plan_crops may pad them to.
/// @throws std::runtime_error if the picture is too large.
void check_size(const PictureSize& size) {
  const auto [shorter, longer] = std::minmax(size.width, size.height);
  if ((shorter < 32 ? longer : shorter) * longer <= kMaxPixels) return;
  throw std::runtime_error(fmt::format("it has {} x {} pixels; at most {} are read, where a sliver counts as a square",
                                       size.width, size.height, kMaxPixels));
}

/// @throws std::runtime_error as decode_picture_file does, or if the picture is too large.
PictureSize size_in_header(const std::vector<uint8_t>& bytes) {
  const auto header = decode_picture_file(bytes, /*max_pixels=*/0);
  const PictureSize size{header.width, header.height};
  check_size(size);
  return size;
}

/// `value` with opacity `alpha` over white. 255 is odd, so there are no ties, and adding 127 rounds to nearest.
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

}  // namespace

std::string picture_name(const std::filesystem::path& path, const PicturePlace& place) {
  const auto file = printable(path.string());
  return place.offset == 0 ? file : fmt::format("{}, byte {}", file, place.offset);
}

DecodedPicture decode_picture(const std::filesystem::path& path, const PicturePlace& place) {
  const auto name = "picture " + picture_name(path, place);
  try {
    const auto bytes = read_bytes(path, place, kWholeFile);
    size_in_header(bytes);
    const auto picture = decode_picture_file(bytes, kMaxPixels);
    return {planes_over_white(picture), {}, picture.damage.empty() ? "" : name + " is damaged: " + picture.damage};
  } catch (const std::runtime_error& error) {
    return {{}, name + " can't be read: " + error.what(), {}};
  } catch (const std::bad_alloc&) {
    return {{}, name + " can't be read: too little memory", {}};
  }
}

PictureHeader read_picture_header(const std::filesystem::path& path, const PicturePlace& place) {
  // A run reads the header of every picture, and few files have their size after the first 64 KiB.
  for (const int64_t limit : {int64_t{1} << 16, kWholeFile}) {
    try {
      return {size_in_header(read_bytes(path, place, limit)), {}};
    } catch (const std::runtime_error& error) {
      if (limit == kWholeFile) return {{}, error.what()};
    }
  }
  return {};
}

at::Tensor black_picture(int64_t height, int64_t width) {
  TORCH_CHECK_VALUE(height > 0 && width > 0, "a picture of ", height, " x ", width, " pixels");
  return at::zeros({3, height, width}, at::kByte);
}

std::string thumbnail(const at::Tensor& picture, int64_t max_side) {
  const int64_t longer = std::max(picture.size(-2), picture.size(-1));
  const auto scaled = [&](int64_t side) {
    return longer <= max_side ? side : std::max<int64_t>(1, side * max_side / longer);
  };
  const auto small = resize(picture, scaled(picture.size(-2)), scaled(picture.size(-1)));
  const auto rows = small.permute({1, 2, 0}).contiguous();
  const std::span<const uint8_t> bytes(rows.const_data_ptr<uint8_t>(), static_cast<size_t>(rows.numel()));
  return encode_png(bytes, rows.size(1), rows.size(0));
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
  // https://github.com/openai/CLIP, clip.py: _transform. Numbers, not tensors: copying a tensor to a GPU would wait.
  constexpr std::array<double, 3> kMean{0.48145466, 0.4578275, 0.40821073};
  constexpr std::array<double, 3> kDeviation{0.26862954, 0.26130258, 0.27577711};
  const auto normalized = pictures.to(at::kFloat).div_(255);
  for (size_t channel = 0; channel < kMean.size(); ++channel) {
    normalized.select(1, static_cast<int64_t>(channel)).sub_(kMean[channel]).div_(kDeviation[channel]);
  }
  return normalized;
}

}  // namespace megatron_cpp::step37
