// What is inserted into a sequence, and where it belongs.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <variant>
#include <vector>

namespace step37 {

/// Features before the projector: [N, L, C] of N images, or one tensor per image, each [L_i, C] or [N_i, L, C].
using FeatureList = std::variant<at::Tensor, std::vector<at::Tensor>>;

/// One insertion group: images (or multi-crop patches) whose features go after the occurrences of one token. Fields and
/// names are Megatron-Bridge's ImageForInsert, and two of our own.
///
/// If `rows` is undefined, `images` and `image_features` hold all N images of the group, on every rank. If it is
/// defined, they hold only the images that this rank of the tensor-parallel group has, in the order of the group: how
/// the tower's work is spread over the ranks.
struct ImageForInsert {
  /// The token id after which features go: `<im_start>` for images, `<patch_start>` for patches.
  int64_t insert_start_token = -1;
  /// [N, 3, height, width] pixels for the vision tower, which fills image_features; undefined: none.
  at::Tensor images;
  /// What is inserted; nothing until the tower has run.
  std::optional<FeatureList> image_features;
  /// [N+1] int32: prefix sums of the patch counts per image.
  at::Tensor rope_cu_seqlens;
  /// Largest patch count of an image.
  std::optional<int64_t> rope_max_seq_len;

  /// [N] int64 on the CPU: the feature rows of each image of the group, so that ranks know the lengths of images that
  /// they don't hold. Equal on every rank.
  at::Tensor rows;
  /// [N] int64 on the CPU: the rank of the tensor-parallel group that holds each image. Undefined: balanced by rows
  /// (parallel::balanced_assignment over all images of all groups, in order). Equal on every rank.
  at::Tensor holders;
};

/// The features as one tensor [L_i, C] per image, in order. No copies.
/// @throws c10::ValueError for a feature tensor whose rank isn't 2 or 3.
std::vector<at::Tensor> feature_blocks(const FeatureList& features);

namespace internal {

/// The tensors of the list as they were given: [L_i, C] of one image or [N_i, L, C] of several.
/// @throws c10::ValueError for one that is neither.
std::vector<at::Tensor> feature_tensors(const FeatureList& features);

}  // namespace internal

}  // namespace step37
