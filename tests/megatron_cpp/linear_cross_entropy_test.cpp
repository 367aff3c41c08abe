#include "megatron_cpp/tensor_parallel/linear_cross_entropy.h"

#include <ATen/ATen.h>
#include <c10/core/Allocator.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <memory>
#include <string>
#include <vector>

#include "parallel/recording_backend.h"
#include "tests/support/errors.h"
#include "tests/support/live_bytes.h"
#include "tests/support/test_world.h"

namespace megatron_cpp {
namespace {

using parallel::CollectiveKind;
using namespace test_support;

constexpr int64_t kS = 12;
constexpr int64_t kB = 3;
constexpr int64_t kH = 7;

/// V classes, padded to `columns` on each rank.
struct Vocabulary {
  int64_t size;
  int64_t columns;
};

/// Without padding, with some in the last shard, and with shards that are all padding where t is above 1.
std::vector<Vocabulary> vocabularies(int t) {
  return {{5 * t, 5}, {5 * t - 2, 5}, {std::min<int64_t>(3, 2 * t), 2}, {7, 7 + t}};
}

/// Targets that cycle through the vocabulary, so that every shard has some; every fifth is ignored.
at::Tensor make_targets(int64_t vocabulary_size) {
  auto targets = (at::arange(kS * kB, at::kLong) * 7 + 2).remainder(vocabulary_size);
  targets.slice(0, 3, kS * kB, 5).fill_(-100);
  return targets.view({kS, kB});
}

/// Input and weight of all ranks in float64, with the values that `dtype` has of them. Rows of the padding would drown
/// everything if they took part.
struct Case {
  Case(const Vocabulary& vocabulary, int t, at::ScalarType dtype)
      : input((test_support::exact_values({kS, kB, kH}, 3, at::kDouble) * 2).to(dtype).to(at::kDouble)),
        weight(at::full({vocabulary.columns * t, kH}, 1e4, at::kDouble)),
        V(vocabulary.size) {
    weight.narrow(0, 0, V).copy_(test_support::exact_values({V, kH}, 5, at::kDouble).to(dtype));
  }

  at::Tensor input;   ///< [S, B, H]
  at::Tensor weight;  ///< [V', H]
  int64_t V;
};

struct Result {
  at::Tensor loss;
  at::Tensor input;  ///< gradients
  at::Tensor weight;
};

/// LibTorch's own in float64, of loss / divisor.
Result dense(const Case& of, const at::Tensor& target, double smoothing, double divisor) {
  const auto input = of.input.clone().requires_grad_();
  const auto weight = of.weight.clone().requires_grad_();
  const auto logits = at::linear(input, weight.narrow(0, 0, of.V));
  const auto loss =
      at::cross_entropy_loss(logits.view({-1, of.V}), target.reshape({-1}), {}, at::Reduction::Sum, -100, smoothing);
  (loss / divisor).backward();
  return {loss.detach(), input.grad(), weight.grad()};
}

/// This rank's leaves.
struct Leaves {
  Leaves(const Case& of, at::ScalarType dtype, bool sequence_parallel, const parallel::GroupPtr& tp)
      : input(on_device((sequence_parallel ? part(of.input, 0, tp) : of.input).to(dtype)).clone().requires_grad_()),
        weight(on_device(part(of.weight, 0, tp).to(dtype)).clone().requires_grad_()) {}

  at::Tensor input, weight;
};

double largest(const at::Tensor& tensor) { return tensor.numel() == 0 ? 0.0 : tensor.abs().max().item<double>(); }

/// Measured against the largest gradient of any rank, because a rank may have nothing but tiny ones.
void expect_gradient(const at::Tensor& gradient, const at::Tensor& expected, const at::Tensor& whole, double rounding) {
  ASSERT_TRUE(gradient.defined());
  ASSERT_EQ(gradient.sizes(), expected.sizes());
  EXPECT_LE(largest(gradient.cpu().to(at::kDouble) - expected), rounding * largest(whole));
}

double rounding_of(at::ScalarType dtype) {
  return dtype == at::kDouble ? 1e-13 : dtype == at::kFloat ? 2e-6 : 1.0 / 32;
}

LinearCrossEntropyOptions options_of(const Case& of, int64_t chunk, bool sequence_parallel, double smoothing = 0.0) {
  return LinearCrossEntropyOptions({.vocabulary_size = of.V, .label_smoothing = smoothing})
      .chunk(chunk)
      .sequence_parallel(sequence_parallel);
}

void expect_equals_dense(const Case& of, at::ScalarType dtype, const at::Tensor& target,
                         const LinearCrossEntropyOptions& options, const parallel::GroupPtr& tp) {
  constexpr double kDivisor = 31.0;
  const bool sp = options.sequence_parallel();
  const auto expected = dense(of, target, options.loss().label_smoothing, kDivisor);
  const Leaves leaves(of, dtype, sp, tp);
  const auto loss = linear_cross_entropy(leaves.input, leaves.weight, target, options, tp, 1 / kDivisor);
  EXPECT_EQ(loss.scalar_type(), dtype == at::kDouble ? at::kDouble : at::kFloat);
  EXPECT_EQ(loss.dim(), 0);
  EXPECT_NEAR(loss.item<double>(), expected.loss.item<double>(),
              rounding_of(dtype) * (1 + std::abs(expected.loss.item<double>())));
  (loss / kDivisor).backward();
  expect_gradient(leaves.input.grad(), sp ? part(expected.input, 0, tp) : expected.input, expected.input,
                  rounding_of(dtype));
  expect_gradient(leaves.weight.grad(), part(expected.weight, 0, tp), expected.weight, rounding_of(dtype));
  const int64_t begin = std::min(of.V, leaves.weight.size(0) * tp->getRank());
  const int64_t real = std::min(of.V - begin, leaves.weight.size(0));
  EXPECT_EQ(largest(leaves.weight.grad().slice(0, real)), 0.0) << "padding has a gradient";
}

}  // namespace

// Chunks of one position, that don't divide S, and larger than S; and the whole.
TEST(LinearCrossEntropy, EqualsTheDenseLoss) {
  for (const int t : divisors_of_world()) {
    for (const auto& vocabulary : vocabularies(t)) {
      for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
        const Case of(vocabulary, t, dtype);
        for (const bool sequence_parallel : {false, true}) {
          for (const int64_t chunk : {1, 5, 17, 0}) {
            const double smoothing = chunk == 5 ? 0.1 : 0.0;
            SCOPED_TRACE(testing::Message()
                         << "V " << of.V << ", " << vocabulary.columns << " columns on each of " << t << ", " << dtype
                         << ", chunk " << chunk << ", sequence parallel " << sequence_parallel);
            expect_equals_dense(of, dtype, make_targets(of.V), options_of(of, chunk, sequence_parallel, smoothing),
                                groups(t).tp);
          }
        }
      }
    }
  }
}

TEST(LinearCrossEntropy, WithoutTargetsOrTokensIsZero) {
  for (const int t : divisors_of_world()) {
    const Case of({5 * t - 2, 5}, t, at::kFloat);
    const Leaves leaves(of, at::kFloat, false, groups(t).tp);
    const auto ignored = at::full({kS, kB}, -100, at::kLong);
    const auto loss =
        linear_cross_entropy(leaves.input, leaves.weight, ignored, options_of(of, 5, false), groups(t).tp);
    loss.backward();
    EXPECT_EQ(loss.item<double>(), 0.0);
    EXPECT_TRUE(test_support::equal(leaves.input.grad(), at::zeros_like(leaves.input)));
    EXPECT_TRUE(test_support::equal(leaves.weight.grad(), at::zeros_like(leaves.weight)));

    const auto none = leaves.input.detach().narrow(0, 0, 0).requires_grad_();
    const auto no_loss =
        linear_cross_entropy(none, leaves.weight, ignored.narrow(0, 0, 0), options_of(of, 5, false), groups(t).tp);
    no_loss.backward();
    EXPECT_EQ(no_loss.item<double>(), 0.0);
    EXPECT_EQ(none.grad().sizes(), none.sizes());
  }
}

// Also where the gradient has more precision than the weight.
TEST(LinearCrossEntropy, AddsMicroBatchesIntoTheWeightsGradient) {
  for (const int t : divisors_of_world()) {
    for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
      const Case of({5 * t - 2, 5}, t, dtype);
      const Leaves leaves(of, dtype, false, groups(t).tp);
      const auto sum_dtype = dtype == at::kBFloat16 ? at::kFloat : dtype;
      const auto before = on_device(test_support::exact_values(leaves.weight.sizes(), 8, sum_dtype));
      auto weight = leaves.weight;
      weight.mutable_grad() = before.clone();
      const auto* memory = weight.grad().const_data_ptr();
      const auto options = options_of(of, 5, false).accumulate_into_grad(true);
      auto expected = part(at::zeros_like(of.weight), 0, groups(t).tp).clone();
      for (const int64_t shift : {0, 1}) {
        const auto target = make_targets(of.V).roll(shift, 0);
        linear_cross_entropy(leaves.input, weight, target, options, groups(t).tp).backward();
        expected += part(dense(of, target, 0.0, 1.0).weight, 0, groups(t).tp);
      }
      EXPECT_EQ(weight.grad().const_data_ptr(), memory);
      const auto added = weight.grad().to(at::kDouble) - before.to(at::kDouble);
      expect_gradient(added, expected, expected, rounding_of(dtype) + (dtype == at::kFloat ? 1e-6 : 0.0));
    }
  }
}

TEST(LinearCrossEntropy, LeavesOutWhatNeedsNoGradient) {
  for (const int t : divisors_of_world()) {
    const Case of({5 * t - 2, 5}, t, at::kFloat);
    const auto target = make_targets(of.V);
    const auto& tp = groups(t).tp;
    const auto options = options_of(of, 5, false).accumulate_into_grad(true);
    const Leaves both(of, at::kFloat, false, tp);
    const auto loss = linear_cross_entropy(both.input, both.weight, target, options, tp);
    loss.backward();

    const Leaves frozen(of, at::kFloat, false, tp);
    auto weight = frozen.weight.detach();
    linear_cross_entropy(frozen.input, weight, target, options, tp).backward();
    EXPECT_FALSE(weight.grad().defined());
    EXPECT_TRUE(test_support::equal(frozen.input.grad(), both.input.grad()));

    const Leaves alone(of, at::kFloat, false, tp);
    linear_cross_entropy(alone.input.detach(), alone.weight, target, options, tp).backward();
    EXPECT_TRUE(test_support::equal(alone.weight.grad(), both.weight.grad()));

    const c10::NoGradGuard no_grad;
    weight = both.weight;
    const auto before = weight.grad().clone();
    const auto recorded = parallel::record(tp);
    const auto again = linear_cross_entropy(both.input, weight, target, options, recorded.group);
    EXPECT_TRUE(test_support::equal(again, loss.detach()));
    EXPECT_FALSE(again.requires_grad());
    EXPECT_TRUE(test_support::equal(weight.grad(), before));
    EXPECT_EQ(recorded.count->of(CollectiveKind::kAllReduce), t == 1 ? 0 : 6);  // two for each of three chunks
  }
}

TEST(LinearCrossEntropy, SendsTheStatisticsOfEachChunkAndTheGradientOnce) {
  for (const int t : divisors_of_world()) {
    for (const bool sequence_parallel : {false, true}) {
      const Case of({5 * t - 2, 5}, t, at::kFloat);
      const auto recorded = parallel::record(groups(t).tp);
      const Leaves leaves(of, at::kFloat, sequence_parallel, groups(t).tp);
      const auto options = options_of(of, 5, sequence_parallel);
      const auto loss = linear_cross_entropy(leaves.input, leaves.weight, make_targets(of.V), options, recorded.group);
      const auto after_forward = *recorded.count;
      loss.backward();
      EXPECT_EQ(*recorded.count, after_forward);
      const int64_t once = t == 1 ? 0 : 1;
      EXPECT_EQ(recorded.count->of(CollectiveKind::kAllReduce), once * (sequence_parallel ? 6 : 7));
      EXPECT_EQ(recorded.count->of(CollectiveKind::kAllGather), once * (sequence_parallel ? 1 : 0));
      EXPECT_EQ(recorded.count->of(CollectiveKind::kReduceScatter), once * (sequence_parallel ? 1 : 0));
      EXPECT_EQ(recorded.count->total(), once * (sequence_parallel ? 8 : 7));
    }
  }
}

// Besides the weight and its gradient: the logits of a chunk in float32, the input, and its gradient.
TEST(LinearCrossEntropy, HoldsOneChunkOfLogits) {
  constexpr int64_t S = 512, V = 4099, H = 32, chunk = 32;
  for (const int t : divisors_of_world()) {
    const int64_t columns = (V + t - 1) / t;
    auto weight = on_device(test_support::exact_values({columns, H}, 1)).requires_grad_();
    weight.mutable_grad() = at::zeros_like(weight);
    const auto target = at::arange(S, at::kLong).mul_(7).view({S, 1});
    const auto watch = std::make_shared<LiveBytes>();
    const auto options = LinearCrossEntropyOptions({.vocabulary_size = V}).chunk(chunk).accumulate_into_grad(true);
    {
      const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, watch);
      const auto input = on_device(at::ones({S, 1, H})).requires_grad_();
      linear_cross_entropy(input, weight, target, options, groups(t).tp).backward();
    }
    EXPECT_EQ(watch->live(), 0);
    EXPECT_LE(watch->peak, (chunk * columns * 11 / 10 + 2 * S * H) * 4);
    EXPECT_GE(watch->peak, (chunk * columns + 2 * S * H) * 4);
  }
}

TEST(LinearCrossEntropy, RefusesAnotherGradientThanAnnounced) {
  for (const int t : divisors_of_world()) {
    if (device().is_cuda()) continue;  // trips an assertion there
    const Case of({5 * t - 2, 5}, t, at::kDouble);
    const auto target = make_targets(of.V);
    const Leaves leaves(of, at::kDouble, false, groups(t).tp);
    const auto loss = linear_cross_entropy(leaves.input, leaves.weight, target, options_of(of, 5, false), groups(t).tp,
                                           /*loss_gradient=*/0.5);
    EXPECT_TRUE(contains(value_error([&] { (loss * 0.25).backward(); }),
                         "the loss got the gradient 0.25 in the backward pass, and its loss_gradient was 0.5"));
    const auto half = (loss * 0.5).sum();
    EXPECT_THROW(torch::autograd::grad({half}, {leaves.input}, {}, /*retain_graph=*/true, /*create_graph=*/true),
                 c10::NotImplementedError);
    half.backward({}, /*retain_graph=*/true);
    EXPECT_THROW(half.backward(), c10::Error);
  }
}

TEST(LinearCrossEntropy, RefusesShapesAndOptionsThatDoNotFit) {
  for (const int t : divisors_of_world()) {
    const Case of({5 * t - 2, 5}, t, at::kFloat);
    const auto recorded = parallel::record(groups(t).tp);
    const Leaves leaves(of, at::kFloat, false, groups(t).tp);
    const auto target = make_targets(of.V);
    const auto message = [&](const at::Tensor& input, const at::Tensor& some_target,
                             const LinearCrossEntropyOptions& options) {
      return value_error([&] { linear_cross_entropy(input, leaves.weight, some_target, options, recorded.group); });
    };
    EXPECT_TRUE(contains(message(leaves.input, target, options_of(of, -1, false)), "chunk -1 is negative"));
    EXPECT_TRUE(contains(message(leaves.input[0], target, options_of(of, 5, false)), "input [3, 7] Float"));
    EXPECT_TRUE(contains(message(leaves.input.to(at::kDouble), target, options_of(of, 5, false)), "of one dtype"));
    EXPECT_TRUE(contains(message(leaves.input.narrow(2, 0, 6), target, options_of(of, 5, false)), "[12, 3, 6]"));
    EXPECT_TRUE(contains(message(leaves.input, target.t(), options_of(of, 5, false)), "target must be int64 [12, 3]"));
    EXPECT_TRUE(contains(message(leaves.input, target + of.V, options_of(of, 5, false)), "is outside the vocabulary"));
    auto larger = of;
    larger.V = 5 * t + 1;
    EXPECT_TRUE(contains(message(leaves.input, target, options_of(larger, 5, false)), "do not hold a vocabulary of"));
    EXPECT_TRUE(contains(message(leaves.input, target, options_of(of, 5, false, 1.5)), "label_smoothing 1.5"));
    EXPECT_EQ(recorded.count->total(), 0);
  }
}

}  // namespace megatron_cpp
