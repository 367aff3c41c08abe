// The decoder's parts against formulas written out here: RMSNorm, the rotary embedding, SwiGLU and attention.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <numbers>
#include <optional>
#include <string>
#include <vector>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "megatron_cpp/transformer/attention.h"
#include "megatron_cpp/transformer/attention_batch.h"
#include "megatron_cpp/transformer/flash_attention.h"
#include "megatron_cpp/transformer/mlp.h"
#include "megatron_cpp/transformer/rms_norm.h"
#include "megatron_cpp/transformer/rotary_embedding.h"
#include "parallel/shard.h"
#include "tests/megatron_cpp/transformer_fixture.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::megatron_cpp {
namespace {

using parallel::Range;
using test_support::on_device;
using namespace transformer_fixture;

std::vector<at::Tensor> gradients(const at::Tensor& output, const std::vector<at::Tensor>& inputs,
                                  const at::Tensor& output_gradient) {
  return torch::autograd::grad({output}, inputs, {output_gradient});
}

TEST_F(TransformerTest, RMSNormIsItsFormula) {
  RMSNorm norm(24, 1e-5, GradientDomain::kReplicated);
  start(norm);
  const auto input = leaf(normal_values({5, 3, 24}, 1) * 3.0);
  const auto output_gradient = normal_values({5, 3, 24}, 2);
  const auto output = norm->forward(input);
  const auto actual = gradients(output, {input, norm->weight}, output_gradient);

  const auto x = leaf(input.to(at::kDouble));
  const auto w = leaf(norm->weight.to(at::kDouble));
  const auto expected = x / (x.square().mean(-1, true) + 1e-5).sqrt() * (w + 1.0);
  const auto wanted = gradients(expected, {x, w}, output_gradient.to(at::kDouble));
  compare(output, expected, "output", 1e-6);
  compare(actual[0], wanted[0], "input gradient", 1e-6);
  compare(actual[1], wanted[1], "weight gradient", 1e-6);
}

TEST_F(TransformerTest, RMSNormRoundsOnceInBFloat16) {
  RMSNorm norm(24, 1e-5, GradientDomain::kReplicated);
  start(norm);
  norm->to(at::kBFloat16);
  const auto input = normal_values({5, 24}, 1).to(at::kBFloat16);
  const auto x = input.to(at::kFloat);
  const auto expected = x * (x.square().mean(-1, true) + 1e-5).rsqrt() * (norm->weight.to(at::kFloat) + 1.0);
  compare(norm->forward(input), expected.to(at::kBFloat16), "output", 0.0);
}

TEST_F(TransformerTest, RMSNormStartsAtOneAndSaysHowItsGradientIsCompleted) {
  RMSNorm norm(4, 0.0, GradientDomain::kReplicatedPartial);
  const auto shards = parameter_shards(*norm);
  initialize_parameters(shards, 1);
  compare(norm->forward(at::full({1, 4}, 2.0)), at::ones({1, 4}), "output", 1e-6);
  EXPECT_EQ(shards.at(0).domain, GradientDomain::kReplicatedPartial);
  EXPECT_FALSE(shards.at(0).weight_decay);
  EXPECT_THROW(norm->forward(at::zeros({1, 5})), c10::ValueError);
  EXPECT_THROW(RMSNorm(4, 0.0, GradientDomain::kSharded), c10::ValueError);
  const auto input = leaf(at::ones({1, 4}));
  EXPECT_THROW(torch::autograd::grad({norm->forward(input)}, {input}, {at::ones({1, 4})}, true, true),
               c10::NotImplementedError);
}

/// Step3.7's frequency of pair i, with the branches of the published description.
double frequency(int64_t i, int64_t rotary_dim, double theta, const std::optional<Llama3RopeScaling>& scaling) {
  const double plain = std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(rotary_dim));
  if (!scaling) return plain;
  const double wavelength = 2.0 * std::numbers::pi / plain;
  const auto length = static_cast<double>(scaling->original_max_position_embeddings);
  if (wavelength > length / scaling->low_freq_factor) return plain / scaling->factor;
  if (wavelength < length / scaling->high_freq_factor) return plain;
  const double smooth =
      (length / wavelength - scaling->low_freq_factor) / (scaling->high_freq_factor - scaling->low_freq_factor);
  return (1.0 - smooth) * plain / scaling->factor + smooth * plain;
}

/// Pairs as complex numbers, turned by the angles.
at::Tensor naive_rotary(const at::Tensor& x, const at::Tensor& positions, const std::vector<double>& frequencies) {
  const auto half = static_cast<int64_t>(frequencies.size());
  const auto angles = (positions.t().to(x.device(), at::kDouble).unsqueeze(-1).unsqueeze(-1) *
                       at::tensor(frequencies, at::TensorOptions(at::kDouble)).to(x.device()));
  const auto turned =
      at::complex(x.narrow(-1, 0, half), x.narrow(-1, half, half)) * at::polar(at::ones_like(angles), angles);
  return at::cat({at::real(turned), at::imag(turned), x.narrow(-1, 2 * half, x.size(-1) - 2 * half)}, -1);
}

TEST_F(TransformerTest, RotaryTurnsPairsHalfAHeadApart) {
  const auto positions = at::stack({integers({0, 1, 2, 3, 0, 1}), integers({5, 100, 7, 2000, 9, 1})});
  const Llama3RopeScaling llama3{8.0, 1.0, 4.0, 64};
  const std::vector<std::optional<Llama3RopeScaling>> scalings{std::nullopt, llama3};
  for (const int64_t rotary_dim : {16, 8}) {
    for (const auto& scaling : scalings) {
      for (const auto& ids : {positions, positions.narrow(0, 1, 1)}) {
        const auto x = leaf(normal_values({6, 2, 3, 16}, 1));
        const auto output_gradient = normal_values({6, 2, 3, 16}, 2);
        const RotaryEmbedding rotary(rotary_dim, 10000.0, scaling);
        const auto output = apply_rotary(x, rotary.tables(ids, x.device()));
        std::vector<double> frequencies;
        for (int64_t i = 0; i < rotary_dim / 2; ++i) frequencies.push_back(frequency(i, rotary_dim, 10000.0, scaling));
        const auto reference = leaf(x.to(at::kDouble));
        const auto expected = naive_rotary(reference, ids, frequencies);
        // float32 angles of up to 2000 are good to 2000 * 2^-24.
        compare(output, expected, "output", 3e-4);
        compare(gradients(output, {x}, output_gradient)[0],
                gradients(expected, {reference}, output_gradient.to(at::kDouble))[0], "gradient", 3e-4);
      }
    }
  }
  EXPECT_THROW(RotaryEmbedding(7, 10000.0), c10::ValueError);
}

TEST_F(TransformerTest, SwiGLUClampsAfterTheActivation) {
  for (const double limit : {0.0, 0.4}) {
    const auto input = leaf(normal_values({6, 2, 10}, 1) * 2.0);
    const auto output_gradient = normal_values({6, 2, 5}, 2);
    const auto output = clamped_swiglu(input, limit);
    const auto x = leaf(input.to(at::kDouble));
    auto gate = at::silu(x.narrow(-1, 0, 5));
    auto up = x.narrow(-1, 5, 5);
    if (limit > 0.0) {
      gate = gate.clamp_max(limit);
      up = up.clamp(-limit, limit);
    }
    const auto expected = gate * up;
    compare(output, expected, "output", 1e-6);
    compare(gradients(output, {input}, output_gradient)[0],
            gradients(expected, {x}, output_gradient.to(at::kDouble))[0], "gradient", 1e-6);
  }
}

// ---- attention against the written-out softmax ----

/// The whole S x S mask and softmax, in float64.
at::Tensor naive_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const std::vector<Range>& segments, int64_t window) {
  const int64_t S = q.size(0);
  auto number = at::zeros({S}, at::kLong);
  for (size_t i = 0; i < segments.size(); ++i) {
    number.narrow(0, segments[i].begin, segments[i].length()).fill_(static_cast<int64_t>(i));
  }
  const auto position = at::arange(S, at::kLong);
  const auto distance = position.unsqueeze(1) - position.unsqueeze(0);
  auto allowed = distance.ge(0).logical_and(number.unsqueeze(1).eq(number.unsqueeze(0)));
  if (window > 0) allowed = allowed.logical_and(distance.lt(window));
  const int64_t share = q.size(2) / k.size(2);
  const auto scores =
      at::einsum("sbhd,tbhd->bhst", {q, k.repeat_interleave(share, 2)}) / std::sqrt(static_cast<double>(q.size(3)));
  const auto weights = scores.masked_fill(on_device(allowed.logical_not()), -INFINITY).softmax(-1);
  return at::einsum("bhst,tbhd->sbhd", {weights, v.repeat_interleave(share, 2)});
}

TEST_F(TransformerTest, CoreAttentionIsTheMaskedSoftmax) {
  constexpr int64_t kLength = 300;  // several blocks of queries
  const std::vector<Range> one{{0, kLength}};
  const std::vector<Range> several{{0, 1}, {1, 140}, {140, 143}, {143, kLength}};
  for (const int64_t batch : {1, 2}) {
    for (const auto& segments : {one, several}) {
      for (const int64_t window : {0, 1, 5, 129, 150, 299, 300, 1000}) {
        const auto q = leaf(normal_values({kLength, batch, 6, 4}, 1));
        const auto k = leaf(normal_values({kLength, batch, 2, 4}, 2));
        const auto v = leaf(normal_values({kLength, batch, 2, 4}, 3));
        const auto output_gradient = normal_values({kLength, batch, 6, 4}, 4);
        const auto output = core_attention(q, k, v, SubSequences(segments, batch, q.device()), window);
        const auto actual = gradients(output, {q, k, v}, output_gradient);
        const std::vector<at::Tensor> wide{leaf(q.to(at::kDouble)), leaf(k.to(at::kDouble)), leaf(v.to(at::kDouble))};
        const auto expected = naive_attention(wide[0], wide[1], wide[2], segments, window);
        // Of the whole gradient, since a window of one position gives q and k none.
        const auto wanted = gradients(expected, wide, output_gradient.to(at::kDouble));
        const std::string what = " with window " + std::to_string(window);
        compare(output, expected, "output" + what);
        for (size_t i = 0; i < 3; ++i) {
          compare(at::cat({actual[i], actual[2]}, 2), at::cat({wanted[i], wanted[2]}, 2), "gradient" + what);
        }
      }
    }
  }
}

TEST_F(TransformerTest, TheWindowCountsTheTokenItself) {
  const auto q = normal_values({9, 1, 2, 4}, 1);
  const auto k = normal_values({9, 1, 2, 4}, 2);
  const auto v = normal_values({9, 1, 2, 4}, 3);
  const SubSequences nine({{0, 9}}, 1, q.device());
  const SubSequences three({{0, 3}}, 1, q.device());
  compare(core_attention(q, k, v, nine, 1), v, "a window of one position is the token's own value");
  // A window of 3 and the last three positions alone: the same for the last position.
  const auto last = [](const at::Tensor& x) { return x.narrow(0, 6, 3); };
  compare(core_attention(q, k, v, nine, 3).select(0, 8),
          core_attention(last(q), last(k), last(v), three, 0).select(0, 2), "the last of 3");
}

// ---- what flash attention's kernel takes ----

TEST(FlashAttention, IsForHalfTypesOnAGpuAndHeadsThatItsKernelKnows) {
  using internal::flash_attention_takes;
  for (const auto dtype : {at::kHalf, at::kBFloat16}) {
    for (const int64_t head_dim : {8, 64, 72, 128, 256}) {
      EXPECT_TRUE(flash_attention_takes(at::kCUDA, dtype, head_dim)) << head_dim;
      EXPECT_FALSE(flash_attention_takes(at::kCPU, dtype, head_dim)) << head_dim;
    }
    for (const int64_t head_dim : {4, 20, 100, 255, 264, 512}) {
      EXPECT_FALSE(flash_attention_takes(at::kCUDA, dtype, head_dim)) << head_dim;
    }
  }
  EXPECT_FALSE(flash_attention_takes(at::kCUDA, at::kFloat, 64));
  EXPECT_FALSE(flash_attention_takes(at::kCUDA, at::kDouble, 64));
}

TEST(FlashAttention, LoadsSixteenBytesAtATime) {
  using internal::has_flash_alignment;
  const auto values_of = [](int64_t heads, int64_t groups, int64_t head_dim, at::ScalarType dtype) {
    // As SelfAttention has them, between the keys and the gates of [S, q | k | v | g].
    const int64_t q = heads * head_dim;
    const int64_t kv = groups * head_dim;
    const auto fused = at::zeros({5, q + 2 * kv + heads}, dtype);
    return fused.narrow(1, q + kv, kv).view({5, groups, head_dim});
  };
  EXPECT_TRUE(has_flash_alignment(at::zeros({5, 3, 8}, at::kBFloat16)));
  EXPECT_TRUE(has_flash_alignment(values_of(8, 4, 8, at::kBFloat16)));
  EXPECT_FALSE(has_flash_alignment(values_of(12, 4, 8, at::kBFloat16)));  // rows of 172 elements
  EXPECT_TRUE(has_flash_alignment(values_of(12, 4, 8, at::kFloat)));      // of 4 bytes each
  EXPECT_FALSE(has_flash_alignment(values_of(1, 1, 128, at::kHalf)));
  EXPECT_FALSE(has_flash_alignment(at::zeros({5, 3, 9}, at::kHalf).narrow(2, 0, 8)));  // heads at odd places
  EXPECT_FALSE(has_flash_alignment(at::zeros({5, 8, 8}, at::kHalf).transpose(1, 2)));
  // Rows and heads in step, but the first one not.
  EXPECT_FALSE(has_flash_alignment(at::zeros({4 + 5 * 3 * 8}, at::kHalf).narrow(0, 4, 120).view({5, 3, 8})));
}

}  // namespace
}  // namespace megatron_cpp::megatron_cpp
