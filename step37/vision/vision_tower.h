// The vision tower of Step3.7 (Perception Encoder G/14): pictures to rows of image features.
//
// Two ways to share its work over a tensor-parallel group (MmEncoderTpMode):
//   kData     Every rank has the whole tower, and nothing is sent. The caller chooses which rank runs it on which
//             pictures, and the GradientDomain that fits that choice.
//   kWeights  The heads and the mlp of each block are split over the ranks, and every rank runs all pictures: two
//             all-reduces a block forward, and two backward.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "parallel/group.h"

namespace megatron_cpp::step37 {

/// What the ranks of a tensor-parallel group share out of the vision tower's work; vLLM's mm_encoder_tp_mode.
enum class MmEncoderTpMode {
  kData,     ///< pictures: each rank runs the whole tower on some of them
  kWeights,  ///< weights: each rank has some heads and a part of the mlp, and runs all pictures
};

/// Sizes of the vision tower; the defaults are the released model's.
struct VisionConfig {
  int64_t image_size = 728;       ///< side of the square picture whose patch grid positional_embedding holds
  int64_t patch_size = 14;        ///< side of a patch, in pixels
  int64_t width = 1536;           ///< channels inside the tower; the downsamplers go to 2 * width and 4 * width
  int64_t layers = 47;            ///< transformer blocks
  int64_t heads = 16;             ///< of every block, width / heads channels each
  int64_t mlp_width = 8960;       ///< channels between the mlp's two matrices
  double layer_scale_init = 0.1;  ///< initial value of ls_1 and ls_2
  double layer_norm_eps = 1e-5;   ///< added to the variance in every norm
  double rope_theta = 10000.0;    ///< base of the rotary frequencies, the same for both axes

  /// @throws c10::ValueError naming the field and the numbers: a size that isn't positive, image_size not a multiple of
  ///         patch_size, width not a multiple of 4 * heads (two axes of rotary pairs per head).
  void validate() const;
  /// What kWeights needs besides.
  /// @throws c10::ValueError naming the numbers if heads or mlp_width isn't divisible by tensor_parallel_size.
  void validate_split(int tensor_parallel_size) const;

  /// C, the channels of a feature row.
  int64_t output_dim() const { return 4 * width; }

  /// L, the feature rows of one picture: each side of its grid of patches is halved twice, rounding up.
  /// @throws c10::ValueError naming the sizes if a side isn't a positive multiple of patch_size.
  int64_t feature_rows(int64_t image_height, int64_t image_width) const;

  bool operator==(const VisionConfig&) const = default;  ///< every field alike
};

/// Patches + absolute positions, a norm, `layers` transformer blocks, two convolutions of stride 2:
///   x = ln_pre(conv1(pixels) + positions)
///   x = x + ls_1 attn(ln_1(x));  x = x + ls_2 mlp(ln_2(x))                                 in each block
///   features = vit_downsampler2(vit_downsampler1(x))
/// Attention is full, with rotary angles of the patch's column on the first half of a head and of its row on the second
/// half, on adjacent pairs (2i, 2i+1); the rows of attn.in_proj_weight are in that order, as in the published file. The
/// mlp's activation is x sigmoid(1.702 x).
/// Positions of a grid other than image_size / patch_size squared are resampled bilinearly (align_corners false).
///
/// Split over t ranks, rank r has of each block
///   attn.in_proj_weight  [3 * width / t, width], and attn.in_proj_bias: rows r of q, of k and of v, so whole heads
///   attn.out_proj.weight [width, width / t]: columns r
///   mlp.c_fc             rows r of weight and bias
///   mlp.c_proj.weight    [width, mlp_width / t]: columns r
/// The products of out_proj and c_proj are summed over the ranks before their biases are added. All else is on every
/// rank, and so are the features.
///
/// Parameters have the published names without the prefix `vision_model.`. The constructors leave them uninitialized:
/// load them, or call initialize_parameters. Not collective.
class VisionTowerImpl : public ParallelModule {
 public:
  /// The whole tower (kData).
  /// @param recomputes_blocks  of each block only the input is kept for the backward pass (recompute()).
  /// @param domain  of all gradients: kReplicated if every rank runs all pictures, kReplicatedPartial if each rank runs
  ///                some of them.
  /// @throws c10::ValueError as VisionConfig::validate does, and if `domain` is kSharded.
  VisionTowerImpl(const VisionConfig& config, GradientDomain domain, bool recomputes_blocks = false);

  /// This rank's part of a tower that is split over `tp` (kWeights). Gradients of split parameters are kSharded, all
  /// others kReplicated.
  /// @throws c10::ValueError as VisionConfig::validate and validate_split do.
  VisionTowerImpl(const VisionConfig& config, const parallel::GroupPtr& tp, bool recomputes_blocks = false);

  /// @param pixels  [N, 3, height, width] of floating dtype, normalised, on the parameters' device; N may be 0. Cast to
  ///                the parameters' dtype.
  /// @return        [N, L, C] of the parameters' dtype, L = feature_rows(height, width), rows of the grid one after the
  ///                other, C = output_dim().
  /// With N = 0 backward gives every parameter a gradient of zeros.
  /// The whole tower sends nothing; not collective. A split one: forward and backward collective over tp, with equal
  /// pixels; the gradient of the result must be the whole one, the same on every rank. Sends nothing backward to blocks
  /// whose input needs no gradient. Recomputed blocks send what they send forward once more in the backward pass.
  /// @throws c10::ValueError with the sizes if pixels isn't as above or a side isn't a positive multiple of patch_size.
  at::Tensor forward(const at::Tensor& pixels);

  /// forward without the downsamplers: the output of the last block, [N, patches, width]. Sends and throws as forward
  /// does.
  at::Tensor encode(const at::Tensor& pixels);

  /// Weights start normal with standard deviation fan_in^-0.5, positions with width^-0.5, norms at 1, biases at 0 and
  /// layer scales at layer_scale_init. Only the weights of linear maps and convolutions decay.
  std::vector<ParameterShard> own_parameters() const override;

  /// As given to the constructor.
  const VisionConfig& config() const { return config_; }

 private:
  struct Affine;
  struct LayerScale;
  struct Rotary;
  struct Attention;
  struct Mlp;
  struct Block;

  /// @param domain  of what isn't split.
  VisionTowerImpl(const VisionConfig& config, GradientDomain domain, std::optional<parallel::GroupPtr> split_over,
                  bool recomputes_blocks);

  at::Tensor positions(int64_t grid_rows, int64_t grid_columns) const;
  Rotary rotary(int64_t grid_rows, int64_t grid_columns) const;

  VisionConfig config_;
  GradientDomain domain_;                         ///< of what isn't split
  std::optional<parallel::GroupPtr> split_over_;  ///< none: the whole tower is here
  bool recomputes_blocks_;
  at::Tensor positional_embedding_;  ///< [(image_size / patch_size)^2, width]
  std::shared_ptr<Affine> conv1_;
  std::shared_ptr<Affine> ln_pre_;
  std::vector<std::shared_ptr<Block>> blocks_;
  std::shared_ptr<Affine> vit_downsampler1_;
  std::shared_ptr<Affine> vit_downsampler2_;
};
TORCH_MODULE(VisionTower);

}  // namespace megatron_cpp::step37
