#include "megatron_cpp/training/learning_rate.h"

#include <gtest/gtest.h>

#include <cmath>
#include <utility>

#include "tests/support/errors.h"

namespace megatron_cpp {
namespace {

using namespace test_support;

TEST(LearningRate, ValuesByHand) {
  const LearningRateSchedule schedule{.peak = 1.0, .floor = 0.2, .warmup_steps = 4, .total_steps = 12};
  EXPECT_DOUBLE_EQ(schedule.at(1), 0.25);
  EXPECT_DOUBLE_EQ(schedule.at(3), 0.75);
  EXPECT_DOUBLE_EQ(schedule.at(4), 1.0);
  EXPECT_NEAR(schedule.at(6), 0.2 + 0.4 * (1 + std::sqrt(0.5)), 1e-15);
  EXPECT_NEAR(schedule.at(8), 0.6, 1e-15);
  EXPECT_NEAR(schedule.at(10), 0.2 + 0.4 * (1 - std::sqrt(0.5)), 1e-15);
  EXPECT_NEAR(schedule.at(12), 0.2, 1e-15);
  EXPECT_NEAR(schedule.at(100), 0.2, 1e-15);
}

TEST(LearningRate, WithoutWarmUpOrWithNothingElse) {
  const LearningRateSchedule straight_down{.peak = 1.0, .floor = 0.0, .warmup_steps = 0, .total_steps = 2};
  EXPECT_NEAR(straight_down.at(1), 0.5, 1e-15);
  EXPECT_NEAR(straight_down.at(2), 0.0, 1e-15);
  const LearningRateSchedule all_warm_up{.peak = 1.0, .floor = 0.5, .warmup_steps = 8, .total_steps = 4};
  EXPECT_DOUBLE_EQ(all_warm_up.at(4), 0.5);
  EXPECT_DOUBLE_EQ(all_warm_up.at(8), 1.0);
}

TEST(LearningRate, RefusesValuesOutOfRange) {
  EXPECT_TRUE(
      contains(value_error([] { LearningRateSchedule{.peak = 0.0}.validate(); }), "learning rate 0 is not above 0"));
  EXPECT_TRUE(contains(value_error([] { LearningRateSchedule{.peak = 1.0, .floor = 2.0}.validate(); }),
                       "minimum learning rate 2 is not in [0, 1]"));
  EXPECT_TRUE(
      contains(value_error([] { LearningRateSchedule{.total_steps = 0}.validate(); }), "number of steps 0 is below 1"));
  EXPECT_TRUE(contains(value_error([] { LearningRateSchedule{.warmup_steps = -1}.validate(); }),
                       "warm-up steps -1 are below 0"));
}

TEST(LearningRate, OtherDecaysByHand) {
  LearningRateSchedule schedule{.peak = 1.0, .floor = 0.2, .warmup_steps = 4, .total_steps = 12};
  schedule.decay = LearningRateDecay::kLinear;
  for (const auto& [step, rate] :
       {std::pair(1, 0.25), {4, 1.0}, {6, 0.8}, {8, 0.6}, {11, 0.3}, {12, 0.2}, {100, 0.2}}) {
    EXPECT_NEAR(schedule.at(step), rate, 1e-15) << step;
  }
  schedule.decay = LearningRateDecay::kConstant;
  for (const auto& [step, rate] : {std::pair(1, 0.25), {4, 1.0}, {5, 1.0}, {12, 1.0}, {100, 1.0}}) {
    EXPECT_EQ(schedule.at(step), rate) << step;
  }
  schedule.decay = LearningRateDecay::kWsd;
  schedule.decay_steps = 4;
  const double quarter = std::sqrt(std::sqrt(0.5));  // 0.5 to the power of 1/4
  for (const auto& [step, rate] : {std::pair(1, 0.25),
                                   {4, 1.0},
                                   {5, 1.0},
                                   {8, 1.0},
                                   {9, 0.2 + 0.8 * (2 * quarter - 1)},
                                   {10, 0.2 + 0.8 * (2 * std::sqrt(0.5) - 1)},
                                   {12, 0.2},
                                   {100, 0.2}}) {
    EXPECT_NEAR(schedule.at(step), rate, 1e-15) << step;
  }
}

TEST(LearningRate, CosineIsWhatItWasBitForBit) {
  const LearningRateSchedule schedule{.peak = 2e-3, .floor = 3e-4, .warmup_steps = 30, .total_steps = 1000};
  for (int64_t step = 31; step <= 1000; ++step) {
    const double progress = static_cast<double>(step - 30) / 970.0;
    EXPECT_EQ(schedule.at(step), 3e-4 + (2e-3 - 3e-4) * 0.5 * (1.0 + std::cos(std::acos(-1.0) * progress)));
  }
}

TEST(LearningRate, DecayStepsGoWithWsd) {
  const auto error = [](LearningRateDecay decay, int64_t decay_steps) {
    return value_error([&] {
      LearningRateSchedule{.warmup_steps = 4, .total_steps = 12, .decay = decay, .decay_steps = decay_steps}.validate();
    });
  };
  EXPECT_EQ(error(LearningRateDecay::kWsd, 8), "nothing thrown");
  EXPECT_TRUE(contains(error(LearningRateDecay::kWsd, 0), "decay_steps 0 is not in [1, 8], the steps after"));
  EXPECT_TRUE(contains(error(LearningRateDecay::kWsd, 9), "decay_steps 9 is not in [1, 8], the steps after"));
  for (const auto decay : {LearningRateDecay::kCosine, LearningRateDecay::kLinear, LearningRateDecay::kConstant}) {
    EXPECT_EQ(error(decay, 0), "nothing thrown");
    EXPECT_TRUE(contains(error(decay, 5), "decay_steps 5 needs the decay wsd"));
  }
}

}  // namespace
}  // namespace megatron_cpp
