#include "step37/vision/vision_tower.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <torch/nn/module.h>

#include <cmath>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "megatron_cpp/transformer/recompute.h"
#include "parallel/mappings.h"
#include "parallel/shard.h"

namespace megatron_cpp::step37 {
namespace {

using megatron_cpp::InitialValue;
using SplitOver = std::optional<parallel::GroupPtr>;

constexpr int64_t kPixelChannels = 3;

/// `total` heads or channels of a block: how many a rank has.
int64_t own_part(int64_t total, const SplitOver& split_over) {
  return split_over ? total / (*split_over)->getSize() : total;
}

/// x for maps whose output channels may be split: the ranks' gradients of x are summed.
at::Tensor input_of_split(const at::Tensor& x, const SplitOver& split_over) {
  return split_over ? parallel::copy_to_tensor_model_parallel_region(x, *split_over) : x;
}

struct PatchGrid {
  int64_t rows;
  int64_t columns;
};

PatchGrid patch_grid(int64_t image_height, int64_t image_width, int64_t patch_size) {
  TORCH_CHECK_VALUE(
      image_height > 0 && image_width > 0 && image_height % patch_size == 0 && image_width % patch_size == 0,
      "picture of ", image_height, " x ", image_width, " pixels: each side must be a positive multiple of patch_size ",
      patch_size);
  return {image_height / patch_size, image_width / patch_size};
}

PatchGrid patch_grid(const at::Tensor& pixels, int64_t patch_size) {
  TORCH_CHECK_VALUE(pixels.dim() == 4 && pixels.size(1) == kPixelChannels, "pixels must be [N, 3, height, width], got ",
                    pixels.sizes());
  TORCH_CHECK_VALUE(pixels.is_floating_point(), "pixels must be normalised and of a floating dtype, got ",
                    pixels.scalar_type());
  return patch_grid(pixels.size(2), pixels.size(3), patch_size);
}

/// A weight of a linear map or a convolution, as opposed to norms, biases, layer scales and positions.
bool is_weight_of_map(std::string_view name, at::IntArrayRef shape) {
  return shape.size() >= 2 && name != "positional_embedding";
}

/// How a parameter is split over ranks.
struct ParameterSplit {
  int64_t dim;    ///< that is split
  int64_t parts;  ///< that it has one behind the other, each of them split evenly: q, k and v
};

/// None for a parameter that is on every rank of a split tower.
std::optional<ParameterSplit> split_of(std::string_view name) {
  if (name.ends_with("attn.in_proj_weight") || name.ends_with("attn.in_proj_bias")) return ParameterSplit{0, 3};
  if (name.ends_with("mlp.c_fc.weight") || name.ends_with("mlp.c_fc.bias")) return ParameterSplit{0, 1};
  if (name.ends_with("attn.out_proj.weight") || name.ends_with("mlp.c_proj.weight")) return ParameterSplit{1, 1};
  return std::nullopt;
}

/// Rank r of t has part r of t of each part of the split dimension.
std::vector<ParameterSegment> segments_of(const std::string& name, const at::Tensor& parameter,
                                          const ParameterSplit& split, const parallel::GroupPtr& tp) {
  const int64_t own = parameter.size(split.dim) / split.parts;
  const int64_t t = tp->getSize();
  auto global_shape = parameter.sizes().vec();
  global_shape[static_cast<size_t>(split.dim)] *= t;
  std::vector<ParameterSegment> segments;
  for (int64_t part = 0; part < split.parts; ++part) {
    const int64_t begin = (part * t + tp->getRank()) * own;
    segments.push_back(ParameterSegment::rows(name, global_shape, split.dim, begin, part * own, own));
  }
  return segments;
}

/// @param shape  of the whole parameter.
InitialValue initial_value(std::string_view name, at::IntArrayRef shape, const VisionConfig& config) {
  if (is_weight_of_map(name, shape)) {
    const int64_t fan_in = c10::multiply_integers(shape.slice(1));
    return InitialValue::normal(1.0 / std::sqrt(static_cast<double>(fan_in)));
  }
  if (name == "positional_embedding") return InitialValue::normal(1.0 / std::sqrt(static_cast<double>(config.width)));
  if (name.ends_with("gamma")) return InitialValue::constant(config.layer_scale_init);
  return InitialValue::constant(name.ends_with("bias") ? 0.0 : 1.0);
}

}  // namespace

void VisionConfig::validate() const {
  const std::pair<const char*, int64_t> sizes[] = {{"image_size", image_size}, {"patch_size", patch_size},
                                                   {"width", width},           {"layers", layers},
                                                   {"heads", heads},           {"mlp_width", mlp_width}};
  for (const auto& [name, size] : sizes) TORCH_CHECK_VALUE(size > 0, "vision ", name, " ", size, " is not positive");
  TORCH_CHECK_VALUE(image_size % patch_size == 0, "vision image_size ", image_size, " is not a multiple of patch_size ",
                    patch_size);
  TORCH_CHECK_VALUE(width % heads == 0, "vision width ", width, " is not divisible by heads ", heads);
  TORCH_CHECK_VALUE(width / heads % 4 == 0, "vision head size ", width / heads, " (width ", width, " / heads ", heads,
                    ") is not a multiple of 4");
  TORCH_CHECK_VALUE(layer_norm_eps > 0.0, "vision layer_norm_eps ", layer_norm_eps, " is not positive");
  TORCH_CHECK_VALUE(rope_theta > 0.0, "vision rope_theta ", rope_theta, " is not positive");
}

void VisionConfig::validate_split(int tensor_parallel_size) const {
  parallel::even_shard_size(heads, tensor_parallel_size, "mm_encoder_tp_mode weights: vision heads");
  parallel::even_shard_size(mlp_width, tensor_parallel_size, "mm_encoder_tp_mode weights: vision mlp_width");
}

int64_t VisionConfig::feature_rows(int64_t image_height, int64_t image_width) const {
  const auto [rows, columns] = patch_grid(image_height, image_width, patch_size);
  return ((rows + 3) / 4) * ((columns + 3) / 4);
}

/// The weight and bias of a norm, a linear map or a convolution.
struct VisionTowerImpl::Affine : torch::nn::Module {
  enum class Bias { kNo, kYes };

  explicit Affine(at::IntArrayRef weight_shape, Bias has_bias = Bias::kYes)
      : weight(register_parameter("weight", at::empty(weight_shape))) {
    if (has_bias == Bias::kYes) bias = register_parameter("bias", at::empty({weight_shape[0]}));
  }

  at::Tensor layer_norm(const at::Tensor& x, double eps) const {
    return at::layer_norm(x, weight.sizes(), weight, bias, eps);
  }
  /// The map's input channels may be split: the ranks' products are summed, and the bias is added once.
  at::Tensor linear_of_split(const at::Tensor& x, const SplitOver& split_over) const {
    if (!split_over) return at::linear(x, weight, bias);
    return parallel::reduce_from_tensor_model_parallel_region(at::linear(x, weight), *split_over) + bias;
  }

  at::Tensor convolution(const at::Tensor& x, int64_t stride, int64_t padding = 0) const {
    // On CPUs LibTorch 2.15 leaves elements of a half-precision weight's gradient uninitialized that meet padding only.
    const bool in_float = x.is_cpu() && c10::isReducedFloatingType(weight.scalar_type());
    const auto dtype = in_float ? at::kFloat : weight.scalar_type();
    const auto wide_bias = bias.defined() ? std::optional<at::Tensor>(bias.to(dtype)) : std::nullopt;
    return at::conv2d(x.to(dtype), weight.to(dtype), wide_bias, stride, padding).to(weight.scalar_type());
  }

  at::Tensor weight;
  at::Tensor bias;  ///< undefined without bias
};

struct VisionTowerImpl::LayerScale : torch::nn::Module {
  explicit LayerScale(int64_t width) : gamma(register_parameter("gamma", at::empty({width}))) {}

  at::Tensor gamma;  ///< [width]
};

/// Cosine and sine of each patch's angles, [patches, 1, 1, head_dim / 2] float: one angle per pair.
struct VisionTowerImpl::Rotary {
  /// @param x  [N, patches, 2, heads, head_dim], q and k. Rotated in float32 or wider, returned in the dtype of x.
  at::Tensor rotate(const at::Tensor& x) const {
    const auto pairs = x.unflatten(-1, {x.size(-1) / 2, 2});
    const auto even = pairs.select(-1, 0);
    const auto odd = pairs.select(-1, 1);
    return at::stack({even * cosine - odd * sine, odd * cosine + even * sine}, -1).flatten(-2).to(x.scalar_type());
  }

  at::Tensor cosine;
  at::Tensor sine;
};

struct VisionTowerImpl::Attention : torch::nn::Module {
  Attention(const VisionConfig& config, const SplitOver& split_over)
      : heads(own_part(config.heads, split_over)),
        head_dim(config.width / config.heads),
        in_proj_weight(register_parameter("in_proj_weight", at::empty({3 * heads * head_dim, config.width}))),
        in_proj_bias(register_parameter("in_proj_bias", at::empty({3 * heads * head_dim}))),
        out_proj(
            register_module("out_proj", std::make_shared<Affine>(at::IntArrayRef{config.width, heads * head_dim}))) {}

  at::Tensor forward(const at::Tensor& x, const Rotary& rotary, const SplitOver& split_over) const {
    const auto input = input_of_split(x, split_over);
    const auto qkv = at::linear(input, in_proj_weight, in_proj_bias).unflatten(-1, {3, heads, head_dim});
    const auto qk = rotary.rotate(qkv.narrow(2, 0, 2));
    const auto q = qk.select(2, 0).transpose(1, 2);  // [N, heads, patches, head_dim]
    const auto k = qk.select(2, 1).transpose(1, 2);
    const auto v = qkv.select(2, 2).transpose(1, 2);
    const auto y = at::scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2);
    return out_proj->linear_of_split(y, split_over);
  }

  int64_t heads;  ///< of this rank
  int64_t head_dim;
  at::Tensor in_proj_weight;  ///< [3 * heads * head_dim, width]: q, k, v
  at::Tensor in_proj_bias;
  std::shared_ptr<Affine> out_proj;
};

struct VisionTowerImpl::Mlp : torch::nn::Module {
  /// @param mlp_width  of this rank.
  Mlp(int64_t width, int64_t mlp_width)
      : c_fc(register_module("c_fc", std::make_shared<Affine>(at::IntArrayRef{mlp_width, width}))),
        c_proj(register_module("c_proj", std::make_shared<Affine>(at::IntArrayRef{width, mlp_width}))) {}

  at::Tensor forward(const at::Tensor& x, const SplitOver& split_over) const {
    const auto y = at::linear(input_of_split(x, split_over), c_fc->weight, c_fc->bias);
    return c_proj->linear_of_split(y * (1.702 * y).sigmoid_(), split_over);
  }

  std::shared_ptr<Affine> c_fc;
  std::shared_ptr<Affine> c_proj;
};

struct VisionTowerImpl::Block : torch::nn::Module {
  Block(const VisionConfig& config, const SplitOver& split_over)
      : eps(config.layer_norm_eps),
        ln_1(register_module("ln_1", std::make_shared<Affine>(config.width))),
        attn(register_module("attn", std::make_shared<Attention>(config, split_over))),
        ls_1(register_module("ls_1", std::make_shared<LayerScale>(config.width))),
        ln_2(register_module("ln_2", std::make_shared<Affine>(config.width))),
        mlp(register_module("mlp", std::make_shared<Mlp>(config.width, own_part(config.mlp_width, split_over)))),
        ls_2(register_module("ls_2", std::make_shared<LayerScale>(config.width))) {}

  at::Tensor forward(const at::Tensor& x, const Rotary& rotary, const SplitOver& split_over) const {
    const auto y = at::addcmul(x, ls_1->gamma, attn->forward(ln_1->layer_norm(x, eps), rotary, split_over));
    return at::addcmul(y, ls_2->gamma, mlp->forward(ln_2->layer_norm(y, eps), split_over));
  }

  double eps;
  std::shared_ptr<Affine> ln_1;
  std::shared_ptr<Attention> attn;
  std::shared_ptr<LayerScale> ls_1;
  std::shared_ptr<Affine> ln_2;
  std::shared_ptr<Mlp> mlp;
  std::shared_ptr<LayerScale> ls_2;
};

VisionTowerImpl::VisionTowerImpl(const VisionConfig& config, GradientDomain domain, bool recomputes_blocks)
    : VisionTowerImpl(config, domain, std::nullopt, recomputes_blocks) {}

VisionTowerImpl::VisionTowerImpl(const VisionConfig& config, const parallel::GroupPtr& tp, bool recomputes_blocks)
    : VisionTowerImpl(config, GradientDomain::kReplicated, tp, recomputes_blocks) {}

VisionTowerImpl::VisionTowerImpl(const VisionConfig& config, GradientDomain domain,
                                 std::optional<parallel::GroupPtr> split_over, bool recomputes_blocks)
    : config_(config), domain_(domain), split_over_(std::move(split_over)), recomputes_blocks_(recomputes_blocks) {
  config.validate();
  if (split_over_) config.validate_split((*split_over_)->getSize());
  TORCH_CHECK_VALUE(domain.sharded_over.empty(),
                    "the vision tower is replicated: its gradient domain can't be kSharded");
  const int64_t width = config.width;
  const int64_t grid = config.image_size / config.patch_size;
  const int64_t patch = config.patch_size;
  const auto affine = [this](const char* name, at::IntArrayRef weight_shape, Affine::Bias bias = Affine::Bias::kYes) {
    return register_module(name, std::make_shared<Affine>(weight_shape, bias));
  };
  positional_embedding_ = register_parameter("positional_embedding", at::empty({grid * grid, width}));
  conv1_ = affine("conv1", {width, kPixelChannels, patch, patch}, Affine::Bias::kNo);
  ln_pre_ = affine("ln_pre", width);
  const auto transformer = register_module("transformer", std::make_shared<torch::nn::Module>());
  const auto resblocks = transformer->register_module("resblocks", std::make_shared<torch::nn::Module>());
  for (int64_t layer = 0; layer < config.layers; ++layer) {
    blocks_.push_back(resblocks->register_module(fmt::to_string(layer), std::make_shared<Block>(config, split_over_)));
  }
  vit_downsampler1_ = affine("vit_downsampler1", {2 * width, width, 3, 3});
  vit_downsampler2_ = affine("vit_downsampler2", {config.output_dim(), 2 * width, 3, 3});
}

at::Tensor VisionTowerImpl::forward(const at::Tensor& pixels) {
  const auto [rows, columns] = patch_grid(pixels, config_.patch_size);
  auto x = encode(pixels).transpose(1, 2).unflatten(2, {rows, columns});
  for (const auto& downsampler : {vit_downsampler1_, vit_downsampler2_}) {
    x = downsampler->convolution(x, /*stride=*/2, /*padding=*/1);
  }
  return x.flatten(2).transpose(1, 2);
}

at::Tensor VisionTowerImpl::encode(const at::Tensor& pixels) {
  use_parameters();
  const auto [rows, columns] = patch_grid(pixels, config_.patch_size);
  const auto patches = conv1_->convolution(pixels, /*stride=*/config_.patch_size);
  auto x = patches.flatten(2).transpose(1, 2) + positions(rows, columns);
  x = ln_pre_->layer_norm(x, config_.layer_norm_eps);
  const Rotary table = rotary(rows, columns);
  for (const auto& block : blocks_) {
    const RecomputedBody compute = [block, table, split_over = split_over_](const auto& inputs) {
      return std::vector{block->forward(inputs[0], table, split_over)};
    };
    x = (recomputes_blocks_ ? recompute(compute, {x}, block->parameters()) : compute({x}))[0];
  }
  return x;
}

/// [patches, width]: positional_embedding for a grid of the given size.
at::Tensor VisionTowerImpl::positions(int64_t grid_rows, int64_t grid_columns) const {
  const int64_t grid = config_.image_size / config_.patch_size;
  if (grid_rows == grid && grid_columns == grid) return positional_embedding_;
  const auto table = positional_embedding_.t().view({1, config_.width, grid, grid});
  return at::upsample_bilinear2d(table, {grid_rows, grid_columns}, /*align_corners=*/false).flatten(2)[0].t();
}

VisionTowerImpl::Rotary VisionTowerImpl::rotary(int64_t grid_rows, int64_t grid_columns) const {
  const auto options = positional_embedding_.options().dtype(at::kFloat).requires_grad(false);
  const int64_t axis_dim = config_.width / config_.heads / 2;
  const auto exponents = at::arange(0, axis_dim, 2, options) / axis_dim;
  const auto inverse_frequencies = at::pow(config_.rope_theta, exponents).reciprocal();
  const auto angles = [&](int64_t count) { return at::outer(at::arange(count, options), inverse_frequencies); };
  const auto columns = angles(grid_columns).unsqueeze(0).expand({grid_rows, -1, -1});
  const auto rows = angles(grid_rows).unsqueeze(1).expand({-1, grid_columns, -1});
  const auto table = at::cat({columns, rows}, -1).view({grid_rows * grid_columns, 1, 1, axis_dim});
  return {table.cos(), table.sin()};
}

std::vector<ParameterShard> VisionTowerImpl::own_parameters() const {
  std::vector<ParameterShard> shards;
  for (const auto& item : named_parameters()) {
    const auto& name = item.key();
    auto shard = replicated_parameter(name, item.value(), domain_, {}, is_weight_of_map(name, item.value().sizes()));
    if (const auto split = split_of(name); split && split_over_) {
      shard.domain = GradientDomain::kSharded;
      shard.segments = segments_of(name, item.value(), *split, *split_over_);
    }
    shard.initial_value = initial_value(name, shard.segments.front().global_shape, config_);
    shards.push_back(std::move(shard));
  }
  return shards;
}

}  // namespace megatron_cpp::step37
