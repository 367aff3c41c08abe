// Recomputed parts of a decoder against kept ones: the same bits, less memory.
#include "megatron_cpp/transformer/recompute.h"

#include <ATen/ATen.h>
#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "megatron_cpp/tensor_parallel/vocab_parallel_cross_entropy.h"
#include "megatron_cpp/transformer/gpt_model.h"
#include "parallel/recording_backend.h"
#include "parallel/shard.h"
#include "tests/megatron_cpp/transformer_fixture.h"
#include "tests/support/live_bytes.h"
#include "tests/support/test_world.h"

namespace megatron_cpp {
namespace {

using parallel::RankGrid;
using namespace test_support;
using namespace transformer_fixture;
using Tensors = std::vector<at::Tensor>;

/// Two inputs and a parameter to two outputs, by operations that keep what they multiply.
RecomputedBody product_of(const at::Tensor& weight, int* calls) {
  return [weight, calls](const Tensors& inputs) {
    ++*calls;
    const auto product = inputs[0] * inputs[1].exp();
    return Tensors{product.mm(weight).sigmoid(), product.square()};
  };
}

struct Leaves {
  at::Tensor x = leaf(normal_values({5, 4}, 1));
  at::Tensor y = leaf(normal_values({5, 4}, 2));
  at::Tensor weight = leaf(normal_values({4, 3}, 3));
};

TEST(Recompute, GivesTheSameBitsAndCallsItsBodyOnceMore) {
  const auto first_gradient = normal_values({5, 3}, 4);
  for (const bool uses_second : {false, true}) {
    int calls = 0;
    const Leaves kept;
    const Leaves twice;
    const auto expected = product_of(kept.weight, &calls)({kept.x, kept.y});
    calls = 0;
    const auto actual = recompute(product_of(twice.weight, &calls), {twice.x, twice.y}, {twice.weight});
    EXPECT_EQ(calls, 1);
    for (size_t i = 0; i < 2; ++i) EXPECT_TRUE(at::equal(actual[i], expected[i]));
    const auto loss = [&](const Tensors& outputs) {
      const auto first = (outputs[0] * first_gradient).sum();
      return uses_second ? first + outputs[1].sum() : first;
    };
    for (const auto& outputs : {expected, actual}) loss(outputs).backward({}, /*retain_graph=*/true);
    EXPECT_EQ(calls, 2);
    const auto expect_equal_gradients = [&] {
      EXPECT_TRUE(at::equal(twice.x.grad(), kept.x.grad()));
      EXPECT_TRUE(at::equal(twice.y.grad(), kept.y.grad()));
      EXPECT_TRUE(at::equal(twice.weight.grad(), kept.weight.grad()));
    };
    expect_equal_gradients();
    // Once more through the same graph.
    for (const auto& outputs : {expected, actual}) loss(outputs).backward();
    EXPECT_EQ(calls, 3);
    expect_equal_gradients();
  }
}

TEST(Recompute, TrainsParametersBehindFrozenInputsAndTheReverse) {
  const auto gradients = [](bool trains_inputs, bool trains_weight, bool recomputes) {
    int calls = 0;
    Leaves leaves;
    leaves.x.requires_grad_(trains_inputs);
    leaves.y.requires_grad_(false);
    leaves.weight.requires_grad_(trains_weight);
    const auto body = product_of(leaves.weight, &calls);
    const auto outputs =
        recomputes ? recompute(body, {leaves.x, leaves.y}, {leaves.weight}) : body({leaves.x, leaves.y});
    EXPECT_EQ(outputs[0].requires_grad(), trains_inputs || trains_weight);
    if (outputs[0].requires_grad()) outputs[0].sum().backward();
    EXPECT_EQ(calls, recomputes && outputs[0].requires_grad() ? 2 : 1);
    EXPECT_FALSE(leaves.y.grad().defined());
    return std::pair{leaves.x.grad(), leaves.weight.grad()};
  };
  for (const bool trains_inputs : {false, true}) {
    for (const bool trains_weight : {false, true}) {
      const auto expected = gradients(trains_inputs, trains_weight, false);
      const auto actual = gradients(trains_inputs, trains_weight, true);
      EXPECT_EQ(actual.first.defined(), trains_inputs);
      EXPECT_EQ(actual.second.defined(), trains_weight);
      EXPECT_TRUE(!trains_inputs || at::equal(actual.first, expected.first));
      EXPECT_TRUE(!trains_weight || at::equal(actual.second, expected.second));
    }
  }
}

TEST(Recompute, CallsItsBodyOnceWithoutGradients) {
  const at::NoGradGuard no_grad;
  int calls = 0;
  const Leaves leaves;
  const auto outputs = recompute(product_of(leaves.weight, &calls), {leaves.x, leaves.y}, {leaves.weight});
  EXPECT_EQ(calls, 1);
  EXPECT_FALSE(outputs[0].requires_grad());
}

TEST(Recompute, NestsAndRefusesDoubleBackward) {
  int calls = 0;
  const Leaves kept;
  const Leaves twice;
  const RecomputedBody inner = product_of(twice.weight, &calls);
  const RecomputedBody outer = [&](const Tensors& inputs) {
    return Tensors{recompute(inner, {inputs[0] * 2.0, inputs[1]}, {twice.weight})[0].square()};
  };
  product_of(kept.weight, &calls)({kept.x * 2.0, kept.y})[0].square().sum().backward();
  recompute(outer, {twice.x, twice.y}, {twice.weight})[0].sum().backward();
  EXPECT_TRUE(at::equal(twice.x.grad(), kept.x.grad()));
  EXPECT_TRUE(at::equal(twice.weight.grad(), kept.weight.grad()));

  const auto again = recompute(inner, {twice.x, twice.y}, {twice.weight})[0].sum();
  EXPECT_THROW(torch::autograd::grad({again}, {twice.x}, {}, {}, /*create_graph=*/true), c10::NotImplementedError);
}

/// A producer that counts its calls, and a consumer that uses what it made directly and as a view.
struct Between {
  at::Tensor produce(const at::Tensor& input) {
    ++produced;
    return input.exp() * scale;
  }
  Tensors consume(const at::Tensor& y) {
    ++consumed;
    const auto product = y.mm(weight);
    return {product + y.reshape({-1}).square().sum(), {}, y.detach().sum(), product.square().sum()};
  }
  Tensors recomputed(const at::Tensor& input) {
    return recompute_between([this](const at::Tensor& again) { return produce(again); }, input,
                             [this](const at::Tensor& y) { return consume(y); });
  }

  at::Tensor x = leaf(normal_values({5, 4}, 1));
  at::Tensor scale = leaf(normal_values({4}, 2));
  at::Tensor weight = leaf(normal_values({4, 3}, 3));
  int produced = 0;
  int consumed = 0;
};

TEST(RecomputeBetween, GivesTheSameBitsAndCallsTheProducerOnceMore) {
  for (const size_t used : {size_t{0}, size_t{3}}) {
    Between kept;
    Between freed;
    const auto expected = kept.consume(kept.produce(kept.x))[used];
    const auto outputs = freed.recomputed(freed.x);
    EXPECT_FALSE(outputs[1].defined());
    EXPECT_TRUE(at::equal(outputs[used], expected));
    EXPECT_EQ(freed.produced, 1);
    for (int pass = 0; pass < 2; ++pass) {
      const bool once_more = pass == 0;
      expected.sum().backward({}, once_more);
      outputs[used].sum().backward({}, once_more);
      EXPECT_EQ(freed.produced, 2);
      EXPECT_TRUE(at::equal(freed.x.grad(), kept.x.grad()));
      EXPECT_TRUE(at::equal(freed.scale.grad(), kept.scale.grad()));
      EXPECT_TRUE(at::equal(freed.weight.grad(), kept.weight.grad()));
    }
    EXPECT_EQ(freed.consumed, 1);
  }
}

TEST(RecomputeBetween, FreesNothingThatNoBackwardPassComputesAgain) {
  Between between;
  between.x.requires_grad_(false);
  between.scale.requires_grad_(false);
  between.recomputed(between.x)[0].sum().backward();
  EXPECT_EQ(between.produced, 1);
  EXPECT_TRUE(between.weight.grad().defined());
  const at::NoGradGuard no_grad;
  EXPECT_FALSE(between.recomputed(leaf(normal_values({5, 4}, 1)))[0].requires_grad());
  EXPECT_EQ(between.produced, 2);
}

TEST(RecomputeBetween, RefusesWhatHasChangedSince) {
  for (const bool changes_input : {false, true}) {
    Between between;
    const auto x = between.x * 1.0;
    const auto outputs = between.recomputed(x);
    {
      const at::NoGradGuard no_grad;
      (changes_input ? x : between.scale).add_(1.0);
    }
    EXPECT_THROW(outputs[0].sum().backward(), c10::Error);
  }
}

TEST(RecomputeBetween, HoldsNoMemoryBehindItsUse) {
  if (!runtime().device().is_cpu()) GTEST_SKIP() << "a CPU counts what is alive";
  const auto watch = std::make_shared<LiveBytes>();
  const auto x = leaf(normal_values({512, 16}, 1));
  x.mutable_grad() = at::zeros_like(x);
  constexpr int64_t kBytes = 512 * 16 * 4;
  const auto produce = [](const at::Tensor& input) { return input + 1.0; };
  const auto consume = [](const at::Tensor& y) { return Tensors{y.square().sum()}; };
  const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, watch);
  {
    const auto unused = recompute_between(produce, x * 2.0, consume);
    EXPECT_LT(watch->live(), 2 * kBytes);  // x * 2, not x * 2 + 1
  }
  EXPECT_EQ(watch->live(), 0);
  const auto loss = recompute_between(produce, x * 2.0, consume)[0];
  loss.backward();
  EXPECT_LT(watch->live(), kBytes);  // the loss has still its graph
}

constexpr int64_t kSequence = 16;

/// A dense layer, two with experts, and two of multi-token prediction; all sizes divisible by 1, 2 and 4.
TransformerConfig model_config() {
  LayerConfig full;
  full.num_attention_heads = 4;
  LayerConfig sliding;
  sliding.num_attention_heads = 8;
  sliding.sliding_window = 3;
  sliding.has_experts = true;
  sliding.swiglu_limit = 0.4;
  sliding.expert_swiglu_limit = 0.3;
  auto full_experts = full;
  full_experts.has_experts = true;
  MoEConfig moe;
  moe.num_experts = 8;
  moe.router_topk = 3;
  moe.ffn_hidden_size = 12;
  moe.shared_expert_ffn_hidden_size = 8;
  moe.aux_loss_coeff = 0.7;
  moe.group_balance_loss_coeff = 0.3;
  moe.group_balance_groups = 4;
  moe.z_loss_coeff = 0.05;
  auto config = small_decoder({full, sliding, full_experts});
  config.moe = moe;
  auto dense = sliding;
  dense.has_experts = false;
  config.mtp_layers = {dense, full};
  return config;
}

/// Three sub-sequences of 5, 1 and 10 positions.
AttentionInput packed() {
  return {at::cat({at::arange(5, at::kLong), at::arange(1, at::kLong), at::arange(10, at::kLong)}).unsqueeze(0),
          at::tensor({0, 5, 6, 16}, at::kInt)};
}

/// Everything that a training step reads.
using Results = std::map<std::string, at::Tensor>;

struct Run {
  RecomputedParts recomputed = {};
  bool sequence_parallel = false;
  bool freezes_embedding = false;
  std::function<void(GPTModel&)> before = [](GPTModel&) {};           ///< of the started model
  std::function<void(GPTModel&)> before_backward = [](GPTModel&) {};  ///< of the second micro-batch
};

/// Two micro-batches that accumulate into gradients.
Results train(const Run& run, const parallel::ProcessGroups& groups) {
  const auto config = model_config();
  GPTModel model(
      config,
      TransformerExecution{
          .sequence_parallel = run.sequence_parallel, .accumulate_into_grad = true, .recomputed = run.recomputed},
      groups);
  const auto shards = start(model);
  if (run.freezes_embedding) model->embedding->parameters()[0].set_requires_grad(false);
  for (const auto& shard : shards) {
    auto parameter = shard.parameter;
    if (parameter.requires_grad()) parameter.mutable_grad() = at::zeros_like(parameter);
  }
  run.before(model);
  Results results;
  CrossEntropyOptions options;
  options.vocabulary_size = config.vocabulary_size;
  for (int64_t batch = 0; batch < 2; ++batch) {
    const auto ids = at::arange(kSequence, at::kLong).mul(7).add(batch).remainder(37).unsqueeze(0);
    const auto labels = ids.roll(-1, 1);
    const auto mask = on_device(at::zeros({1, kSequence}, at::kLong));
    mask.narrow(1, 12, 4).fill_(1);
    RouterStatistics statistics(mask);
    const auto input = model->embedding->forward(ids, packed().position_ids);
    at::Tensor mtp_input;
    const auto logits = model->forward(ids, packed(), input, &statistics, &mtp_input);
    auto loss = vocab_parallel_cross_entropy(logits, labels.t(), options, groups.tp).sum();
    for (const auto& addend : statistics.losses(*config.moe, groups.tp)) loss = loss + addend.to(loss.scalar_type());
    loss = loss + model->mtp->loss_sum(mtp_input, input, packed(), labels);
    if (batch == 1) run.before_backward(model);
    loss.backward();
    results["loss " + std::to_string(batch)] = loss.detach();
    results["tokens " + std::to_string(batch)] = statistics.tokens_per_expert();
  }
  for (const auto& shard : shards) {
    if (shard.parameter.grad().defined()) results["gradient of " + shard.name] = shard.parameter.grad().clone();
  }
  return results;
}

void expect_same_bits(const Results& actual, const Results& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (const auto& [name, value] : expected) EXPECT_TRUE(at::equal(actual.at(name), value)) << name;
}

const std::map<std::string, RecomputedParts>& settings() {
  static const std::map<std::string, RecomputedParts> all{
      {"layers", {.layers = true}},
      {"core_attention", {.core_attention = true}},
      {"mlp", {.mlp = true}},
      {"experts", {.experts = true}},
      {"norms", {.norms = true}},
      {"parts", {.core_attention = true, .mlp = true, .experts = true}},
      {"parts and norms", {.core_attention = true, .mlp = true, .experts = true, .norms = true}},
      {"all", {.layers = true, .core_attention = true, .mlp = true, .experts = true, .norms = true}}};
  return all;
}

TEST(Recompute, PartsOfADecoderGiveTheSameBitsInEveryLayout) {
  for (const int tp : divisors_of_world()) {
    for (const int ep : divisors_of_world()) {
      const RankGrid grid{.tp = tp, .dp = runtime().size() / tp, .ep = ep, .etp = tp % ep == 0 ? tp / ep : 1};
      for (const bool sequence_parallel : {false, true}) {
        if (ep > 1 && !sequence_parallel) continue;  // a rank's tokens are as many
        const auto expected = train({.sequence_parallel = sequence_parallel}, groups(grid));
        for (const auto& [name, parts] : settings()) {
          const bool is_alone = name != "layers" && name != "parts and norms" && name != "norms";
          if (is_alone && (ep > 1 || !sequence_parallel)) continue;
          SCOPED_TRACE(testing::Message() << name << ", tp " << tp << ", ep " << ep << ", " << sequence_parallel);
          expect_same_bits(train({.recomputed = parts, .sequence_parallel = sequence_parallel}, groups(grid)),
                           expected);
        }
      }
    }
  }
}

TEST(Recompute, TheFirstLayerIsTrainedBehindAFrozenEmbedding) {
  const auto& all = groups(runtime().size());
  const auto expected = train({.freezes_embedding = true}, all);
  for (const auto& [name, parts] : settings()) {
    SCOPED_TRACE(name);
    expect_same_bits(train({.recomputed = parts, .freezes_embedding = true}, all), expected);
  }
}

// Every expert has the same score, and then, before the backward pass, the bias turns: the first pass's choice stays.
TEST(Recompute, TokensKeepTheirExperts) {
  const auto& all = groups(runtime().size());
  const auto tie = [](GPTModel& model) {
    const at::NoGradGuard no_grad;
    for (auto& moe : model->decoder->moe_layers()) {
      moe->router->weight.zero_();
      moe->router->expert_bias.zero_();
    }
  };
  const auto turn = [](GPTModel& model) {
    const at::NoGradGuard no_grad;
    for (auto& moe : model->decoder->moe_layers()) moe->router->expert_bias.copy_(at::arange(8, at::kFloat));
  };
  const auto expected = train({.before = tie}, all);
  for (const auto& [name, parts] : settings()) {
    SCOPED_TRACE(name);
    expect_same_bits(train({.recomputed = parts, .before = tie, .before_backward = turn}, all), expected);
  }
}

/// Bytes that the graph of a layer-stack's forward pass keeps.
int64_t kept_bytes(const RecomputedParts& parts) {
  auto config = model_config();
  config.moe->shared_expert_ffn_hidden_size = 64;
  config.ffn_hidden_size = 96;
  TransformerBlock block(config, TransformerExecution{.recomputed = parts}, single());
  start(block);
  const auto input = leaf(normal_values({512, 1, 24}, 1));
  const AttentionInput attention{at::arange(512, at::kLong).unsqueeze(0), {}};
  const auto watch = std::make_shared<LiveBytes>();
  const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, watch);
  const auto output = block->forward(input, attention);
  return watch->live();
}

TEST(Recompute, KeepsLess) {
  if (runtime().size() > 1 || !runtime().device().is_cpu()) GTEST_SKIP() << "one process with a CPU is enough";
  const int64_t none = kept_bytes({});
  std::map<std::string, int64_t> kept;
  for (const auto& [name, parts] : settings()) kept[name] = kept_bytes(parts);
  for (const auto& [name, bytes] : kept) RecordProperty("share_of_" + name, std::to_string(bytes * 1000 / none));
  constexpr int64_t kRow = 512 * 4;
  // Inputs of three layers and of the norm at the end, its output, rotary tables, who went where: little else.
  EXPECT_LE(kept["layers"], kRow * (24 * 5 + 2 * 24 + 3 * 2 * 2 * 3));
  // Gate, up and their product.
  EXPECT_LE(kept["mlp"], none - kRow * 3 * (96 + 2 * 64));
  // Gate and up of three experts a token, in two layers.
  EXPECT_LE(kept["experts"], none - kRow * 2 * 3 * 2 * 12);
  EXPECT_LT(kept["core_attention"], none);
  EXPECT_LT(kept["parts"], std::min({kept["core_attention"], kept["mlp"], kept["experts"]}));
  // Two norms of each layer, whatever else is kept of it.
  EXPECT_EQ(none - kept["norms"], kRow * 3 * 2 * 24);
  EXPECT_EQ(kept["parts"] - kept["parts and norms"], kRow * 3 * 2 * 24);
}

}  // namespace
}  // namespace megatron_cpp
