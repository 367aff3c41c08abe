// The vision tower against the golden cases of the reference implementation, and by its own properties.
#include "step37/vision/vision_tower.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "megatron_cpp/checkpoint/safetensors.h"
#include "megatron_cpp/parameters/parameter_shard.h"
#include "parallel/gpu.h"
#include "step37/published_config.h"
#include "tests/step37/vision_tower_fixture.h"
#include "tests/support/environment.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::step37 {
namespace {

using test_support::device;
using test_support::value_error;

const std::string kCases = test_support::cases();
constexpr double kGoldenTolerance = 1e-4;  // of the largest element

VisionConfig golden_config(const std::string& name) {
  return read_published_config(kCases + "/models/" + name + "/config_hub.json").vision;
}

/// Copies the file's rows as they are: the golden files hold the published layout, in which the rows of q and k are
/// ordered for rotary on adjacent pairs (the order of transformers' own modules, half-split, would not reproduce
/// vision_block_out).
void load(VisionTower& tower, const SafetensorsFile& file) {
  const at::NoGradGuard no_grad;
  for (auto& item : tower->named_parameters()) item.value().copy_(file.read("vision_model." + item.key()));
}

/// On the test's device.
VisionTower golden_tower(const std::string& name, const VisionConfig& config) {
  VisionTower tower(config, GradientDomain::kReplicated);
  load(tower, SafetensorsFile(kCases + "/models/" + name + "/model.safetensors"));
  parallel::multiply_exactly_on_gpus();
  tower->to(device());
  return tower;
}

SafetensorsFile golden_forward(const std::string& name) {
  return SafetensorsFile(kCases + "/forward/" + name + ".safetensors");
}

/// Largest difference, relative to the largest element of `expected`.
double relative_difference(const at::Tensor& actual, const at::Tensor& expected) {
  TORCH_CHECK(actual.sizes() == expected.sizes(), "got ", actual.sizes(), ", expected ", expected.sizes());
  return (actual.cpu() - expected.cpu()).abs().max().item<double>() / expected.abs().max().item<double>();
}

/// An initialised tower that takes a moment to run; grid 3 x 3, head size 8.
VisionConfig small_config() {
  VisionConfig config;
  config.image_size = 12;
  config.patch_size = 4;
  config.width = 16;
  config.layers = 2;
  config.heads = 2;
  config.mlp_width = 20;
  config.layer_scale_init = 0.5;
  return config;
}

VisionTower small_tower() { return vision_tower_fixture::tower_of(small_config(), GradientDomain::kReplicatedPartial); }

class GoldenVisionTower : public ::testing::TestWithParam<const char*> {};

TEST_P(GoldenVisionTower, LastHiddenState) {
  const auto expected = golden_forward(GetParam());
  const auto config = golden_config(GetParam());
  auto tower = golden_tower(GetParam(), config);
  const auto pixels = expected.read("pixel_values").to(device());
  const auto features = tower->forward(pixels);
  EXPECT_LT(relative_difference(features, expected.read("vision_last_hidden_state")), kGoldenTolerance);
  EXPECT_EQ(features.size(1), config.feature_rows(pixels.size(2), pixels.size(3)));
  EXPECT_EQ(features.size(2), config.output_dim());
}

TEST_P(GoldenVisionTower, EachBlock) {
  const auto expected = golden_forward(GetParam());
  auto config = golden_config(GetParam());
  const int64_t layers = config.layers;
  for (config.layers = 1; config.layers <= layers; ++config.layers) {
    auto tower = golden_tower(GetParam(), config);
    const auto name = "vision_block_out." + std::to_string(config.layers - 1);
    EXPECT_LT(relative_difference(tower->encode(expected.read("pixel_values").to(device())), expected.read(name)),
              kGoldenTolerance)
        << name;
  }
}

TEST_P(GoldenVisionTower, HasThePublishedParameters) {
  const SafetensorsFile file(kCases + "/models/" + GetParam() + "/model.safetensors");
  const std::string prefix = "vision_model.";
  std::map<std::string, std::vector<int64_t>> published;
  for (const auto& [name, entry] : file.entries()) {
    if (name.starts_with(prefix)) published[name.substr(prefix.size())] = entry.shape;
  }
  std::map<std::string, std::vector<int64_t>> ours;
  const VisionTower tower(golden_config(GetParam()), GradientDomain::kReplicated);
  for (const auto& item : tower->named_parameters()) ours[item.key()] = item.value().sizes().vec();
  EXPECT_EQ(ours, published);
}

INSTANTIATE_TEST_SUITE_P(Cases, GoldenVisionTower, ::testing::Values("base", "bias_crop"));

TEST(VisionTower, ResamplesPositionsOfOtherGrids) {
  const auto expected = golden_forward("bias_crop");
  auto tower = golden_tower("bias_crop", golden_config("bias_crop"));
  const auto pixels = expected.read("pixel_values_local").to(device());
  ASSERT_NE(pixels.size(2), tower->config().image_size);
  EXPECT_LT(relative_difference(tower->forward(pixels), expected.read("vision_local_last_hidden_state")),
            kGoldenTolerance);
}

// With rows and columns exchanged in the convolutions, in the positions and in the halves of each head of q and k, the
// features of the transposed picture are the transposed features: 5 x 2 patches against 2 x 5.
TEST(VisionTower, TransposedPictureGivesTransposedFeatures) {
  auto tower = small_tower();
  auto transposed = small_tower();
  {
    const at::NoGradGuard no_grad;
    const auto& config = tower->config();
    const int64_t grid = config.image_size / config.patch_size;
    const int64_t head_dim = config.width / config.heads;
    for (auto& item : transposed->named_parameters()) {
      auto& parameter = item.value();
      if (parameter.dim() == 4) parameter.copy_(parameter.transpose(2, 3).clone());
      if (item.key() == "positional_embedding") {
        parameter.copy_(parameter.view({grid, grid, -1}).transpose(0, 1).flatten(0, 1).clone());
      }
      if (item.key().find("in_proj") != std::string::npos) {
        auto q_and_k = parameter.narrow(0, 0, 2 * config.width).unflatten(0, {2 * config.heads, 2, head_dim / 2});
        q_and_k.copy_(q_and_k.flip(1));
      }
    }
  }
  const auto pixels = at::randn({2, 3, 20, 8}, at::kDouble);
  const auto features = tower->forward(pixels).view({2, 2, 1, -1});
  const auto expected = transposed->forward(pixels.transpose(2, 3)).view({2, 1, 2, -1}).transpose(1, 2);
  EXPECT_LT(relative_difference(features, expected), 1e-6);
  EXPECT_GT(relative_difference(features, tower->forward(pixels.transpose(2, 3)).view({2, 2, 1, -1})), 1e-2);
}

TEST(VisionTower, GradientsAreThoseOfFiniteDifferences) {
  auto tower = small_tower();
  const auto pixels = at::randn({2, 3, 12, 20}, at::kDouble);
  const auto coefficients = at::randn({2, 2, tower->config().output_dim()}, at::kDouble);
  const auto loss = [&] { return (tower->forward(pixels) * coefficients).sum(); };
  loss().backward();
  for (auto& item : tower->named_parameters()) {
    const at::NoGradGuard no_grad;
    auto& parameter = item.value();
    constexpr double kStep = 1e-5;
    const auto direction = at::randn_like(parameter);
    parameter.add_(direction, kStep);
    const double above = loss().item<double>();
    parameter.add_(direction, -2.0 * kStep);
    const double below = loss().item<double>();
    parameter.add_(direction, kStep);
    const double expected = (above - below) / (2.0 * kStep);
    const double scale = parameter.grad().norm().item<double>() * direction.norm().item<double>();
    EXPECT_GT(scale, 0.0) << item.key();
    EXPECT_NEAR((parameter.grad() * direction).sum().item<double>(), expected, 1e-6 * scale) << item.key();
  }
}

TEST(VisionTower, NoPicturesGiveZeroGradients) {
  for (const int64_t side : {112, 84}) {
    auto tower = golden_tower("base", golden_config("base"));
    const auto features = tower->forward(at::empty({0, 3, side, side}, device()));
    EXPECT_EQ(features.sizes().vec(), (std::vector<int64_t>{0, 4, 128}));
    features.sum().backward();
    for (const auto& item : tower->named_parameters()) {
      ASSERT_TRUE(item.value().grad().defined()) << item.key();
      EXPECT_EQ(item.value().grad().sizes(), item.value().sizes()) << item.key();
      EXPECT_TRUE(item.value().grad().eq(0).all().item<bool>()) << item.key();
    }
  }
}

TEST(VisionTower, FeaturesAreInTheParametersDtype) {
  auto tower = golden_tower("base", golden_config("base"));
  const auto expected = golden_forward("base");
  tower->to(at::kBFloat16);
  const auto features = tower->forward(expected.read("pixel_values").to(device()));
  EXPECT_EQ(features.scalar_type(), at::kBFloat16);
  EXPECT_LT(relative_difference(features.to(at::kFloat), expected.read("vision_last_hidden_state")), 0.05);
}

// The last convolution's weight meets padding for the most part.
TEST(VisionTower, GradientsInBfloat16AreNearThoseInFloat64) {
  auto tower = small_tower();
  auto narrow = small_tower();
  narrow->to(at::kBFloat16);
  const auto pixels = at::randn({4, 3, 8, 8}, at::kDouble);
  tower->forward(pixels).square().sum().backward();
  narrow->forward(pixels).square().sum().backward();
  const auto gradients = narrow->named_parameters();
  for (const auto& item : tower->named_parameters()) {
    EXPECT_LT(relative_difference(gradients[item.key()].grad().to(at::kDouble), item.value().grad()), 0.1)
        << item.key();
  }
}

TEST(VisionTower, OwnParameters) {
  const VisionTower tower(small_config(), GradientDomain::kReplicatedPartial);
  std::map<std::string, ParameterShard> shards;
  for (auto& shard : parameter_shards(*tower)) shards.emplace(shard.name, shard);
  ASSERT_EQ(shards.size(), tower->named_parameters().size());
  const std::set<std::string> decaying = {"weight", "in_proj_weight"};
  for (const auto& [name, shard] : shards) {
    EXPECT_EQ(shard.domain, GradientDomain::kReplicatedPartial) << name;
    const bool is_norm = name.find("ln_") != std::string::npos;
    EXPECT_EQ(shard.weight_decay, !is_norm && decaying.count(name.substr(name.rfind('.') + 1)) > 0) << name;
  }
  const auto expect_initial = [&](const std::string& name, InitialValue expected) {
    const auto& actual = shards.at(name).initial_value;
    EXPECT_EQ(actual.kind, expected.kind) << name;
    EXPECT_DOUBLE_EQ(actual.value, expected.value) << name;
  };
  using megatron_cpp::InitialValue;
  const std::string block = "transformer.resblocks.1.";
  expect_initial("conv1.weight", InitialValue::normal(1.0 / std::sqrt(3.0 * 4.0 * 4.0)));
  expect_initial("positional_embedding", InitialValue::normal(1.0 / std::sqrt(16.0)));
  expect_initial("ln_pre.weight", InitialValue::constant(1.0));
  expect_initial("ln_pre.bias", InitialValue::constant(0.0));
  expect_initial(block + "attn.in_proj_weight", InitialValue::normal(1.0 / std::sqrt(16.0)));
  expect_initial(block + "attn.in_proj_bias", InitialValue::constant(0.0));
  expect_initial(block + "ls_2.gamma", InitialValue::constant(0.5));
  expect_initial(block + "mlp.c_proj.weight", InitialValue::normal(1.0 / std::sqrt(20.0)));
  expect_initial("vit_downsampler2.weight", InitialValue::normal(1.0 / std::sqrt(32.0 * 9.0)));
}

TEST(VisionTower, RefusesBadArguments) {
  auto tower = small_tower();
  const auto forward_error = [&](at::IntArrayRef shape) {
    return value_error([&] { tower->forward(at::zeros(shape)); });
  };
  EXPECT_EQ(forward_error({1, 3, 12, 18}),
            "picture of 12 x 18 pixels: each side must be a positive multiple of patch_size 4");
  EXPECT_EQ(forward_error({1, 3, 0, 12}),
            "picture of 0 x 12 pixels: each side must be a positive multiple of patch_size 4");
  EXPECT_EQ(forward_error({3, 12, 12}), "pixels must be [N, 3, height, width], got [3, 12, 12]");
  EXPECT_EQ(forward_error({1, 4, 12, 12}), "pixels must be [N, 3, height, width], got [1, 4, 12, 12]");
  EXPECT_EQ(value_error([&] {
              tower->forward(at::zeros({1, 3, 12, 12}, at::kByte));
            }),
            "pixels must be normalised and of a floating dtype, got Byte");
  EXPECT_EQ(value_error([] { VisionTower(small_config(), GradientDomain::kSharded); }),
            "the vision tower is replicated: its gradient domain can't be kSharded");
}

TEST(VisionConfig, FeatureRowsOfTheReleasedModel) {
  const VisionConfig config;
  EXPECT_NO_THROW(config.validate());
  EXPECT_EQ(config.output_dim(), 6144);
  EXPECT_EQ(config.feature_rows(728, 728), 169);
  EXPECT_EQ(config.feature_rows(504, 504), 81);
  EXPECT_EQ(config.feature_rows(14, 70), 2);  // 1 x 5 patches, 1 x 3, 1 x 2
  EXPECT_EQ(value_error([&] { config.feature_rows(728, 730); }),
            "picture of 728 x 730 pixels: each side must be a positive multiple of patch_size 14");
}

TEST(VisionConfig, ValidateNamesTheNumbers) {
  const auto error = [](const std::function<void(VisionConfig&)>& change) {
    VisionConfig config;
    change(config);
    return value_error([&] { config.validate(); });
  };
  EXPECT_EQ(error([](auto& c) { c.layers = 0; }), "vision layers 0 is not positive");
  EXPECT_EQ(error([](auto& c) { c.mlp_width = -1; }), "vision mlp_width -1 is not positive");
  EXPECT_EQ(error([](auto& c) { c.image_size = 730; }), "vision image_size 730 is not a multiple of patch_size 14");
  EXPECT_EQ(error([](auto& c) { c.heads = 7; }), "vision width 1536 is not divisible by heads 7");
  EXPECT_EQ(error([](auto& c) { c.width = 32, c.heads = 16; }),
            "vision head size 2 (width 32 / heads 16) is not a multiple of 4");
  EXPECT_EQ(error([](auto& c) { c.layer_norm_eps = 0.0; }), "vision layer_norm_eps 0 is not positive");
  EXPECT_EQ(error([](auto& c) { c.rope_theta = -1.0; }), "vision rope_theta -1 is not positive");
}

TEST(VisionConfig, ValidateSplitNamesTheNumbers) {
  const VisionConfig config;
  EXPECT_NO_THROW(config.validate_split(16));
  EXPECT_EQ(value_error([&] { config.validate_split(5); }),
            "mm_encoder_tp_mode weights: vision heads 16 is not divisible by tensor-parallel size 5");
  EXPECT_EQ(value_error([] { VisionConfig{.mlp_width = 8961}.validate_split(2); }),
            "mm_encoder_tp_mode weights: vision mlp_width 8961 is not divisible by tensor-parallel size 2");
}

}  // namespace
}  // namespace megatron_cpp::step37
