#include "megatron_cpp/optimizer/adamw.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/optim/adamw.h>

#include <cmath>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp {
namespace {

using namespace test_support;

ParameterShard shard_of(std::string name, const at::Tensor& tensor, bool weight_decay) {
  return replicated_parameter(std::move(name), tensor, GradientDomain::kReplicated, InitialValue::constant(0.0),
                              weight_decay);
}

/// The update of Loshchilov and Hutter's algorithm 2, by the letter, in double precision.
struct NaiveAdamW {
  at::Tensor value, exp_avg, exp_avg_sq;

  explicit NaiveAdamW(const at::Tensor& start)
      : value(start.detach().cpu().to(at::kDouble).clone()),
        exp_avg(at::zeros_like(value)),
        exp_avg_sq(at::zeros_like(value)) {}

  void step(const at::Tensor& gradient, int64_t number, double rate, double decay, const AdamWOptions& options) {
    const auto g = gradient.cpu().to(at::kDouble);
    exp_avg = exp_avg * options.beta1 + g * (1 - options.beta1);
    exp_avg_sq = exp_avg_sq * options.beta2 + g * g * (1 - options.beta2);
    const auto mean = exp_avg / (1 - std::pow(options.beta1, static_cast<double>(number)));
    const auto square = exp_avg_sq / (1 - std::pow(options.beta2, static_cast<double>(number)));
    value = value - rate * decay * value - rate * mean / (square.sqrt() + options.eps);
  }
};

std::vector<ParameterShard> parameters_for_adamw() {
  std::vector<ParameterShard> shards;
  int64_t seed = 0;
  for (const bool decays : {true, false}) {
    for (const auto& shape : std::vector<std::vector<int64_t>>{{5, 37}, {3}, {0, 4}}) {
      auto tensor = on_device(exact_values(shape, ++seed)).requires_grad_(true);
      shards.push_back(shard_of(std::to_string(seed), tensor, decays));
    }
  }
  return shards;
}

at::Tensor gradient_for(const ParameterShard& shard, int64_t step) {
  return on_device(exact_values(shard.parameter.sizes(), 17 * step + static_cast<int64_t>(shard.name.back()))) * 0.1;
}

void step_with_gradients(AdamW& optimizer, int64_t step, double rate) {
  for (const auto& slice : optimizer.slices()) {
    slice.shard.parameter.mutable_grad() = gradient_for(slice.shard, step);
  }
  optimizer.step(rate);
}

}  // namespace

TEST(AdamW, EqualsTheFormulas) {
  const AdamWOptions options{.beta1 = 0.8, .beta2 = 0.9, .eps = 1e-3, .weight_decay = 0.3};
  AdamW optimizer(parameters_for_adamw(), options);
  std::vector<NaiveAdamW> naive;
  for (const auto& slice : optimizer.slices()) naive.emplace_back(slice.shard.parameter);
  for (int64_t step = 1; step <= 5; ++step) {
    const double rate = 0.1 / static_cast<double>(step);
    step_with_gradients(optimizer, step, rate);
    EXPECT_EQ(optimizer.num_steps(), step);
    for (size_t i = 0; i < naive.size(); ++i) {
      const auto& slice = optimizer.slices()[i];
      const auto& shard = slice.shard;
      naive[i].step(gradient_for(shard, step), step, rate, shard.weight_decay ? 0.3 : 0.0, options);
      EXPECT_TRUE(near(shard.parameter, naive[i].value, 1e-6)) << shard.name << ", step " << step;
      EXPECT_TRUE(near(slice.exp_avg, naive[i].exp_avg.view(-1), 1e-6)) << shard.name;
      EXPECT_TRUE(near(slice.exp_avg_sq, naive[i].exp_avg_sq.view(-1), 1e-6)) << shard.name;
    }
  }
}

/// LibTorch's own optimizer, with a group for each parameter.
TEST(AdamW, ScalesAreParameterGroups) {
  struct Expected {
    std::string name;
    bool decays;
    double learning_rate_scale, weight_decay_scale;
  };
  const std::vector<Expected> expected{{"vision.a.weight", true, 0.1, 2.0}, {"vision.a.bias", false, 0.1, 0.0},
                                       {"vision.b.weight", true, 3.0, 2.0}, {"visionary.weight", true, 1.0, 1.0},
                                       {"text.weight", true, 0.0, 0.5},     {"text.norm", false, 1.0, 0.0}};
  const AdamWOptions options{.weight_decay = 0.3,
                             .learning_rate_scales = {{"vision", 0.1}, {"vision.b", 3.0}, {"text.weight", 0.0}},
                             .weight_decay_scales = {{"vision", 2.0}, {"text", 0.5}}};
  std::vector<ParameterShard> shards;
  std::vector<torch::optim::OptimizerParamGroup> groups;
  for (const auto& [name, decays, learning_rate_scale, weight_decay_scale] : expected) {
    const auto start = on_device(exact_values({5, 7}, static_cast<int64_t>(shards.size()) + 1)).to(at::kDouble);
    shards.push_back(shard_of(name, start.clone().requires_grad_(true), decays));
    auto own = std::make_unique<torch::optim::AdamWOptions>(0.01 * learning_rate_scale);
    own->betas({options.beta1, options.beta2}).eps(options.eps).weight_decay(0.3 * weight_decay_scale);
    groups.emplace_back(std::vector<at::Tensor>{start.clone().requires_grad_(true)}, std::move(own));
  }
  AdamW optimizer(shards, options);
  torch::optim::AdamW reference(groups);
  for (int64_t step = 1; step <= 3; ++step) {
    for (size_t i = 0; i < shards.size(); ++i) {
      const auto gradient = gradient_for(shards[i], step).to(at::kDouble);
      shards[i].parameter.mutable_grad() = gradient;
      reference.param_groups()[i].params()[0].mutable_grad() = gradient;
    }
    optimizer.step(0.01);
    reference.step();
  }
  for (size_t i = 0; i < shards.size(); ++i) {
    EXPECT_TRUE(near(shards[i].parameter, reference.param_groups()[i].params()[0], 1e-12)) << shards[i].name;
  }
}

TEST(AdamW, RefusesAPrefixOfNoParameter) {
  const std::vector<std::string> names{"vision.a", "vision.b", "text.c"};
  const auto error = [&](const AdamWOptions& options) { return value_error([&] { options.check_prefixes(names); }); };
  EXPECT_EQ(error({.learning_rate_scales = {{"vision", 1.0}, {"text.c", 2.0}}}), "nothing thrown");
  EXPECT_TRUE(contains(error({.weight_decay_scales = {{"text", 1.0}, {"visio", 2.0}}}),
                       "a scale is given for visio, but no parameter is called so or visio.*; there are vision.a, "
                       "vision.b, text.c, ..."));
  EXPECT_TRUE(contains(error({.learning_rate_scales = {{"vision.a.", 1.0}}}), "a scale is given for vision.a., but"));
}

TEST(AdamW, GoesOnBitForBit) {
  AdamW whole(parameters_for_adamw(), {});
  const auto shards = parameters_for_adamw();
  AdamW first(shards, {});
  for (int64_t step = 1; step <= 4; ++step) step_with_gradients(whole, step, 0.01);
  for (int64_t step = 1; step <= 2; ++step) step_with_gradients(first, step, 0.01);
  AdamW second(shards, {});
  for (size_t i = 0; i < first.slices().size(); ++i) {
    second.slices()[i].exp_avg.copy_(first.slices()[i].exp_avg);
    second.slices()[i].exp_avg_sq.copy_(first.slices()[i].exp_avg_sq);
  }
  second.set_num_steps(2);
  for (int64_t step = 3; step <= 4; ++step) step_with_gradients(second, step, 0.01);
  for (size_t i = 0; i < shards.size(); ++i) {
    EXPECT_TRUE(test_support::equal(shards[i].parameter, whole.slices()[i].shard.parameter));
  }
}

// As two ranks of a distributed optimizer would: each updates its part of every parameter.
TEST(AdamW, OfSlicesIsThatOfTheWhole) {
  AdamW whole(parameters_for_adamw(), {});
  const auto shards = parameters_for_adamw();
  std::vector<ParameterSlice> first;
  std::vector<ParameterSlice> second;
  for (const auto& slice : whole_slices(shards, {})) {
    const auto numel = slice.elements.end;
    for (const auto& [begin, end, part] : {std::tuple{int64_t{0}, numel / 3, &first}, {numel / 3, numel, &second}}) {
      const auto main = slice.main.narrow(0, begin, end - begin);
      part->push_back({slice.shard, {begin, end}, main, at::zeros_like(main), at::zeros_like(main)});
    }
  }
  AdamW optimizers[] = {AdamW(first, {}), AdamW(second, {})};
  for (int64_t step = 1; step <= 3; ++step) {
    step_with_gradients(whole, step, 0.01);
    for (auto& optimizer : optimizers) step_with_gradients(optimizer, step, 0.01);
  }
  for (size_t i = 0; i < shards.size(); ++i) {
    EXPECT_TRUE(test_support::equal(shards[i].parameter, whole.slices()[i].shard.parameter));
  }
}

// The updates are those of the float32 parameters, and the bfloat16 ones are these, rounded.
TEST(AdamW, UpdatesAFloat32CopyOfBfloat16Parameters) {
  AdamW wide(parameters_for_adamw(), {});
  auto shards = parameters_for_adamw();
  for (auto& shard : shards) {
    shard.parameter = shard.parameter.detach().to(at::kBFloat16).requires_grad_(true);
    shard.parameter.set_grad_dtype(at::kFloat);
  }
  AdamW narrow(shards, {});
  size_t number = 0;
  narrow.fill_parameters(shards, [&](const ParameterShard& shard) {
    EXPECT_EQ(shard.parameter.scalar_type(), at::kFloat);
    shard.parameter.copy_(wide.slices()[number++].shard.parameter.detach());  // the values before rounding
  });
  for (const auto& shard : shards) EXPECT_EQ(shard.parameter.scalar_type(), at::kBFloat16);
  for (int64_t step = 1; step <= 4; ++step) {
    step_with_gradients(wide, step, 0.01);
    step_with_gradients(narrow, step, 0.01);
    for (size_t i = 0; i < shards.size(); ++i) {
      const auto expected = wide.slices()[i].shard.parameter.detach();
      EXPECT_TRUE(test_support::equal(narrow.slices()[i].main.view(expected.sizes()), expected));
      EXPECT_TRUE(test_support::equal(shards[i].parameter.detach(), expected.to(at::kBFloat16)));
    }
  }
}

TEST(AdamW, MomentsAndGradientsMayBeBfloat16) {
  const AdamWOptions options{
      .beta1 = 0.8, .beta2 = 0.9, .eps = 1e-3, .exp_avg = at::kBFloat16, .exp_avg_sq = at::kBFloat16};
  auto shards = parameters_for_adamw();
  std::vector<NaiveAdamW> naive;
  for (auto& shard : shards) {
    naive.emplace_back(shard.parameter);
    shard.parameter = shard.parameter.detach().to(at::kBFloat16).requires_grad_(true);
  }
  AdamW optimizer(shards, options);
  for (int64_t step = 1; step <= 4; ++step) {
    for (size_t i = 0; i < shards.size(); ++i) {
      const auto gradient = gradient_for(shards[i], step).to(at::kBFloat16);
      shards[i].parameter.mutable_grad() = gradient;
      auto& by_hand = naive[i];
      by_hand.step(gradient, step, 0.1, shards[i].weight_decay ? options.weight_decay : 0.0, options);
      by_hand.exp_avg = by_hand.exp_avg.to(at::kBFloat16).to(at::kDouble);
      by_hand.exp_avg_sq = by_hand.exp_avg_sq.to(at::kBFloat16).to(at::kDouble);
    }
    optimizer.step(0.1);
    for (size_t i = 0; i < shards.size(); ++i) {
      const auto& slice = optimizer.slices()[i];
      EXPECT_EQ(slice.exp_avg.scalar_type(), at::kBFloat16);
      // A value between two bfloat16 numbers may be rounded to the one or the other.
      EXPECT_TRUE(test_support::near(slice.exp_avg.cpu().to(at::kDouble), naive[i].exp_avg.view({-1}), 1e-2));
      EXPECT_TRUE(test_support::near(slice.main.cpu().to(at::kDouble), naive[i].value.view({-1}), 2e-3));
    }
  }
}

TEST(AdamW, LeavesFrozenParametersAlone) {
  auto shards = parameters_for_adamw();
  shards[1].parameter.set_requires_grad(false);
  const auto frozen = shards[1].parameter.clone();
  AdamW optimizer(shards, {});
  EXPECT_EQ(optimizer.slices().size(), shards.size() - 1);
  step_with_gradients(optimizer, 1, 0.1);
  EXPECT_TRUE(test_support::equal(shards[1].parameter, frozen));
}

TEST(AdamW, RefusesAParameterWithoutGradient) {
  const auto shards = parameters_for_adamw();
  AdamW optimizer(shards, {});
  const auto before = shards[0].parameter.detach().clone();
  for (const auto& shard : shards) shard.parameter.mutable_grad() = gradient_for(shard, 1);
  shards[3].parameter.mutable_grad().reset();
  EXPECT_TRUE(contains(value_error([&] { optimizer.step(0.1); }), "parameter 4 has no gradient"));
  EXPECT_EQ(optimizer.num_steps(), 0);
  EXPECT_TRUE(test_support::equal(shards[0].parameter, before));
}

TEST(AdamW, RefusesValuesOutOfRange) {
  EXPECT_TRUE(
      contains(value_error([] { AdamW(std::vector<ParameterShard>(), {.beta1 = 1.0}); }), "beta1 1 is not in [0, 1)"));
  EXPECT_TRUE(contains(value_error([] { AdamW(std::vector<ParameterShard>(), {.beta2 = -0.5}); }),
                       "beta2 -0.5 is not in [0, 1)"));
  EXPECT_TRUE(
      contains(value_error([] { AdamW(std::vector<ParameterShard>(), {.eps = 0.0}); }), "eps 0 is not above 0"));
  EXPECT_TRUE(contains(value_error([] { AdamW(std::vector<ParameterShard>(), {.weight_decay = -1.0}); }),
                       "weight decay -1 is below 0"));
  EXPECT_TRUE(contains(value_error([] { AdamW(std::vector<ParameterShard>(), {.exp_avg_sq = at::kHalf}); }),
                       "moments in Half: they can be float32 or bfloat16"));
  EXPECT_TRUE(contains(value_error([] {
                         AdamW(std::vector<ParameterShard>(), {.learning_rate_scales = {{"a", -2.0}}});
                       }),
                       "scale -2 of a is below 0"));
}

}  // namespace megatron_cpp
