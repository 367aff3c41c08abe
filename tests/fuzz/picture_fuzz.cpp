// The input is a picture file of any format.
#include <ATen/ATen.h>

#include <algorithm>

#include "step37/data/crop_plan.h"
#include "step37/data/picture.h"
#include "tests/fuzz/fuzz.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp {
namespace {

/// Small views, so that many pictures a second are cut.
constexpr step37::CropOptions kOptions{.global_side = 16, .crop_side = 8, .max_side = 40, .vision_patch_size = 4};

/// The views of a picture and the tokens that stand for them belong together.
void check_views(const at::Tensor& pixels, const step37::PictureSize& size) {
  const auto plan = step37::plan_crops(size.width, size.height, kOptions);
  FUZZ_CHECK(plan.global_width <= kOptions.max_side && plan.global_height <= kOptions.max_side);
  const auto views = step37::cut_views(pixels, plan, kOptions);
  FUZZ_CHECK(views.global.sizes() == at::IntArrayRef({1, 3, 16, 16}), views.global.sizes());
  FUZZ_CHECK(views.crops.sizes() == at::IntArrayRef({plan.num_crops(), 3, 8, 8}), views.crops.sizes());
  const auto num_newlines = std::max<int64_t>(plan.ny - 1, 0);
  const auto tokens = step37::picture_tokens(plan, kOptions, {1, 2, 3, 4, 5, 6});
  FUZZ_CHECK(static_cast<int64_t>(tokens.size()) ==
             kOptions.global_tokens() + 2 + plan.num_crops() * (kOptions.crop_tokens() + 2) + num_newlines);
  const auto normal = step37::normalize(views.global);
  FUZZ_CHECK(normal.sizes() == views.global.sizes() && normal.scalar_type() == at::kFloat);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const test_support::TemporaryFolder folder;
  const auto path = folder.write("input", fuzz::text_of(data, size));
  const auto in_header = step37::read_picture_header(path);
  // A header of a few bytes may speak of many megabytes of pixels, legally: those cost time and find nothing.
  constexpr int64_t kMaxSide = 128;
  if (in_header.ok() && std::max(in_header.size.width, in_header.size.height) > kMaxSide) return 0;
  const auto decoded = step37::decode_picture(path);
  FUZZ_CHECK(decoded.ok() == decoded.pixels.defined());
  if (!decoded.ok()) {
    FUZZ_CHECK(fuzz::contains(decoded.error, path.string()), decoded.error, " names no file");
    return 0;
  }
  FUZZ_CHECK(in_header.ok(), "a picture without a size");
  FUZZ_CHECK(decoded.pixels.sizes() == at::IntArrayRef({3, in_header.size.height, in_header.size.width}));
  check_views(decoded.pixels, in_header.size);
  return 0;
}

}  // namespace megatron_cpp
