#include "step37/data/crop_plan.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "step37/data/picture.h"

namespace megatron_cpp::step37 {
namespace {

int64_t tokens_of_side(int64_t side, int64_t vision_patch_size) {
  const int64_t patches = side / vision_patch_size;
  const int64_t halved = (patches + 1) / 2;
  const int64_t rows = (halved + 1) / 2;
  return rows * rows;
}

/// long / short in floating point: the reference compares ratios that way.
double side_ratio(int64_t width, int64_t height) {
  return static_cast<double>(std::max(width, height)) / static_cast<double>(std::min(width, height));
}

int64_t window_side(int64_t width, int64_t height, const CropOptions& options) {
  const int64_t short_side = std::min(width, height);
  const double ratio = side_ratio(width, height);
  if (!options.with_crops) return 0;
  if (std::max(width, height) <= options.global_side) return ratio > 1.5 ? short_side : 0;
  return ratio > 4.0 ? std::min(short_side, options.crop_side) : options.crop_side;
}

int64_t snap(int64_t side, int64_t window) {
  if (side < window) return side;
  // 0.2 * window in floating point, as in the reference: integers would round some remainders of exactly 20 % the other
  // way.
  const bool up = static_cast<double>(side % window) > 0.2 * static_cast<double>(window);
  return window * (side / window + (up ? 1 : 0));
}

at::Tensor pad_to_square(const at::Tensor& picture) {
  const int64_t height = picture.size(1);
  const int64_t width = picture.size(2);
  const int64_t side = std::max(height, width);
  return at::constant_pad_nd(picture, {0, side - width, 0, side - height});
}

}  // namespace

int64_t CropOptions::global_tokens() const { return tokens_of_side(global_side, vision_patch_size); }
int64_t CropOptions::crop_tokens() const { return tokens_of_side(crop_side, vision_patch_size); }

void CropOptions::validate() const {
  TORCH_CHECK_VALUE(vision_patch_size > 0, "vision_patch_size ", vision_patch_size, " isn't positive");
  TORCH_CHECK_VALUE(global_side > 0 && global_side % vision_patch_size == 0, "global_side ", global_side,
                    " isn't a positive multiple of vision_patch_size ", vision_patch_size);
  TORCH_CHECK_VALUE(crop_side > 0 && crop_side % vision_patch_size == 0, "crop_side ", crop_side,
                    " isn't a positive multiple of vision_patch_size ", vision_patch_size);
  TORCH_CHECK_VALUE(max_side > 0, "max_side ", max_side, " isn't positive");
}

CropPlan plan_crops(int64_t width, int64_t height, const CropOptions& options) {
  options.validate();
  TORCH_CHECK_VALUE(width > 0 && height > 0, "a picture of ", width, " x ", height, " pixels");
  CropPlan plan;
  plan.square_pad = std::min(width, height) < 32 && side_ratio(width, height) > 4.0;
  plan.global_width = plan.square_pad ? std::max(width, height) : width;
  plan.global_height = plan.square_pad ? std::max(width, height) : height;
  if (const int64_t long_side = std::max(width, height); long_side > options.max_side) {
    const double scale = static_cast<double>(options.max_side) / static_cast<double>(long_side);
    for (auto* side : {&plan.global_width, &plan.global_height}) {
      *side = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(*side) * scale));
    }
  }
  plan.crop_width = plan.global_width;
  plan.crop_height = plan.global_height;
  plan.window = window_side(plan.global_width, plan.global_height, options);
  if (plan.window == 0) return plan;
  plan.crop_width = snap(plan.global_width, plan.window);
  plan.crop_height = snap(plan.global_height, plan.window);
  plan.nx = std::max<int64_t>(1, plan.crop_width / plan.window);
  plan.ny = std::max<int64_t>(1, plan.crop_height / plan.window);
  return plan;
}

std::vector<bool> newline_mask(const CropPlan& plan) {
  std::vector<bool> mask;
  for (int64_t row = 0; row < plan.ny; ++row) {
    for (int64_t column = 0; column < plan.nx; ++column) {
      mask.push_back(column == plan.nx - 1 && row < plan.ny - 1);
    }
  }
  return mask;
}

std::vector<int64_t> picture_tokens(const CropPlan& plan, const CropOptions& options, const PictureTokenIds& ids) {
  std::vector<int64_t> tokens;
  for (const bool newline : newline_mask(plan)) {
    tokens.push_back(ids.patch_start);
    tokens.insert(tokens.end(), static_cast<size_t>(options.crop_tokens()), ids.im_patch);
    tokens.push_back(ids.patch_end);
    if (newline) tokens.push_back(ids.patch_newline);
  }
  tokens.push_back(ids.im_start);
  tokens.insert(tokens.end(), static_cast<size_t>(options.global_tokens()), ids.im_patch);
  tokens.push_back(ids.im_end);
  return tokens;
}

PictureViews cut_views(const at::Tensor& picture, const CropPlan& plan, const CropOptions& options) {
  TORCH_CHECK_VALUE(picture.dim() == 3, "cut_views wants a picture [3, H, W], got ", picture.sizes());
  const auto whole = plan.square_pad ? pad_to_square(picture) : picture;
  const auto scaled = resize(whole, plan.global_height, plan.global_width);
  PictureViews views;
  views.global = resize(scaled, options.global_side, options.global_side).unsqueeze(0);
  views.crops = at::empty({plan.num_crops(), 3, options.crop_side, options.crop_side}, at::kByte);
  if (plan.num_crops() == 0) return views;

  const auto for_crops = resize(whole, plan.crop_height, plan.crop_width);
  const int64_t tile_height = std::min(plan.window, plan.crop_height);
  const int64_t tile_width = std::min(plan.window, plan.crop_width);
  for (int64_t i = 0; i < plan.num_crops(); ++i) {
    const int64_t top = i / plan.nx * plan.window;
    const int64_t left = i % plan.nx * plan.window;
    const auto tile = for_crops.narrow(1, top, tile_height).narrow(2, left, tile_width);
    views.crops[i].copy_(resize(tile, options.crop_side, options.crop_side));
  }
  return views;
}

}  // namespace megatron_cpp::step37
