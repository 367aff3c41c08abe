// The images or image features to insert into a sequence, grouped by start token.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <variant>
#include <vector>

namespace megatron_cpp::step37 {

/// Features before the projector: [N, L, C] of N images, or one tensor per image, each [L_i, C] or [N_i, L, C].
using FeatureList = std::variant<at::Tensor, std::vector<at::Tensor>>;

/// Which rank holds which image of a group, if each image is on one tensor-parallel rank only. Equal on every rank.
struct HeldImages {
  /// [N] int64 on the CPU: the number of feature rows of each image, also of images that this rank doesn't hold.
  at::Tensor num_rows{};
  /// [N] int64 on the CPU: the rank that holds each image. Undefined: balanced by rows (parallel::balanced_assignment
  /// over all images of all groups, in order).
  at::Tensor holders{};
};

/// One insertion group: images (or multi-crop patches) whose features go after the occurrences of one token. Fields and
/// names are Megatron-Bridge's ImageForInsert; `held` is ours.
struct ImageForInsert {
  /// The token id after which features go: `<im_start>` for images, `<patch_start>` for patches.
  int64_t insert_start_token = -1;
  /// [N, 3, height, width] pixels for the vision tower, which fills image_features; undefined: none.
  at::Tensor images{};
  /// What is inserted; nothing until the tower has run.
  std::optional<FeatureList> image_features = std::nullopt;
  /// [N+1] int32, prefix sums of the patch counts per image, for towers that take images of several sizes in one call.
  /// This library's tower takes one size per call and doesn't read it. It is here so that code that fills the
  /// reference's struct compiles.
  at::Tensor rope_cu_seqlens{};
  /// The largest patch count of an image. Not read, as rope_cu_seqlens.
  std::optional<int64_t> rope_max_seq_len = std::nullopt;
  /// If set, `images` and `image_features` contain only the images that this rank holds, in the order of the group: the
  /// ranks share the vision tower's work. If not, they contain all N images of the group, on every rank.
  std::optional<HeldImages> held = std::nullopt;
};

/// The features as one tensor [L_i, C] per image, in order. No copies.
/// @throws c10::ValueError for a feature tensor that doesn't have 2 or 3 dimensions.
std::vector<at::Tensor> feature_blocks(const FeatureList& features);

namespace internal {

/// The tensors of the group's features as they were given: [L_i, C] of one image or [N_i, L, C] of several.
/// @throws c10::ValueError for a group without features, or a tensor that is neither.
std::vector<at::Tensor> feature_tensors(const ImageForInsert& group);

/// The number of feature rows of each image of a group, in order: from `held`, else from the sizes of the tensors.
/// @throws c10::ValueError as feature_tensors does, and for `num_rows` that isn't [N] int64 on the CPU.
std::vector<int64_t> rows_of(const ImageForInsert& group);

/// The numbers in `values`, which must be [N] int64 on the CPU.
/// @throws c10::ValueError naming `what` and the group's start token.
std::vector<int64_t> to_vector(const at::Tensor& values, const char* what, const ImageForInsert& group);

}  // namespace internal

}  // namespace megatron_cpp::step37
