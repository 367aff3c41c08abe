#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "megatron_cpp/tensor_parallel/vocab_parallel_cross_entropy.h"
#include "parallel/recording_backend.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp {
namespace {

using parallel::CollectiveKind;
using namespace test_support;

constexpr int64_t kS = 5;
constexpr int64_t kB = 3;

/// Targets that cycle through the vocabulary, so that every shard has some, in another order than the tokens.
at::Tensor make_targets(int64_t vocabulary_size) {
  return (at::arange(kS * kB, at::kLong) * 7 + 2).remainder(vocabulary_size).view({kS, kB});
}

/// Logits [S, B, V] of moderate size that no two tokens share.
at::Tensor make_logits(int64_t vocabulary_size) {
  return test_support::exact_values({kS, kB, vocabulary_size}, 3, at::kDouble) +
         at::arange(kS * kB, at::kDouble).view({kS, kB, 1}) / 16;
}

/// What the padded columns hold: large enough to drown everything if one took part.
at::Tensor with_padding(const at::Tensor& logits, int64_t padded_size) {
  auto padded = at::full({logits.size(0), logits.size(1), padded_size}, 1e30, logits.options());
  padded.slice(-1, logits.size(-1), padded_size, 2).fill_(std::numeric_limits<double>::quiet_NaN());
  padded.narrow(-1, 0, logits.size(-1)).copy_(logits);
  return padded;
}

/// A loss of the losses whose weights differ by token, equal on every rank.
at::Tensor token_weights() { return test_support::exact_values({kS, kB}, 21, at::kDouble) + 0.0625; }

struct Result {
  at::Tensor loss;
  at::Tensor gradient;  ///< of the logits
};

/// LibTorch's own, on the whole logits in float64.
Result dense(const at::Tensor& logits, const at::Tensor& target, const CrossEntropyOptions& options) {
  const auto leaf = logits.to(at::kDouble).clone().requires_grad_();
  const auto loss = at::cross_entropy_loss(leaf.view({-1, leaf.size(-1)}), target.reshape({-1}), {},
                                           at::Reduction::None, options.ignore_index, options.label_smoothing)
                        .view(target.sizes());
  (loss * token_weights().narrow(0, 0, target.size(0))).sum().backward();
  return {loss.detach(), leaf.grad()};
}

/// Ours, on this rank's columns of logits [S, B, V'].
Result sharded(const at::Tensor& padded_logits, const at::Tensor& target, const CrossEntropyOptions& options,
               const parallel::GroupPtr& tp) {
  const auto columns = part(padded_logits, -1, tp);
  const auto leaf = on_device(columns.contiguous()).requires_grad_();
  const auto loss = vocab_parallel_cross_entropy(leaf, target, options, tp);
  (loss * on_device(token_weights()).narrow(0, 0, target.size(0)).to(loss.scalar_type())).sum().backward();
  return {loss.detach(), leaf.grad()};
}

/// Compares with the dense loss: the padded logits, cut to the vocabulary, on every rank.
void expect_equals_dense(const at::Tensor& padded_logits, const at::Tensor& target, const CrossEntropyOptions& options,
                         const parallel::GroupPtr& tp, double loss_tolerance, double gradient_tolerance) {
  const int64_t V = options.vocabulary_size;
  const auto expected = dense(padded_logits.narrow(-1, 0, V), target, options);
  const auto result = sharded(padded_logits, target, options, tp);
  EXPECT_TRUE(test_support::near(result.loss, expected.loss, loss_tolerance));
  EXPECT_EQ(result.gradient.scalar_type(), padded_logits.scalar_type());
  auto padded_gradient = at::zeros(padded_logits.sizes(), at::kDouble);
  padded_gradient.narrow(-1, 0, V).copy_(expected.gradient);
  const auto columns = part(padded_gradient, -1, tp);
  // Measured against the largest gradient of any rank, because a rank may have nothing but tiny ones.
  const double largest = expected.gradient.abs().max().item<double>();
  const auto difference = (result.gradient.cpu().to(at::kDouble) - columns).abs();
  EXPECT_LE(difference.numel() == 0 ? 0.0 : difference.max().item<double>(), gradient_tolerance * largest);
  const int64_t begin = std::min(V, columns.size(-1) * tp->getRank());
  const int64_t real = std::min(V - begin, columns.size(-1));
  EXPECT_TRUE(test_support::equal(
      result.gradient.narrow(-1, real, columns.size(-1) - real),
      at::zeros({columns.size(0), columns.size(1), columns.size(-1) - real}, padded_logits.options())))
      << "padding has a gradient";
}

/// Vocabularies for t ranks, with V'/t columns each: none padded, the last shard partly, some shards wholly.
struct Vocabulary {
  int64_t size;
  int64_t columns;
};

std::vector<Vocabulary> vocabularies(int t) {
  return {{5 * t, 5}, {5 * t - 2, 5}, {3, 3}, {std::min<int64_t>(3, 2 * t), 2}, {7, 7 + t}};
}

}  // namespace

TEST(VocabParallelCrossEntropy, EqualsTheDenseLossInFloat64) {
  for (const int t : test_support::divisors_of_world()) {
    for (const auto& [V, columns] : vocabularies(t)) {
      for (const double smoothing : {0.0, 0.1, 1.0}) {
        const CrossEntropyOptions options{.vocabulary_size = V, .label_smoothing = smoothing};
        SCOPED_TRACE(testing::Message() << "V " << V << ", " << columns << " columns on each of " << t
                                        << ", label smoothing " << smoothing);
        expect_equals_dense(with_padding(make_logits(V), columns * t), make_targets(V), options, groups(t).tp, 1e-14,
                            1e-14);
      }
    }
  }
}

TEST(VocabParallelCrossEntropy, EqualsTheDenseLossInFloat32) {
  for (const int t : test_support::divisors_of_world()) {
    for (const double smoothing : {0.0, 0.1}) {
      const int64_t V = 5 * t - 2;
      const auto logits = with_padding(make_logits(V), 5 * t).to(at::kFloat);
      expect_equals_dense(logits, make_targets(V), {.vocabulary_size = V, .label_smoothing = smoothing}, groups(t).tp,
                          1e-6, 1e-6);
    }
  }
}

// So many columns that the positions are worked off in several blocks, the last one shorter where t is 4.
TEST(VocabParallelCrossEntropy, EqualsTheDenseLossInBlocksOfPositions) {
  constexpr int64_t V = 40000;
  const auto logits = make_logits(V).to(at::kFloat);
  const auto targets = (at::arange(kS * kB, at::kLong) * 2711 + 2).remainder(V).view({kS, kB});
  for (const int t : test_support::divisors_of_world()) {
    for (const double smoothing : {0.0, 0.1}) {
      expect_equals_dense(logits, targets, {.vocabulary_size = V, .label_smoothing = smoothing}, groups(t).tp, 1e-6,
                          1e-6);
    }
  }
}

// Half types: the loss has float32's accuracy, and the gradient is that of float32, rounded once (to 2^-8 and 2^-11 of
// each element, so to as much of the largest).
TEST(VocabParallelCrossEntropy, ComputesHalfTypesInFloat32) {
  for (const int t : test_support::divisors_of_world()) {
    for (const double smoothing : {0.0, 0.1}) {
      const int64_t V = 5 * t - 2;
      const CrossEntropyOptions options{.vocabulary_size = V, .label_smoothing = smoothing};
      const auto target = make_targets(V);
      for (const auto& [dtype, rounding] : {std::pair{at::kBFloat16, 1.0 / 256}, std::pair{at::kHalf, 1.0 / 2048}}) {
        const auto logits = at::clamp_max(with_padding(make_logits(V), 5 * t), 6e4).to(dtype);
        expect_equals_dense(logits, target, options, groups(t).tp, 1e-6, rounding + 1e-6);
        const auto result = sharded(logits, target, options, groups(t).tp);
        const auto in_float = sharded(logits.to(at::kFloat), target, options, groups(t).tp);
        EXPECT_EQ(result.loss.scalar_type(), at::kFloat);
        EXPECT_TRUE(test_support::equal(result.loss, in_float.loss));
        EXPECT_TRUE(test_support::equal(result.gradient, in_float.gradient.to(dtype)));
      }
    }
  }
}

TEST(VocabParallelCrossEntropy, IgnoredTokensCostNothing) {
  for (const int t : test_support::divisors_of_world()) {
    const int64_t V = 5 * t - 2;
    const auto logits = with_padding(make_logits(V), 5 * t);
    for (const double smoothing : {0.0, 0.1}) {
      auto target = make_targets(V);
      target.view(-1).slice(0, 1, kS * kB, 3).fill_(-100);
      const CrossEntropyOptions options{.vocabulary_size = V, .label_smoothing = smoothing};
      expect_equals_dense(logits, target, options, groups(t).tp, 1e-14, 1e-14);
      const auto result = sharded(logits, target, options, groups(t).tp);
      const auto ignored = target.eq(-100);
      EXPECT_EQ(result.loss.cpu().masked_select(ignored).abs().max().item<double>(), 0.0);
      EXPECT_EQ(result.gradient.cpu().masked_select(ignored.unsqueeze(-1)).abs().max().item<double>(), 0.0);

      // Every token; and an ignored id that is a class of the vocabulary.
      const auto all_ignored = sharded(logits, at::full({kS, kB}, -100, at::kLong), options, groups(t).tp);
      EXPECT_TRUE(test_support::equal(all_ignored.loss, at::zeros({kS, kB}, at::kDouble)));
      EXPECT_TRUE(test_support::equal(all_ignored.gradient, at::zeros({kS, kB, 5}, at::kDouble)));
      auto inside = options;
      inside.ignore_index = 2;
      expect_equals_dense(logits, make_targets(V), inside, groups(t).tp, 1e-14, 1e-14);
    }
  }
}

TEST(VocabParallelCrossEntropy, LargeLogitsStayFinite) {
  for (const int t : test_support::divisors_of_world()) {
    const int64_t V = 5 * t - 2;
    auto logits = make_logits(V);
    logits.slice(-1, 0, V, 2).add_(1e4);
    logits.slice(-1, 1, V, 2).sub_(1e4);
    logits[0].neg_();  // a token whose target is the least likely by far
    for (const double smoothing : {0.0, 0.1}) {
      const CrossEntropyOptions options{.vocabulary_size = V, .label_smoothing = smoothing};
      expect_equals_dense(with_padding(logits, 5 * t), make_targets(V), options, groups(t).tp, 1e-14, 1e-12);
      const auto in_float = with_padding(logits, 5 * t).to(at::kFloat);
      expect_equals_dense(in_float, make_targets(V), options, groups(t).tp, 1e-6, 1e-6);
      EXPECT_TRUE(at::isfinite(sharded(in_float, make_targets(V), options, groups(t).tp).gradient).all().item<bool>());
    }
  }
}

TEST(VocabParallelCrossEntropy, ReducesTwiceAndNothingBackward) {
  for (const int t : test_support::divisors_of_world()) {
    for (const double smoothing : {0.0, 0.1}) {
      const auto recorded = parallel::record(groups(t).tp);
      const auto logits = on_device(make_logits(4).to(at::kFloat)).requires_grad_();
      const auto loss = vocab_parallel_cross_entropy(
          logits, make_targets(4 * t), {.vocabulary_size = 4 * t, .label_smoothing = smoothing}, recorded.group);
      const int64_t all_reduces = t == 1 ? 0 : 2;
      const int64_t per_token = smoothing > 0 ? 4 : 3;  // a maximum, and two or three sums
      EXPECT_EQ(recorded.count->of(CollectiveKind::kAllReduce), all_reduces);
      EXPECT_EQ(recorded.count->total(), all_reduces);
      // The count rounds each one's (t-1)/t of its bytes down.
      const auto share = [&](int64_t floats) { return 2 * (floats * 4 * (t - 1) / t); };
      EXPECT_EQ(recorded.count->bytes_sent, share(kS * kB) + share((per_token - 1) * kS * kB));
      const auto after_forward = *recorded.count;
      loss.sum().backward();
      EXPECT_EQ(*recorded.count, after_forward);
    }
  }
}

TEST(VocabParallelCrossEntropy, BackwardTwiceGivesTheSameGradient) {
  for (const int t : test_support::divisors_of_world()) {
    const auto logits = on_device(make_logits(4)).requires_grad_();
    const auto loss =
        vocab_parallel_cross_entropy(logits, make_targets(4 * t), {.vocabulary_size = 4 * t}, groups(t).tp).sum();
    const auto first = torch::autograd::grad({loss}, {logits}, {}, /*retain_graph=*/true)[0];
    const auto second = torch::autograd::grad({loss}, {logits}, {}, /*retain_graph=*/true)[0];
    EXPECT_TRUE(test_support::equal(first, second));
    EXPECT_THROW(torch::autograd::grad({loss}, {logits}, {}, /*retain_graph=*/true, /*create_graph=*/true),
                 c10::NotImplementedError);
  }
}

TEST(VocabParallelCrossEntropy, TakesStridedLogitsAndNoTokens) {
  for (const int t : test_support::divisors_of_world()) {
    const int64_t V = 4 * t;
    const auto whole = make_logits(V);
    const auto own = part(whole, -1, groups(t).tp);  // a strided view
    const CrossEntropyOptions options{.vocabulary_size = V, .label_smoothing = 0.1};
    const auto transposed_target = make_targets(V).t().contiguous().t();
    const auto loss = vocab_parallel_cross_entropy(on_device(own), transposed_target, options, groups(t).tp);
    EXPECT_TRUE(test_support::near(loss, dense(whole, make_targets(V), options).loss, 1e-14));

    const auto none = on_device(at::zeros({0, kB, 4})).requires_grad_();
    const auto no_loss = vocab_parallel_cross_entropy(none, at::zeros({0, kB}, at::kLong), options, groups(t).tp);
    EXPECT_EQ(no_loss.sizes(), (std::vector<int64_t>{0, kB}));
    no_loss.sum().backward();
    EXPECT_EQ(none.grad().sizes(), none.sizes());
  }
}

TEST(VocabParallelCrossEntropy, RefusesTargetsOutsideTheVocabularyOnEveryRank) {
  for (const int t : test_support::divisors_of_world()) {
    const int64_t V = 5 * t - 2;
    const auto recorded = parallel::record(groups(t).tp);
    const auto logits = on_device(make_logits(5));
    for (const int64_t wrong : {V, V + 1, int64_t{-1}}) {  // V and V + 1 are columns of the padding
      auto target = make_targets(V);
      target[3][1] = wrong;
      EXPECT_EQ(
          value_error([&] { vocab_parallel_cross_entropy(logits, target, {.vocabulary_size = V}, recorded.group); }),
          "target " + std::to_string(wrong) + " at position 3, batch row 1 is outside the vocabulary [0, " +
              std::to_string(V) + ") and not the ignored -100");
    }
    EXPECT_EQ(recorded.count->total(), 0);
  }
}

TEST(VocabParallelCrossEntropy, RefusesShapesAndOptionsThatDoNotFit) {
  for (const int t : test_support::divisors_of_world()) {
    const auto recorded = parallel::record(groups(t).tp);
    const auto logits = on_device(make_logits(5));
    const auto target = make_targets(5 * t);
    const auto message = [&](const at::Tensor& some_logits, const at::Tensor& some_target,
                             const CrossEntropyOptions& options) {
      return value_error([&] { vocab_parallel_cross_entropy(some_logits, some_target, options, recorded.group); });
    };
    const CrossEntropyOptions options{.vocabulary_size = 5 * t};
    EXPECT_TRUE(contains(message(logits[0], target, options), "[S, B, V'/t], got [3, 5]"));
    EXPECT_TRUE(contains(message(logits.to(at::kLong), target, options), "must be floating point"));
    EXPECT_TRUE(contains(message(logits, target.t(), options), "target must be int64 [5, 3]"));
    EXPECT_TRUE(contains(message(logits, target.to(at::kInt), options), "got [5, 3] Int"));
    EXPECT_TRUE(contains(message(logits, target, {.vocabulary_size = 5 * t + 1}),
                         "5 columns of logits each do not hold a vocabulary of " + std::to_string(5 * t + 1)));
    EXPECT_TRUE(contains(message(logits, target, {.vocabulary_size = 0}), "vocabulary of 0"));
    EXPECT_TRUE(contains(message(logits, target, {.vocabulary_size = 5 * t, .label_smoothing = 1.5}), "1.5"));
    EXPECT_TRUE(contains(message(logits, target, {.vocabulary_size = 5 * t, .label_smoothing = -0.1}), "-0.1"));
    EXPECT_EQ(recorded.count->total(), 0);
  }
}

}  // namespace megatron_cpp
