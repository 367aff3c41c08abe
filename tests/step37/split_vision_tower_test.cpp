// A vision tower whose heads and mlp are split over the ranks, against the whole tower on one rank.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "parallel/collectives.h"
#include "parallel/recording_backend.h"
#include "step37/vision/vision_tower.h"
#include "tests/step37/vision_tower_fixture.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::step37 {
namespace {

using namespace test_support;
using Kind = parallel::CollectiveKind;

constexpr double kTolerance = 1e-10;  // of the largest element, in double

/// Grid 3 x 3, heads of 8 channels for up to four ranks.
VisionConfig small_config() {
  return {.image_size = 12,
          .patch_size = 4,
          .width = 32,
          .layers = 2,
          .heads = 4,
          .mlp_width = 20,
          .layer_scale_init = 0.5};
}

VisionTower whole_tower() {
  auto tower = vision_tower_fixture::tower_of(small_config(), GradientDomain::kReplicated);
  tower->to(device());
  return tower;
}

std::map<std::string, at::Tensor> named_parameters_of(const VisionTower& tower) {
  std::map<std::string, at::Tensor> parameters;
  for (const auto& item : tower->named_parameters()) parameters[item.key()] = item.value();
  return parameters;
}

/// The same tower, split.
VisionTower split_tower(const VisionTower& whole, const parallel::GroupPtr& tp, bool recomputes_blocks = false) {
  VisionTower tower(small_config(), tp, recomputes_blocks);
  tower->to(device(), at::kDouble);
  const auto values = named_parameters_of(whole);
  const at::NoGradGuard no_grad;
  for (const auto& shard : parameter_shards(*tower)) {
    for (const auto& segment : shard.segments) {
      segment.in_local(shard.parameter).copy_(segment.in_global(values.at(segment.name)));
    }
  }
  return tower;
}

/// Three square pictures, wide ones, high ones, none.
const std::vector<std::vector<int64_t>> kPixelShapes = {{3, 3, 12, 12}, {2, 3, 8, 20}, {1, 3, 28, 4}, {0, 3, 12, 20}};

at::Tensor random_values(at::IntArrayRef shape, uint64_t seed) {
  at::manual_seed(seed);
  return on_device(at::randn(shape, at::kDouble));
}

}  // namespace

TEST(SplitVisionTower, FeaturesAndGradientsAreThoseOfTheWholeTower) {
  for (const int t : divisors_of_world()) {
    for (const auto& shape : kPixelShapes) {
      SCOPED_TRACE(testing::Message() << "tensor " << t << ", pixels " << at::IntArrayRef(shape));
      auto whole = whole_tower();
      auto split = split_tower(whole, groups(t).tp);
      const auto pixels = random_values(shape, 3);
      const auto expected = whole->forward(pixels);
      const auto features = split->forward(pixels);
      EXPECT_TRUE(near(features, expected, kTolerance));
      EXPECT_TRUE(near(split->encode(pixels), whole->encode(pixels), kTolerance));
      const auto gradient = random_values(expected.sizes(), 5);
      expected.backward(gradient);
      features.backward(gradient);
      const auto parameters = named_parameters_of(whole);
      for (const auto& shard : parameter_shards(*split)) {
        ASSERT_TRUE(shard.parameter.grad().defined()) << shard.name;
        for (const auto& segment : shard.segments) {
          const auto whole_gradient = parameters.at(segment.name).grad();
          const double scale = whole_gradient.numel() == 0 ? 0.0 : whole_gradient.abs().max().item<double>();
          EXPECT_EQ(scale > 0.0, shape[0] > 0) << segment.name;
          const auto difference = segment.in_local(shard.parameter.grad()) - segment.in_global(whole_gradient);
          // Gradients of key biases are 0 but for rounding.
          EXPECT_LE(difference.abs().max().item<double>(), kTolerance * (shape[0] > 0 ? std::max(scale, 1.0) : 0.0))
              << segment.name;
        }
      }
    }
  }
}

// Bit for bit, also for parameters that pictures of two sizes share, and where only some of a block's are trained.
TEST(SplitVisionTower, RecomputedBlocksChangeNothing) {
  const auto& tp = groups(runtime().size()).tp;
  const auto whole = whole_tower();
  for (const std::string trained : {"", "transformer.resblocks.1.mlp", "vit_downsampler2"}) {
    SCOPED_TRACE(trained);
    const auto recorded = parallel::record(tp);
    int64_t calls = 0;
    const auto train = [&](bool recomputes_blocks) {
      auto tower = split_tower(whole, recorded.group, recomputes_blocks);
      for (auto& item : tower->named_parameters()) item.value().set_requires_grad(item.key().starts_with(trained));
      const auto before = *recorded.count;
      std::vector<at::Tensor> results;
      for (int64_t step = 0; step < 2; ++step) {
        for (const auto& shape : kPixelShapes) results.push_back(tower->forward(random_values(shape, 3)));
        const auto of_step = [&](size_t i) { return results[results.size() - kPixelShapes.size() + i].square().sum(); };
        (of_step(0) + of_step(1) + of_step(2) + of_step(3)).backward();
      }
      calls = (*recorded.count - before).total();
      for (const auto& item : tower->named_parameters()) {
        if (item.value().grad().defined()) results.push_back(item.value().grad());
      }
      return results;
    };
    const auto expected = train(false);
    const int64_t kept_calls = calls;
    const auto actual = train(true);
    ASSERT_EQ(actual.size(), expected.size());
    for (size_t i = 0; i < actual.size(); ++i) EXPECT_TRUE(at::equal(actual[i], expected[i])) << i;
    // Two a block of those that are computed again, for each of four groups of pictures, in two steps.
    const int64_t again = trained.empty() ? 2 : trained.starts_with("transformer") ? 1 : 0;
    EXPECT_EQ(calls - kept_calls, tp->getSize() == 1 ? 0 : 2 * again * 4 * 2);
  }
}

// Two all-reduces a block forward and two backward, also for no pictures; a frozen tower sends nothing backward, and
// one whose last block alone is trained only what that block needs.
TEST(SplitVisionTower, SendsTwoAllReducesABlockEachWay) {
  const auto whole = whole_tower();
  for (const int t : divisors_of_world()) {
    for (const auto& shape : kPixelShapes) {
      SCOPED_TRACE(testing::Message() << "tensor " << t << ", pixels " << at::IntArrayRef(shape));
      const auto recorded = parallel::record(groups(t).tp);
      auto split = split_tower(whole, recorded.group);
      const int64_t calls = t == 1 ? 0 : 2 * small_config().layers;
      const int64_t activations = shape[0] * (shape[2] / 4) * (shape[3] / 4) * small_config().width * 8;
      const int64_t bytes = calls * 2 * (activations * (t - 1) / t);
      const auto pixels = random_values(shape, 3);
      // What forward and backward send.
      const auto count = [&](const std::string& trained) {
        for (auto& item : split->named_parameters()) item.value().set_requires_grad(item.key().starts_with(trained));
        const auto before = *recorded.count;
        const auto features = split->forward(pixels);
        const auto forward = *recorded.count - before;
        EXPECT_EQ(forward.of(Kind::kAllReduce), calls);
        EXPECT_EQ(forward.total(), calls);
        EXPECT_EQ(forward.bytes_sent, bytes);
        const auto between = *recorded.count;
        if (features.requires_grad()) features.sum().backward();
        const auto backward = *recorded.count - between;
        EXPECT_EQ(backward.of(Kind::kAllReduce), backward.total());
        return backward;
      };
      const auto all = count("");
      EXPECT_EQ(all.total(), calls);
      EXPECT_EQ(all.bytes_sent, bytes);
      EXPECT_EQ(count("none").total(), 0);
      EXPECT_EQ(count("vit_downsampler").total(), 0);
      EXPECT_EQ(count("transformer.resblocks.1.mlp").total(), 0);
      EXPECT_EQ(count("transformer.resblocks.1.attn").total(), calls / 4);
    }
  }
}

TEST(SplitVisionTower, EveryElementIsOnOneRankOrOnAll) {
  const std::set<std::string> split_names = {"attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight",
                                             "mlp.c_fc.weight",     "mlp.c_fc.bias",     "mlp.c_proj.weight"};
  const auto parameters = named_parameters_of(whole_tower());
  for (const int t : divisors_of_world()) {
    const auto& tp = groups(t).tp;
    const VisionTower tower(small_config(), tp);
    size_t num_split = 0;
    for (const auto& shard : parameter_shards(*tower)) {
      SCOPED_TRACE(testing::Message() << "tensor " << t << ", " << shard.name);
      const std::string block = "transformer.resblocks.0.";
      const auto name = shard.name.starts_with("transformer.") ? shard.name.substr(block.size()) : shard.name;
      const bool is_split = split_names.contains(name);
      num_split += is_split ? 1 : 0;
      EXPECT_EQ(shard.domain, is_split ? GradientDomain::kSharded : GradientDomain::kReplicated);
      auto holders = at::zeros(parameters.at(shard.name).sizes());
      for (const auto& segment : shard.segments) {
        EXPECT_EQ(segment.name, shard.name);
        ASSERT_EQ(segment.global_shape, holders.sizes().vec());
        segment.in_global(holders).add_(1);
      }
      holders = parallel::all_reduce(on_device(holders), tp);
      EXPECT_TRUE(holders.eq(is_split ? 1 : t).all().item<bool>());
    }
    EXPECT_EQ(num_split, 6U * small_config().layers);
  }
}

TEST(SplitVisionTower, StartsWithTheValuesOfTheWholeTower) {
  VisionTower whole(small_config(), GradientDomain::kReplicated);
  const auto whole_shards = parameter_shards(*whole);
  initialize_parameters(whole_shards, 7);
  const auto values = named_parameters_of(whole);
  for (const int t : divisors_of_world()) {
    const VisionTower split(small_config(), groups(t).tp);
    const auto shards = parameter_shards(*split);
    ASSERT_EQ(shards.size(), whole_shards.size());
    initialize_parameters(shards, 7);
    for (size_t i = 0; i < shards.size(); ++i) {
      EXPECT_EQ(shards[i].weight_decay, whole_shards[i].weight_decay) << shards[i].name;
      for (const auto& segment : shards[i].segments) {
        EXPECT_TRUE(test_support::equal(segment.in_local(shards[i].parameter).contiguous(),
                                        segment.in_global(values.at(segment.name)).contiguous()))
            << segment.name;
      }
    }
  }
}

TEST(SplitVisionTower, RefusesRanksThatDoNotDivide) {
  const int t = world_tp()->getSize();
  if (t == 1) GTEST_SKIP() << "one rank divides everything";
  auto config = small_config();
  config.heads = 1;
  EXPECT_EQ(value_error([&] { VisionTower(config, world_tp()); }),
            c10::str("mm_encoder_tp_mode weights: vision heads 1 is not divisible by tensor-parallel size ", t));
}

}  // namespace megatron_cpp::step37
