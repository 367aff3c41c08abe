// The decoder: every tensor-parallel size against one rank alone, the first layers of the golden model, what is sent,
// and what is refused.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "megatron_cpp/tensor_parallel/vocab_parallel_embedding.h"
#include "megatron_cpp/transformer/attention.h"
#include "megatron_cpp/transformer/gpt_model.h"
#include "megatron_cpp/transformer/mlp.h"
#include "megatron_cpp/transformer/transformer_block.h"
#include "megatron_cpp/transformer/transformer_config.h"
#include "megatron_cpp/transformer/transformer_layer.h"
#include "parallel/collectives.h"
#include "parallel/recording_backend.h"
#include "parallel/shard.h"
#include "tests/megatron_cpp/transformer_fixture.h"
#include "tests/support/errors.h"
#include "tests/support/operator_watch.h"
#include "tests/support/test_world.h"

namespace megatron_cpp {
namespace {

using parallel::CollectiveKind;
using parallel::GroupPtr;
using parallel::Range;
using namespace test_support;
using namespace transformer_fixture;

at::Tensor prefix_sums(const std::vector<int64_t>& ends) { return at::tensor(ends, at::kInt); }

/// This rank's rows of the sequence, or all of it.
at::Tensor own_rows(const at::Tensor& whole, bool sequence_parallel, const GroupPtr& tp) {
  if (!sequence_parallel) return whole;
  const auto rows = parallel::even_shard(whole.size(0), tp->getSize(), tp->getRank(), "sequence length");
  return whole.narrow(0, rows.begin, rows.length());
}

/// Layers that differ in heads, window, rotary and clamp.
TransformerConfig small_config() {
  LayerConfig full;
  full.num_attention_heads = 8;
  full.rope_theta = 5e6;
  full.partial_rotary_factor = 0.5;
  full.rope_scaling = Llama3RopeScaling{2.0, 1.0, 4.0, 32};
  full.swiglu_limit = 0.3;
  LayerConfig sliding;
  sliding.num_attention_heads = 12;
  sliding.sliding_window = 5;
  auto config = small_decoder({full, sliding, full});
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

/// Gradients of the global parameters, from one rank that holds them whole.
std::map<std::string, at::Tensor> global_gradients(const std::vector<ParameterShard>& whole) {
  std::map<std::string, at::Tensor> result;
  for (const auto& shard : whole) {
    for (const auto& segment : shard.segments) {
      result[segment.name] = segment.in_local(shard.parameter.grad());
    }
  }
  return result;
}

/// What a layer whose attention turns with `rotary` takes.
AttentionBatch batch_of(const RotaryEmbedding& rotary, const AttentionInput& input, int64_t B) {
  return {input, kSequence, B, {rotary}, test_support::runtime().device()};
}

using Compare = std::function<void(const at::Tensor&, const at::Tensor&, const std::string&)>;

/// Completes each gradient by its domain and compares it with its slice of the global one.
void compare_gradients(const std::vector<ParameterShard>& shards, const std::map<std::string, at::Tensor>& expected,
                       const GroupPtr& tp, const Compare& compare) {
  for (const auto& shard : shards) {
    auto gradient = shard.parameter.grad();
    if (shard.domain == GradientDomain::kReplicatedPartial) gradient = parallel::all_reduce(gradient, tp);
    for (const auto& segment : shard.segments) {
      compare(segment.in_local(gradient), segment.in_global(expected.at(segment.name)), "gradient of " + segment.name);
    }
  }
}

template <class Module>
using Make = std::function<Module(const TransformerConfig&, const TransformerExecution&, const GroupPtr&)>;
template <class Module>
using Forward = std::function<at::Tensor(Module&, const at::Tensor&)>;

/// [S, B, H] -> [S, B, H]: output, input gradient and parameter gradients of every tensor-parallel size, with and
/// without sequence parallelism, against one rank.
template <class Module>
void expect_like_single(const Make<Module>& make, const Forward<Module>& forward, int64_t batch,
                        const Compare& compare) {
  const auto whole_input = normal_values({kSequence, batch, kHidden}, 1);
  const auto whole_gradient = normal_values({kSequence, batch, kHidden}, 2);
  auto reference = make(small_config(), {}, test_support::single());
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
      auto module = make(small_config(), {.sequence_parallel = sequence_parallel}, tp);
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

TEST_F(TransformerTest, PackedSequencesDoNotSeeEachOther) {
  GPTModel model(small_config(), TransformerExecution{}, test_support::world_tp());
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
          [&](const TransformerConfig& config, const TransformerExecution& execution, const GroupPtr& tp) {
            return SelfAttention(config, config.layers[layer], execution, tp);
          },
          [&](SelfAttention& module, const at::Tensor& x) {
            return module->forward(x, batch_of(module->rotary(), input, x.size(1)));
          },
          input.cu_seqlens.defined() ? 1 : kBatch,
          [&](const at::Tensor& a, const at::Tensor& b, const std::string& what) { compare(a, b, what); });
    }
  }
}

TEST_F(TransformerTest, MLPIsTheSameAtEverySize) {
  for (const double limit : {0.0, 0.3}) {
    expect_like_single<MLP>(
        [&](const TransformerConfig& config, const TransformerExecution& execution, const GroupPtr& tp) {
          return MLP(config, config.ffn_hidden_size, limit, execution, tp);
        },
        [](MLP& module, const at::Tensor& x) { return module->forward(x); }, kBatch,
        [&](const at::Tensor& a, const at::Tensor& b, const std::string& what) { compare(a, b, what); });
  }
}

TEST_F(TransformerTest, LayersAreTheSameAtEverySize) {
  for (const int64_t number : {0, 1}) {
    expect_like_single<TransformerLayer>(
        [&](const TransformerConfig& config, const TransformerExecution& execution, const GroupPtr& tp) {
          return TransformerLayer(config, number, execution, tp);
        },
        [](TransformerLayer& module, const at::Tensor& x) {
          return module->forward(x, batch_of(module->self_attention->rotary(), unpacked(), kBatch));
        },
        kBatch, [&](const at::Tensor& a, const at::Tensor& b, const std::string& what) { compare(a, b, what); });
  }
}

TEST_F(TransformerTest, TheBlockIsTheSameAtEverySize) {
  for (const auto& input : {unpacked(), packed()}) {
    expect_like_single<TransformerBlock>(
        [](const TransformerConfig& config, const TransformerExecution& execution, const GroupPtr& tp) {
          return TransformerBlock(config, execution, tp);
        },
        [&](TransformerBlock& module, const at::Tensor& x) { return module->forward(x, input); },
        input.cu_seqlens.defined() ? 1 : kBatch,
        [&](const at::Tensor& a, const at::Tensor& b, const std::string& what) { compare(a, b, what); });
  }
}

// Two blocks one after the other are the whole one, and their parameters have the names of the whole one's.
TEST_F(TransformerTest, BlocksOfSomeLayersMakeUpTheWhole) {
  const auto& tp = test_support::world_tp();
  const auto config = small_config();
  TransformerBlock whole(config, TransformerExecution{.sequence_parallel = true}, tp);
  TransformerBlock first(config, TransformerExecution{.sequence_parallel = true}, tp, Range{0, 1});
  TransformerBlock second(config, TransformerExecution{.sequence_parallel = true}, tp, Range{1, 3});
  std::vector<std::string> expected;
  for (const auto& shard : start(whole)) expected.push_back(shard.name);
  std::vector<std::string> names;
  for (auto* block : {&first, &second}) {
    for (const auto& shard : start(*block)) names.push_back(shard.name);
  }
  EXPECT_EQ(names, expected);
  const auto input = own_rows(normal_values({kSequence, 1, kHidden}, 1), true, tp);
  EXPECT_TRUE(
      test_support::equal(second->forward(first->forward(input, packed()), packed()), whole->forward(input, packed())));
  EXPECT_FALSE(first->final_layernorm);
  for (const auto& range : {Range{-1, 1}, Range{2, 1}, Range{0, 4}}) {
    EXPECT_TRUE(throws([&] { TransformerBlock(config, TransformerExecution{}, tp, range); }, "of a decoder with 3"));
  }
  const TransformerBlock none(config, TransformerExecution{}, tp, Range{1, 1});
  EXPECT_TRUE(parameter_shards(*none).empty());
}

/// The columns [r V'/t, (r+1) V'/t) of a tensor with V columns, zeros beyond V.
at::Tensor own_columns(const at::Tensor& whole, int64_t columns, const GroupPtr& tp) {
  const auto padded = at::constant_pad_nd(whole, {0, columns * tp->getSize() - whole.size(-1)});
  return padded.narrow(-1, columns * tp->getRank(), columns);
}

TEST_F(TransformerTest, TheModelIsTheSameAtEverySize) {
  const auto ids = at::arange(kBatch * kSequence, at::kLong).mul(11).remainder(37).view({kBatch, kSequence});
  const auto whole_gradient = normal_values({kSequence, kBatch, 37}, 3);
  GPTModel reference(small_config(), TransformerExecution{}, test_support::single());
  const auto reference_shards = start(reference);
  const auto expected = reference->forward(ids, unpacked());
  expected.backward(whole_gradient);

  for (const int t : test_support::divisors_of_world()) {
    for (const bool sequence_parallel : {false, true}) {
      for (const bool accumulate : {false, true}) {
        const auto& tp = test_support::groups(t).tp;
        const TransformerExecution execution{.sequence_parallel = sequence_parallel,
                                             .accumulate_into_grad = accumulate};
        GPTModel model(small_config(), execution, tp);
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
    const TransformerExecution execution{.sequence_parallel = sequence_parallel};
    GPTModel model(small_config(), execution, tp);
    start(model);
    const auto expected = model->forward(ids, packed());
    const auto embeddings = model->embedding->forward(ids).detach();
    EXPECT_EQ(embeddings.size(0), sequence_parallel ? kSequence / tp->getSize() : kSequence);
    EXPECT_TRUE(test_support::equal(model->forward({}, packed(), embeddings), expected));
  }
}

TEST_F(TransformerTest, PaddedOutputRowsAreInNoCheckpoint) {
  GPTModel model(small_config(), TransformerExecution{}, test_support::world_tp());
  int64_t rows = 0;
  for (const auto& shard : start(model)) {
    if (shard.name != "output_layer.weight") continue;
    const auto& segment = shard.segments.at(0);
    EXPECT_EQ(segment.global_shape, (std::vector<int64_t>{37, kHidden}));
    rows = segment.box.length[0];
    const auto padding = shard.parameter.narrow(0, rows, shard.parameter.size(0) - rows);
    EXPECT_EQ(padding.count_nonzero().item<int64_t>(), 0);
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
    const TransformerExecution execution{.sequence_parallel = sequence_parallel};
    const auto& tp = test_support::world_tp();
    TransformerBlock block(small_config(), execution, tp);
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
    const TransformerExecution execution{.sequence_parallel = sequence_parallel};
    TransformerLayer layer(small_config(), 0, execution, recorded.group);
    start(layer);
    const auto input = leaf(own_rows(normal_values({kSequence, kBatch, kHidden}, 1), sequence_parallel, tp));
    const auto output = layer->forward(input, batch_of(layer->self_attention->rotary(), unpacked(), kBatch));
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

TEST_F(TransformerTest, GradientDomainsFollowFromTheLayersUse) {
  for (const int t : test_support::divisors_of_world()) {
    for (const bool sequence_parallel : {false, true}) {
      const TransformerExecution execution{.sequence_parallel = sequence_parallel};
      TransformerBlock block(small_config(), execution, test_support::groups(t).tp);
      for (const auto& shard : parameter_shards(*block)) {
        auto expected = GradientDomain::kSharded;
        if (shard.name.find("layernorm") != std::string::npos) {
          expected = sequence_parallel && t > 1 ? GradientDomain::kReplicatedPartial : GradientDomain::kReplicated;
        } else if (shard.name.find("_norm") != std::string::npos) {
          expected = t > 1 ? GradientDomain::kReplicatedPartial : GradientDomain::kReplicated;
        }
        EXPECT_EQ(shard.domain, expected) << shard.name << " at t = " << t;
      }
    }
  }
}

// ---- errors ----

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
  EXPECT_THROW(GPTModel(config, TransformerExecution{}, test_support::world_tp()), c10::ValueError);
}

TEST_F(TransformerTest, AttentionInputsThatDoNotFitAreRefusedBeforeAnythingIsSent) {
  SelfAttention attention(small_config(), small_config().layers[0], TransformerExecution{}, test_support::world_tp());
  start(attention);
  const auto input = normal_values({kSequence, 1, kHidden}, 1);
  const auto two_rows = normal_values({kSequence, 2, kHidden}, 1);
  const auto forward = [&](const at::Tensor& x, const at::Tensor& ids, const at::Tensor& ends) {
    return attention->forward(x, batch_of(attention->rotary(), {ids, ends}, x.dim() == 3 ? x.size(1) : 1));
  };
  const auto with = [&](const at::Tensor& x, const at::Tensor& ids, const at::Tensor& ends) {
    return [&forward, x, ids, ends] { forward(x, ids, ends); };
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
  compare(forward(input, ids, prefix_sums({0, 0, 16, 16})), forward(input, ids, {}), "empty");
  // A batch that was made for something else.
  const auto of_two_rows = batch_of(attention->rotary(), {ids, {}}, 2);
  EXPECT_TRUE(throws([&] { attention->forward(input, of_two_rows); },
                     "of 16 positions and 1 batch rows, the AttentionBatch of 16 and 2"));
  EXPECT_TRUE(throws(
      [&] {
        attention->forward(input, batch_of(RotaryEmbedding(8, 1.0), {ids, {}}, 1));
      },
      "made without this layer's rotary embedding"));
  TransformerBlock block(small_config(), TransformerExecution{}, test_support::world_tp());
  start(block);
  EXPECT_TRUE(throws([&] { block->forward(input.squeeze(1), {ids, {}}); }, "not [sequence, batch, hidden]"));
}

// ---- what goes to the device ----

TEST_F(TransformerTest, ABatchGoesToTheDeviceWhole) {
  const auto config = small_config();
  const auto& full = config.layers[0];
  const auto& sliding = config.layers[1];
  const RotaryEmbedding first(full.rotary_dim(8), full.rope_theta, full.rope_scaling);
  const RotaryEmbedding second(sliding.rotary_dim(8), sliding.rope_theta);
  const test_support::OperatorWatch watch;
  // A device without data: on a GPU it would be the same.
  const AttentionBatch batch(packed(), kSequence, 1, {first, second, first}, at::kMeta);
  // Positions, ends of the sub-sequences, frequencies of either kind.
  EXPECT_EQ(watch.copies_from_host(), test_support::OperatorWatch::kSeesCopies ? 4 : 0);
  EXPECT_EQ(watch.count("aten::cos"), 2);
  EXPECT_EQ(batch.sub_sequences().ranges().size(), 3U);
  EXPECT_EQ(batch.sub_sequences().longest(), 10);
  EXPECT_EQ(batch.sub_sequences().ends().sizes(), (std::vector<int64_t>{4}));
  EXPECT_EQ(batch.sub_sequences().ends().scalar_type(), at::kInt);
  EXPECT_TRUE(batch.tables(second).cos.is_meta());
  EXPECT_EQ(AttentionBatch(unpacked(), kSequence, 2, {}, at::kMeta).sub_sequences().ends().size(0), 3);
  EXPECT_FALSE(AttentionBatch(unpacked(), kSequence, 2, {}, at::kCPU).sub_sequences().ends().defined());
}

TEST_F(TransformerTest, LayersMakeNothingThatTheBatchHolds) {
  const auto device = test_support::runtime().device();
  for (const auto& input : {unpacked(), packed()}) {
    for (const size_t num_layers : {2U, 3U, 8U}) {
      auto config = small_config();
      config.layers.resize(num_layers, config.layers.front());
      TransformerBlock block(config, TransformerExecution{}, test_support::single());
      start(block);
      const auto hidden = leaf(normal_values({kSequence, 1, kHidden}, 1));
      const test_support::OperatorWatch watch;
      block->forward(hidden, input).sum().backward();
      EXPECT_EQ(watch.count("aten::cos"), 2) << "one for full and one for sliding-window layers";
      EXPECT_EQ(watch.count("aten::_local_scalar_dense"), 0);
      EXPECT_EQ(watch.copies_from_host(), device.is_cuda() ? 4 : 0);
    }
  }
}

}  // namespace
}  // namespace megatron_cpp
