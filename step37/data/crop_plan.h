// How a picture is cut into views: one global view of the whole, and square crops at higher resolution.
//
// The arithmetic is that of the reference processor (transformers, models/step3p7/image_processing_step3p7.py), not of
// the older published code: crops are cut from the unscaled picture, and a crop row or column that is shorter than the
// window is stretched instead of padded.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace megatron_cpp::step37 {

/// Sizes of the views, in pixels. The defaults are the released model's.
struct CropOptions {
  int64_t global_side = 728;       ///< the global view is square
  int64_t crop_side = 504;         ///< each crop is square
  int64_t max_side = 3024;         ///< larger pictures are scaled down
  int64_t vision_patch_size = 14;  ///< pixels of one patch of the vision tower
  bool with_crops = true;          ///< false: only the global view

  /// Number of feature rows that the vision tower gives for one view: side / vision_patch_size patches, halved twice by
  /// its stride-2 convolutions (rounding up), squared. 169 and 81 by default.
  int64_t global_tokens() const;
  int64_t crop_tokens() const;

  /// @throws c10::ValueError naming the size that isn't positive or isn't a multiple of vision_patch_size.
  void validate() const;
};

/// What is cut out of one picture. Without crops, window, nx and ny are 0 and the crop size is the global size.
struct CropPlan {
  bool square_pad = false;   ///< pad with zeros, right or below, to a square first
  int64_t global_width = 0;  ///< size to scale to before the global view is made square
  int64_t global_height = 0;
  int64_t crop_width = 0;  ///< size to scale to before crops are cut: nx * window, or less than window if nx is 1
  int64_t crop_height = 0;
  int64_t window = 0;  ///< side of a crop in that scaled picture
  int64_t nx = 0;      ///< crops in a row
  int64_t ny = 0;      ///< rows of crops

  int64_t num_crops() const { return nx * ny; }
};

/// Plans the views of a picture:
///   - a side below 32 pixels and sides in a ratio above 4: pad to a square;
///   - a side above max_side: scale down, sides rounded down, but to at least 1 (where the reference fails);
///   - window: no crops if the long side is <= global_side, unless long / short > 1.5 (then the short side);
///     otherwise crop_side, or min(short, crop_side) if long / short > 4;
///   - each side to a multiple of the window: up if the remainder is above 20 % of the window, else down; a side below
///     the window is kept.
/// @throws c10::ValueError if a side isn't positive.
CropPlan plan_crops(int64_t width, int64_t height, const CropOptions& options);

/// Per crop, row by row: whether <patch_newline> follows it. True for the last crop of every row but the last row.
std::vector<bool> newline_mask(const CropPlan& plan);

/// Ids of the symbols that represent views in a token sequence.
struct PictureTokenIds {
  int64_t im_start;
  int64_t im_patch;
  int64_t im_end;
  int64_t patch_start;
  int64_t patch_end;
  int64_t patch_newline;
};

/// The tokens of one picture: for each crop <patch_start>, crop_tokens() x <im_patch>, <patch_end> and, where
/// newline_mask says so, <patch_newline>; then <im_start>, global_tokens() x <im_patch>, <im_end>.
std::vector<int64_t> picture_tokens(const CropPlan& plan, const CropOptions& options, const PictureTokenIds& ids);

/// The views of one picture, uint8 on the CPU: what step37::normalize and then the vision tower take.
struct PictureViews {
  at::Tensor global;  ///< [1, 3, global_side, global_side]
  at::Tensor crops;   ///< [plan.num_crops(), 3, crop_side, crop_side], row by row
};

/// Cuts the views of `picture`, [3, H, W] uint8 on the CPU, by `plan` = plan_crops(W, H, options).
/// @throws c10::ValueError for another dtype, device or shape.
PictureViews cut_views(const at::Tensor& picture, const CropPlan& plan, const CropOptions& options);

}  // namespace megatron_cpp::step37
