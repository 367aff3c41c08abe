#include "step37/data/picture.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <fstream>
#include <iterator>
#include <limits>
#include <memory>
#include <optional>
#include <system_error>
#include <vector>

// The one translation unit with stb_image's implementation; static, so that it meets no other copy when linked.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wshadow"
#define STB_IMAGE_STATIC
#define STB_IMAGE_IMPLEMENTATION
#define STBI_ONLY_PNG
#define STBI_ONLY_JPEG
#define STBI_NO_STDIO
#define STBI_FAILURE_USERMSG
#include <stb/stb_image.h>
#pragma GCC diagnostic pop

namespace step37 {
namespace {

struct FreePixels {
  void operator()(stbi_uc* pixels) const { stbi_image_free(pixels); }
};

std::optional<std::vector<stbi_uc>> read_bytes(const std::filesystem::path& path) {
  std::error_code not_there;
  if (!std::filesystem::is_regular_file(path, not_there)) return std::nullopt;
  std::ifstream file(path, std::ios::binary);
  if (!file) return std::nullopt;
  return std::vector<stbi_uc>(std::istreambuf_iterator<char>(file), {});
}

/// `value` with opacity `alpha` over white. 255 is odd, so there are no ties and adding 127 rounds to nearest.
uint8_t over_white(int value, int alpha) {
  return static_cast<uint8_t>((value * alpha + 255 * (255 - alpha) + 127) / 255);
}

/// [3, height, width] from height * width RGBA pixels.
at::Tensor planes_over_white(const stbi_uc* rgba, int64_t height, int64_t width) {
  auto pixels = at::empty({3, height, width}, at::kByte);
  auto* out = pixels.mutable_data_ptr<uint8_t>();
  const int64_t num_pixels = height * width;
  for (int64_t i = 0; i < num_pixels; ++i) {
    const stbi_uc* pixel = rgba + 4 * i;
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

DecodedPicture decode_picture(const std::filesystem::path& path) {
  const auto failure = [&path](const std::string& reason) {
    return DecodedPicture{{}, "picture " + path.string() + " " + reason};
  };
  const auto bytes = read_bytes(path);
  if (!bytes) return failure("can't be opened");
  if (bytes->empty()) return failure("is empty");
  if (bytes->size() > static_cast<size_t>(std::numeric_limits<int>::max())) return failure("is larger than 2 GiB");

  int width = 0;
  int height = 0;
  int channels_in_file = 0;
  const std::unique_ptr<stbi_uc, FreePixels> rgba(
      stbi_load_from_memory(bytes->data(), static_cast<int>(bytes->size()), &width, &height, &channels_in_file, 4));
  if (!rgba) return failure(std::string("can't be decoded: ") + stbi_failure_reason());
  return {planes_over_white(rgba.get(), height, width), {}};
}

std::optional<PictureSize> picture_size(const std::filesystem::path& path) {
  const auto bytes = read_bytes(path);
  if (!bytes || bytes->size() > static_cast<size_t>(std::numeric_limits<int>::max())) return std::nullopt;
  int width = 0;
  int height = 0;
  int channels = 0;
  const int known = stbi_info_from_memory(bytes->data(), static_cast<int>(bytes->size()), &width, &height, &channels);
  if (known == 0 || width <= 0 || height <= 0) return std::nullopt;
  return PictureSize{width, height};
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
  // https://github.com/openai/CLIP, clip.py: _transform.
  const auto options = at::TensorOptions(at::kFloat).device(pictures.device());
  const auto mean = at::tensor({0.48145466, 0.4578275, 0.40821073}, options).view({1, 3, 1, 1});
  const auto deviation = at::tensor({0.26862954, 0.26130258, 0.27577711}, options).view({1, 3, 1, 1});
  return pictures.to(at::kFloat).div_(255).sub_(mean).div_(deviation);
}

}  // namespace step37
