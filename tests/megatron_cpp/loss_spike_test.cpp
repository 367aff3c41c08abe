// Which losses are spikes, and that a step with one names its samples.
#include "megatron_cpp/training/loss_spike.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "megatron_cpp/training/trainer.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp {
namespace {

using namespace test_support;

/// Has seen 2 + amplitude and 2 - amplitude by turns.
LossSpikes after(int64_t num_losses, double amplitude, double threshold = 10.0) {
  LossSpikes spikes(threshold);
  for (int64_t i = 0; i < num_losses; ++i) {
    EXPECT_FALSE(spikes.add(2.0 + (i % 2 == 0 ? amplitude : -amplitude)));
  }
  return spikes;
}

}  // namespace

TEST(LossSpikes, AreFarAboveTheMedian) {
  // The median is 2, the MAD 0.1.
  const double bound = 2.0 + 10 * 1.4826 * 0.1;
  EXPECT_FALSE(after(100, 0.1).add(bound - 1e-6));
  const auto spike = after(100, 0.1).add(bound + 1e-6);
  ASSERT_TRUE(spike);
  EXPECT_EQ(*spike, "loss 3.4826 is far above the last 100: their median is 2, and their deviation 0.148");
  EXPECT_TRUE(after(100, 0.1, 5.0).add(2.75));
  EXPECT_FALSE(after(100, 0.1, 5.0).add(2.7));
  EXPECT_FALSE(after(100, 0.1).add(-100.0)) << "below";
  EXPECT_FALSE(after(100, 0.0).add(2.2 - 1e-6)) << "a hundredth of the median is the least deviation";
  EXPECT_TRUE(after(100, 0.0).add(2.2 + 1e-6));
}

TEST(LossSpikes, NeedSomeLossesAndForgetOldOnes) {
  EXPECT_FALSE(after(LossSpikes::kLeast - 1, 0.1).add(100.0));
  EXPECT_TRUE(after(LossSpikes::kLeast, 0.1).add(100.0));
  EXPECT_FALSE(after(100, 0.1, 0.0).add(100.0)) << "off";
  auto spikes = after(100, 0.1);
  for (int64_t i = 0; i < 40; ++i) EXPECT_TRUE(spikes.add(100.0)) << "a spike doesn't move the median";
  for (int64_t i = 0; i < 20; ++i) spikes.add(100.0);
  EXPECT_FALSE(spikes.add(100.0)) << "a new level is none any more";
  EXPECT_TRUE(throws([] { LossSpikes(-1.0); }, "loss_spike -1 is below 0"));
}

TEST(LossSpikes, OnlyFiniteLossesCount) {
  auto spikes = after(LossSpikes::kLeast - 1, 0.1);
  for (const double loss : {std::nan(""), std::numeric_limits<double>::infinity()}) EXPECT_FALSE(spikes.add(loss));
  EXPECT_FALSE(spikes.add(2.0));
  EXPECT_TRUE(spikes.add(100.0));
}

TEST(LossSpikes, AStepWithOneNamesItsSamplesAndGoesOn) {
  for (const int tp : divisors_of_world()) {
    const auto& layout = groups(tp);
    auto w = on_device(at::ones({1})).requires_grad_();
    TrainerOptions options{.adamw = {}, .learning_rate = {.peak = 1e-3, .floor = 1e-3, .total_steps = 99}};
    options.loss_spike = 10.0;
    Trainer trainer({replicated_parameter("w", w, GradientDomain::kReplicated, InitialValue::constant(0.0), true)},
                    layout, options);
    const auto step = [&](double factor) {
      const auto rank = layout.dp->getRank();
      // Only the last replica has a second micro-batch.
      const int64_t own = rank == layout.dp->getSize() - 1 ? 2 : 1;
      return trainer.step([&](int64_t /*i*/) { return (w * w * factor).sum(); }, own, layout.dp->getSize() + 1,
                          [&](int64_t i) { return std::vector<std::string>{fmt::format("sample {}.{}", rank, i)}; });
    };
    Warnings warnings;
    for (int64_t i = 0; i < LossSpikes::kLeast; ++i) step(1.0);
    EXPECT_TRUE(warnings.texts.empty());
    step(3.0);
    EXPECT_EQ(trainer.optimizer().num_steps(), LossSpikes::kLeast + 1);
    ASSERT_EQ(warnings.texts.size(), runtime().rank() == 0 ? 1 : 0);
    std::string samples = "the samples of this step: sample 0.0";
    for (int rank = 1; rank < layout.dp->getSize(); ++rank) samples += fmt::format(", sample {}.0", rank);
    samples += fmt::format(", sample {}.1", layout.dp->getSize() - 1);
    for (const auto& text : warnings.texts) {
      EXPECT_TRUE(contains(text, "step 21: loss 2.8"));
      EXPECT_TRUE(contains(text, samples));
    }
  }
}

}  // namespace megatron_cpp
