// The decoder: its parts against formulas written out here, every tensor-parallel size against one rank alone, and the
// first layers of the golden model.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <numbers>
#include <string>
#include <utility>
#include <vector>

#include "megatron_cpp/checkpoint/safetensors.h"
#include "megatron_cpp/tensor_parallel/parameter_shard.h"
#include "megatron_cpp/tensor_parallel/vocab_parallel_embedding.h"
#include "megatron_cpp/transformer/attention.h"
#include "megatron_cpp/transformer/gpt_model.h"
#include "megatron_cpp/transformer/mlp.h"
#include "megatron_cpp/transformer/rms_norm.h"
#include "megatron_cpp/transformer/rotary_embedding.h"
#include "megatron_cpp/transformer/transformer_block.h"
#include "megatron_cpp/transformer/transformer_config.h"
#include "megatron_cpp/transformer/transformer_layer.h"
#include "parallel/collectives.h"
#include "parallel/recording_backend.h"
#include "parallel/shard.h"
#include "tests/support/test_world.h"

namespace megatron {
namespace {

using parallel::CollectiveKind;
using parallel::GroupPtr;
using parallel::Range;
using test_support::on_device;

constexpr double kTolerance = 2e-5;        // of the largest element; float32 sums in another order
constexpr double kGoldenTolerance = 1e-4;  // of the largest element

/// Remembers the largest relative difference of each test, for the test's XML.
class TransformerTest : public testing::Test {
 protected:
  void compare(const at::Tensor& actual, const at::Tensor& expected, const std::string& what,
               double tolerance = kTolerance) {
    EXPECT_TRUE(test_support::near(actual, expected, tolerance)) << what;
    if (!actual.defined() || !expected.defined() || actual.sizes() != expected.sizes() || actual.numel() == 0) return;
    const auto want = expected.detach().to(at::kDouble);
    const auto difference = (actual.detach().to(at::kDouble) - want).abs().max().item<double>();
    largest_ = std::max(largest_, difference / std::max(1e-30, want.abs().max().item<double>()));
  }
  void TearDown() override { RecordProperty("largest_relative_difference", std::to_string(largest_ * 1e6) + "e-6"); }

 private:
  double largest_ = 0.0;
};

at::Tensor normal_values(at::IntArrayRef shape, uint64_t seed, at::ScalarType dtype = at::kFloat) {
  return on_device(at::randn(shape, at::detail::createCPUGenerator(seed), at::TensorOptions(dtype)));
}

at::Tensor integers(const std::vector<int64_t>& values) { return at::tensor(values, at::kLong); }

at::Tensor prefix_sums(const std::vector<int64_t>& ends) { return at::tensor(ends, at::kInt); }

at::Tensor leaf(const at::Tensor& tensor) { return tensor.detach().clone().requires_grad_(); }

std::vector<at::Tensor> gradients(const at::Tensor& output, const std::vector<at::Tensor>& inputs,
                                  const at::Tensor& output_gradient) {
  return torch::autograd::grad({output}, inputs, {output_gradient});
}

/// This rank's rows of the sequence, or all of it.
at::Tensor own_rows(const at::Tensor& whole, bool sequence_parallel, const GroupPtr& tp) {
  if (!sequence_parallel) return whole;
  const auto rows = parallel::even_shard(whole.size(0), tp->getSize(), tp->getRank(), "sequence length");
  return whole.narrow(0, rows.begin, rows.length());
}

/// Layers that differ in heads, window, rotary and clamp; all sizes divisible by 1, 2 and 4, the vocabulary by none.
TransformerConfig small_config() {
  AttentionLayerConfig full;
  full.num_attention_heads = 8;
  full.rope_theta = 5e6;
  full.partial_rotary_factor = 0.5;
  full.rope_scaling = Llama3RopeScaling{2.0, 1.0, 4.0, 32};
  full.swiglu_limit = 0.3;
  AttentionLayerConfig sliding;
  sliding.num_attention_heads = 12;
  sliding.sliding_window = 5;
  TransformerConfig config;
  config.vocabulary_size = 37;
  config.hidden_size = 24;
  config.head_dim = 8;
  config.num_query_groups = 4;
  config.ffn_hidden_size = 20;
  config.init_std = 0.3;
  config.layers = {full, sliding, full};
  config.layers.back().swiglu_limit = 0.0;
  return config;
}

constexpr int64_t kSequence = 16;
constexpr int64_t kBatch = 2;
constexpr int64_t kHidden = 24;

AttentionInput unpacked() { return {at::arange(kSequence, at::kLong).unsqueeze(0), {}}; }

/// Three sub-sequences of 5, 1 and 10 positions.
AttentionInput packed() {
  return {at::cat({at::arange(5, at::kLong), at::arange(1, at::kLong), at::arange(10, at::kLong)}).unsqueeze(0),
          prefix_sums({0, 5, 6, 16})};
}

/// Moves a module to the test's device and starts its parameters, norms too, from values other than zero.
template <class Module>
std::vector<ParameterShard> start(Module& module) {
  module->to(test_support::runtime().device());
  auto shards = parameter_shards(*module);
  for (auto& shard : shards) {
    if (shard.initial_value.kind == InitialValue::Kind::kConstant) shard.initial_value = InitialValue::normal(0.2);
  }
  initialize_parameters(shards, 7);
  return shards;
}

/// Gradients of the global parameters, from one rank that holds them whole.
std::map<std::string, at::Tensor> global_gradients(const std::vector<ParameterShard>& whole) {
  std::map<std::string, at::Tensor> result;
  for (const auto& shard : whole) {
    for (const auto& segment : shard.segments) {
      result[segment.name] = shard.parameter.grad().narrow(segment.dim, segment.local_begin, segment.length);
    }
  }
  return result;
}

using Compare = std::function<void(const at::Tensor&, const at::Tensor&, const std::string&)>;

/// Completes each gradient by its rule and compares it with its slice of the global one.
void compare_gradients(const std::vector<ParameterShard>& shards, const std::map<std::string, at::Tensor>& expected,
                       const GroupPtr& tp, const Compare& compare) {
  for (const auto& shard : shards) {
    auto gradient = shard.parameter.grad();
    if (shard.rule == GradientRule::kReplicatedPartial) gradient = parallel::all_reduce(gradient, tp);
    for (const auto& segment : shard.segments) {
      compare(gradient.narrow(segment.dim, segment.local_begin, segment.length),
              expected.at(segment.name).narrow(segment.dim, segment.global_begin, segment.length),
              "gradient of " + segment.name);
    }
  }
}

template <class Module>
using Make = std::function<Module(const TransformerConfig&, const GroupPtr&)>;
template <class Module>
using Forward = std::function<at::Tensor(Module&, const at::Tensor&)>;

/// [S, B, H] -> [S, B, H]: output, input gradient and parameter gradients of every tensor-parallel size, with and
/// without sequence parallelism, against one rank.
template <class Module>
void expect_like_single(const Make<Module>& make, const Forward<Module>& forward, int64_t batch,
                        const Compare& compare) {
  const auto whole_input = normal_values({kSequence, batch, kHidden}, 1);
  const auto whole_gradient = normal_values({kSequence, batch, kHidden}, 2);
  auto reference = make(small_config(), test_support::single());
  const auto reference_shards = start(reference);
  const auto reference_input = leaf(whole_input);
  const auto expected = forward(reference, reference_input);
  expected.backward(whole_gradient);

  for (const int t : test_support::divisors_of_world()) {
    for (const bool sequence_parallel : {false, true}) {
      const auto& tp = test_support::groups(t).tp;
      const std::string where = " at t = " + std::to_string(t) + (sequence_parallel ? ", sequence-parallel" : "");
      const Compare compare_here = [&](const at::Tensor& actual, const at::Tensor& want, const std::string& what) {
        compare(actual, want, what + where);
      };
      auto config = small_config();
      config.sequence_parallel = sequence_parallel;
      auto module = make(config, tp);
      const auto shards = start(module);
      const auto input = leaf(own_rows(whole_input, sequence_parallel, tp));
      const auto output = forward(module, input);
      output.backward(own_rows(whole_gradient, sequence_parallel, tp));
      compare_here(output, own_rows(expected, sequence_parallel, tp), "output");
      compare_here(input.grad(), own_rows(reference_input.grad(), sequence_parallel, tp), "input gradient");
      compare_gradients(shards, global_gradients(reference_shards), tp, compare_here);
    }
  }
}

// ---- parts against formulas ----

TEST_F(TransformerTest, RMSNormIsItsFormula) {
  RMSNorm norm(24, 1e-5, GradientRule::kReplicated);
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
  RMSNorm norm(24, 1e-5, GradientRule::kReplicated);
  start(norm);
  norm->to(at::kBFloat16);
  const auto input = normal_values({5, 24}, 1).to(at::kBFloat16);
  const auto x = input.to(at::kFloat);
  const auto expected = x * (x.square().mean(-1, true) + 1e-5).rsqrt() * (norm->weight.to(at::kFloat) + 1.0);
  compare(norm->forward(input), expected.to(at::kBFloat16), "output", 0.0);
}

TEST_F(TransformerTest, RMSNormStartsAtOneAndSaysHowItsGradientIsCompleted) {
  RMSNorm norm(4, 0.0, GradientRule::kReplicatedPartial);
  const auto shards = parameter_shards(*norm);
  initialize_parameters(shards, 1);
  compare(norm->forward(at::full({1, 4}, 2.0)), at::ones({1, 4}), "output", 1e-6);
  EXPECT_EQ(shards.at(0).rule, GradientRule::kReplicatedPartial);
  EXPECT_FALSE(shards.at(0).weight_decay);
  EXPECT_THROW(norm->forward(at::zeros({1, 5})), c10::ValueError);
  EXPECT_THROW(RMSNorm(4, 0.0, GradientRule::kSharded), c10::ValueError);
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
        const auto output = core_attention(q, k, v, segments, window);
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
  compare(core_attention(q, k, v, {{0, 9}}, 1), v, "a window of one position is the token's own value");
  // A window of 3 and the last three positions alone: the same for the last position.
  const auto last = [](const at::Tensor& x) { return x.narrow(0, 6, 3); };
  compare(core_attention(q, k, v, {{0, 9}}, 3).select(0, 8),
          core_attention(last(q), last(k), last(v), {{0, 3}}, 0).select(0, 2), "the last of 3");
}

TEST_F(TransformerTest, PackedSequencesDoNotSeeEachOther) {
  GPTModel model(small_config(), test_support::world_tp());
  start(model);
  const auto ids = at::arange(kSequence, at::kLong).mul(5).remainder(37).unsqueeze(0);
  const auto whole = model->forward(ids, packed());
  for (const auto& range : {Range{0, 5}, Range{5, 6}, Range{6, 16}}) {
    const auto alone = model->forward(ids.narrow(1, range.begin, range.length()),
                                      {at::arange(range.length(), at::kLong).unsqueeze(0), {}});
    compare(whole.narrow(0, range.begin, range.length()), alone, "sub-sequence");
  }
}

// ---- every tensor-parallel size against one rank ----

TEST_F(TransformerTest, SelfAttentionIsTheSameAtEverySize) {
  for (const size_t layer : {0U, 1U}) {
    for (const auto& input : {unpacked(), packed()}) {
      expect_like_single<SelfAttention>(
          [&](const TransformerConfig& config, const GroupPtr& tp) {
            return SelfAttention(config, config.layers[layer], tp);
          },
          [&](SelfAttention& module, const at::Tensor& x) { return module->forward(x, input); },
          input.cu_seqlens.defined() ? 1 : kBatch,
          [&](const at::Tensor& a, const at::Tensor& b, const std::string& what) { compare(a, b, what); });
    }
  }
}

TEST_F(TransformerTest, MLPIsTheSameAtEverySize) {
  for (const double limit : {0.0, 0.3}) {
    expect_like_single<MLP>(
        [&](const TransformerConfig& config, const GroupPtr& tp) { return MLP(config, limit, tp); },
        [](MLP& module, const at::Tensor& x) { return module->forward(x); }, kBatch,
        [&](const at::Tensor& a, const at::Tensor& b, const std::string& what) { compare(a, b, what); });
  }
}

TEST_F(TransformerTest, LayersAreTheSameAtEverySize) {
  for (const int64_t number : {0, 1}) {
    expect_like_single<TransformerLayer>(
        [&](const TransformerConfig& config, const GroupPtr& tp) { return TransformerLayer(config, number, tp); },
        [](TransformerLayer& module, const at::Tensor& x) { return module->forward(x, unpacked()); }, kBatch,
        [&](const at::Tensor& a, const at::Tensor& b, const std::string& what) { compare(a, b, what); });
  }
}

TEST_F(TransformerTest, TheBlockIsTheSameAtEverySize) {
  for (const auto& input : {unpacked(), packed()}) {
    expect_like_single<TransformerBlock>(
        [](const TransformerConfig& config, const GroupPtr& tp) { return TransformerBlock(config, tp); },
        [&](TransformerBlock& module, const at::Tensor& x) { return module->forward(x, input); },
        input.cu_seqlens.defined() ? 1 : kBatch,
        [&](const at::Tensor& a, const at::Tensor& b, const std::string& what) { compare(a, b, what); });
  }
}

/// The columns [r V'/t, (r+1) V'/t) of a tensor with V columns, zeros beyond V.
at::Tensor own_columns(const at::Tensor& whole, int64_t columns, const GroupPtr& tp) {
  const auto padded = at::constant_pad_nd(whole, {0, columns * tp->getSize() - whole.size(-1)});
  return padded.narrow(-1, columns * tp->getRank(), columns);
}

TEST_F(TransformerTest, TheModelIsTheSameAtEverySize) {
  const auto ids = at::arange(kBatch * kSequence, at::kLong).mul(11).remainder(37).view({kBatch, kSequence});
  const auto whole_gradient = normal_values({kSequence, kBatch, 37}, 3);
  GPTModel reference(small_config(), test_support::single());
  const auto reference_shards = start(reference);
  const auto expected = reference->forward(ids, unpacked());
  expected.backward(whole_gradient);

  for (const int t : test_support::divisors_of_world()) {
    for (const bool sequence_parallel : {false, true}) {
      for (const bool accumulate : {false, true}) {
        const auto& tp = test_support::groups(t).tp;
        auto config = small_config();
        config.sequence_parallel = sequence_parallel;
        config.accumulate_into_grad = accumulate;
        GPTModel model(config, tp);
        const auto shards = start(model);
        const int passes = accumulate ? 2 : 1;
        for (int pass = 0; pass < passes; ++pass) {
          const auto logits = model->forward(ids, unpacked());
          const auto gradient = own_columns(whole_gradient, logits.size(-1), tp) / passes;
          logits.backward(gradient);
          EXPECT_EQ(logits.size(-1), padded_vocabulary_size(37, t) / t);
          compare(logits, own_columns(expected, logits.size(-1), tp), "logits at t = " + std::to_string(t));
        }
        compare_gradients(shards, global_gradients(reference_shards), tp,
                          [&](const at::Tensor& a, const at::Tensor& b, const std::string& what) {
                            compare(a, b, what + " at t = " + std::to_string(t));
                          });
      }
    }
  }
}

TEST_F(TransformerTest, TheModelTakesEmbeddingsComputedElsewhere) {
  const auto ids = at::arange(kSequence, at::kLong).mul(11).remainder(37).unsqueeze(0);
  const auto& tp = test_support::world_tp();
  for (const bool sequence_parallel : {false, true}) {
    auto config = small_config();
    config.sequence_parallel = sequence_parallel;
    GPTModel model(config, tp);
    start(model);
    const auto expected = model->forward(ids, packed());
    const auto embeddings = model->embedding->forward(ids).detach();
    EXPECT_EQ(embeddings.size(0), sequence_parallel ? kSequence / tp->getSize() : kSequence);
    EXPECT_TRUE(test_support::equal(model->forward({}, packed(), embeddings), expected));
  }
}

TEST_F(TransformerTest, PaddedOutputRowsAreInNoCheckpoint) {
  GPTModel model(small_config(), test_support::world_tp());
  int64_t rows = 0;
  for (const auto& shard : start(model)) {
    if (shard.name != "output_layer.weight") continue;
    const auto& segment = shard.segments.at(0);
    EXPECT_EQ(segment.global_shape, (std::vector<int64_t>{37, kHidden}));
    const auto padding = shard.parameter.narrow(0, segment.length, shard.parameter.size(0) - segment.length);
    EXPECT_EQ(padding.count_nonzero().item<int64_t>(), 0);
    rows = segment.length;
  }
  const auto total = parallel::all_reduce(on_device(at::full({1}, rows, at::kLong)), test_support::world_tp());
  EXPECT_EQ(total.item<int64_t>(), 37);
  EXPECT_THROW(
      ColumnParallelLinear(ColumnParallelLinearOptions(4, std::vector<OutputPart>{{"a", 3}}).pad_out_features(true),
                           test_support::single()),
      c10::ValueError);
}

TEST_F(TransformerTest, BFloat16StaysNearFloat32) {
  for (const bool sequence_parallel : {false, true}) {
    auto config = small_config();
    config.sequence_parallel = sequence_parallel;
    const auto& tp = test_support::world_tp();
    TransformerBlock block(config, tp);
    start(block);
    const auto input = own_rows(normal_values({kSequence, 1, kHidden}, 1), sequence_parallel, tp);
    const auto expected = block->forward(input, packed()).detach();
    block->to(at::kBFloat16);
    const auto own_input = leaf(input.to(at::kBFloat16));
    const auto output = block->forward(own_input, packed());
    output.sum().backward();
    compare(output, expected, "output", 5e-2);
    EXPECT_EQ(output.scalar_type(), at::kBFloat16);
    EXPECT_EQ(own_input.grad().scalar_type(), at::kBFloat16);
  }
}

TEST_F(TransformerTest, ALayerCommunicatesAsItsHeadersSay) {
  const auto& tp = test_support::world_tp();
  const int64_t sent = tp->getSize() > 1 ? 1 : 0;
  for (const bool sequence_parallel : {false, true}) {
    const auto recorded = parallel::record(tp);
    auto config = small_config();
    config.sequence_parallel = sequence_parallel;
    TransformerLayer layer(config, 0, recorded.group);
    start(layer);
    const auto input = leaf(own_rows(normal_values({kSequence, kBatch, kHidden}, 1), sequence_parallel, tp));
    const auto output = layer->forward(input, unpacked());
    const auto forward = *recorded.count;
    output.backward(at::ones_like(output));
    const auto backward = *recorded.count - forward;
    const auto expect = [&](const parallel::CommunicationCount& count, int64_t reduced, int64_t gathered,
                            int64_t scattered) {
      EXPECT_EQ(count.of(CollectiveKind::kAllReduce), reduced * sent);
      EXPECT_EQ(count.of(CollectiveKind::kAllGather), gathered * sent);
      EXPECT_EQ(count.of(CollectiveKind::kReduceScatter), scattered * sent);
      EXPECT_EQ(count.total(), (reduced + gathered + scattered) * sent);
    };
    if (sequence_parallel) {
      expect(forward, 0, 2, 2);
      expect(backward, 0, 4, 2);
    } else {
      expect(forward, 2, 0, 0);
      expect(backward, 2, 0, 0);
    }
  }
}

TEST_F(TransformerTest, GradientRulesFollowFromTheLayersUse) {
  for (const int t : test_support::divisors_of_world()) {
    for (const bool sequence_parallel : {false, true}) {
      auto config = small_config();
      config.sequence_parallel = sequence_parallel;
      TransformerBlock block(config, test_support::groups(t).tp);
      for (const auto& shard : parameter_shards(*block)) {
        auto expected = GradientRule::kSharded;
        if (shard.name.find("layernorm") != std::string::npos) {
          expected = sequence_parallel && t > 1 ? GradientRule::kReplicatedPartial : GradientRule::kReplicated;
        } else if (shard.name.find("_norm") != std::string::npos) {
          expected = t > 1 ? GradientRule::kReplicatedPartial : GradientRule::kReplicated;
        }
        EXPECT_EQ(shard.rule, expected) << shard.name << " at t = " << t;
      }
    }
  }
}

// ---- the golden model ----

/// The published sizes of the layers before the first mixture of experts.
TransformerConfig golden_config(const std::string& name) {
  std::ifstream file(std::string(MCPP_TEST_CASES) + "/models/" + name + "/config_hub.json");
  TORCH_CHECK(file, "can't read the configuration of ", name);
  const auto json = nlohmann::json::parse(file).at("text_config");
  TransformerConfig config;
  config.vocabulary_size = json.at("vocab_size");
  config.hidden_size = json.at("hidden_size");
  config.head_dim = json.at("head_dim");
  config.num_query_groups = json.at("num_attention_groups");
  config.ffn_hidden_size = json.at("intermediate_size");
  config.rms_norm_eps = json.at("rms_norm_eps");
  for (size_t number = 0; number < 2; ++number) {
    const bool sliding = json.at("layer_types").at(number) == "sliding_attention";
    auto& layer = config.layers.emplace_back();
    layer.num_attention_heads = (sliding ? json.at("attention_other_setting") : json).at("num_attention_heads");
    if (sliding) layer.sliding_window = json.at("sliding_window");
    layer.rope_theta = json.at("rope_theta").at(number);
    layer.partial_rotary_factor = json.at("partial_rotary_factors").at(number);
    layer.swiglu_limit = json.at("swiglu_limits_shared").at(number);
  }
  return config;
}

std::string published_name(std::string name) {
  if (name == "final_layernorm.weight") return "model.norm.weight";
  const std::vector<std::pair<std::string, std::string>> replacements{
      {"self_attention.linear_qkv.", "self_attn."},
      {"self_attention.linear_proj.", "self_attn.o_proj."},
      {"self_attention.", "self_attn."},
      {"pre_mlp_layernorm", "post_attention_layernorm"},
      {"mlp.linear_fc1.", "mlp."},
      {"mlp.linear_fc2.", "mlp.down_proj."}};
  for (const auto& [ours, published] : replacements) {
    const auto at = name.find(ours);
    if (at == std::string::npos) continue;
    name.replace(at, ours.size(), published);
    break;
  }
  return "model." + name;
}

void load(const std::vector<ParameterShard>& shards, const SafetensorsFile& file) {
  const at::NoGradGuard no_grad;
  for (const auto& shard : shards) {
    for (const auto& segment : shard.segments) {
      const auto rows =
          file.read_slice(published_name(segment.name), segment.dim, segment.global_begin, segment.length);
      shard.parameter.narrow(segment.dim, segment.local_begin, segment.length).copy_(rows);
    }
  }
}

TEST_F(TransformerTest, GoldenLayers) {
  for (const std::string name : {"base", "text_only"}) {
    const SafetensorsFile weights(std::string(MCPP_TEST_CASES) + "/models/" + name + "/model.safetensors");
    const SafetensorsFile values(std::string(MCPP_TEST_CASES) + "/forward/" + name + ".safetensors");
    auto config = golden_config(name);
    const auto sequence_first = [&](const std::string& key) { return on_device(values.read(key)).transpose(0, 1); };
    const auto embeddings = sequence_first("inputs_embeds").contiguous();
    const AttentionInput attention{at::arange(embeddings.size(0), at::kLong).unsqueeze(0), {}};
    for (const int t : test_support::divisors_of_world()) {
      if (t > 2) {  // it has two key/value heads
        EXPECT_THROW(config.validate(t), c10::ValueError);
        continue;
      }
      for (const bool sequence_parallel : {false, true}) {
        const auto& tp = test_support::groups(t).tp;
        config.sequence_parallel = sequence_parallel;
        TransformerBlock block(config, tp);
        load(start(block), weights);
        auto hidden = own_rows(embeddings, sequence_parallel, tp);
        for (size_t number = 0; number < 2; ++number) {
          hidden = block->layers->ptr(number)->as<TransformerLayer>()->forward(hidden, attention);
          const auto key = "text_layer_out." + std::to_string(number);
          compare(hidden, own_rows(sequence_first(key), sequence_parallel, tp), name + " " + key, kGoldenTolerance);
        }
      }
    }
  }
}

// ---- errors ----

/// `action` throws c10::ValueError whose text has `text` in it.
template <class Action>
testing::AssertionResult throws(const Action& action, const std::string& text) {
  try {
    action();
  } catch (const c10::ValueError& error) {
    const std::string message = error.what_without_backtrace();
    if (message.find(text) != std::string::npos) return testing::AssertionSuccess();
    return testing::AssertionFailure() << "got \"" << message << "\", wanted \"" << text << "\"";
  }
  return testing::AssertionFailure() << "nothing was thrown, wanted \"" << text << "\"";
}

TEST_F(TransformerTest, ConfigurationsThatCannotBeSplitAreRefused) {
  struct Case {
    std::function<void(TransformerConfig&)> spoil;
    int t;
    std::string text;
  };
  const std::vector<Case> cases{
      {[](auto& c) { c.hidden_size = 26; }, 4, "hidden_size 26 is not divisible by tensor-parallel size 4"},
      {[](auto& c) { c.ffn_hidden_size = 21; }, 2, "ffn_hidden_size 21 is not divisible by tensor-parallel size 2"},
      {[](auto& c) { c.num_query_groups = 2; }, 4, "num_query_groups 2 is not divisible by tensor-parallel size 4"},
      {[](auto& c) { c.layers[1].num_attention_heads = 10; }, 4,
       "layer 1 num_attention_heads 10 is not divisible by tensor-parallel size 4"},
      {[](auto& c) { c.layers[2].num_attention_heads = 6; }, 1,
       "layer 2 num_attention_heads 6 is not divisible by num_query_groups 4"},
      {[](auto& c) { c.layers[0].partial_rotary_factor = 0.4; }, 1, "layer 0 rotates 3 elements of a head (head_dim 8"},
      {[](auto& c) { c.layers[0].partial_rotary_factor = 1.5; }, 1, "layer 0 partial_rotary_factor 1.5 is not"},
      {[](auto& c) { c.layers[0].partial_rotary_factor = 1e300; }, 1, "layer 0 partial_rotary_factor 1e+300 is not"},
      {[](auto& c) { c.layers[0].sliding_window = -1; }, 1, "layer 0 sliding_window -1 is negative"},
      {[](auto& c) { c.vocabulary_size = 0; }, 1, "vocabulary_size 0 is not positive"}};
  for (const auto& item : cases) {
    auto config = small_config();
    item.spoil(config);
    EXPECT_TRUE(throws([&] { config.validate(item.t); }, item.text));
  }
  for (const int t : {1, 2, 4}) EXPECT_NO_THROW(small_config().validate(t));
  auto config = small_config();
  config.layers[1].num_attention_heads = 0;
  EXPECT_THROW(GPTModel(config, test_support::world_tp()), c10::ValueError);
}

TEST_F(TransformerTest, AttentionInputsThatDoNotFitAreRefusedBeforeAnythingIsSent) {
  SelfAttention attention(small_config(), small_config().layers[0], test_support::world_tp());
  start(attention);
  const auto input = normal_values({kSequence, 1, kHidden}, 1);
  const auto two_rows = normal_values({kSequence, 2, kHidden}, 1);
  const auto with = [&](const at::Tensor& x, const at::Tensor& ids, const at::Tensor& ends) {
    return [&attention, x, ids, ends] { attention->forward(x, {ids, ends}); };
  };
  const auto ids = unpacked().position_ids;
  EXPECT_TRUE(throws(with(input, {}, {}), "position_ids are missing"));
  EXPECT_TRUE(throws(with(input, ids.narrow(1, 0, 15), {}), "position_ids are [1, 15]"));
  EXPECT_TRUE(throws(with(input, ids.to(at::kInt), {}), "Int"));
  EXPECT_TRUE(throws(with(input, ids.expand({2, -1}), {}), "position_ids are [2, 16]"));
  EXPECT_TRUE(throws(with(two_rows, ids, prefix_sums({0, 16})), "one packed batch row, but the batch has 2"));
  EXPECT_TRUE(throws(with(input, ids, prefix_sums({0, 15})), "cu_seqlens run from 0 to 15, the sequence from 0 to 16"));
  EXPECT_TRUE(throws(with(input, ids, prefix_sums({0, 9, 8, 16})), "cu_seqlens decrease at entry 2: 9 to 8"));
  EXPECT_TRUE(throws(with(input, ids, integers({0, 16})), "cu_seqlens must be [k+1] int32 on the CPU"));
  EXPECT_TRUE(throws(with(input.squeeze(1), ids, {}), "is not [sequence, batch, hidden]"));
  EXPECT_TRUE(throws(with(normal_values({kSequence, 1, 23}, 1), ids, {}), "does not have the 24 columns"));
  // Sub-sequences of length 0 are left out.
  compare(attention->forward(input, {ids, prefix_sums({0, 0, 16, 16})}), attention->forward(input, {ids, {}}), "empty");
}

}  // namespace
}  // namespace megatron
