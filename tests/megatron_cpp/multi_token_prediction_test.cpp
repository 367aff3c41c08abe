// Multi-token prediction: loss and all gradients of a whole model at every tensor-parallel size, against a plain
// computation in float64 of each sub-sequence by itself, without padding.
#include "megatron_cpp/transformer/multi_token_prediction.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "megatron_cpp/tensor_parallel/linear_cross_entropy.h"
#include "megatron_cpp/transformer/gpt_model.h"
#include "megatron_cpp/transformer/rotary_embedding.h"
#include "megatron_cpp/transformer/transformer_config.h"
#include "parallel/collectives.h"
#include "parallel/shard.h"
#include "tests/megatron_cpp/transformer_fixture.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp {
namespace {

using parallel::GroupPtr;
using parallel::Range;
using namespace test_support;
using namespace transformer_fixture;

constexpr int64_t kVocabulary = 37;
constexpr int64_t kSequence = 16;
constexpr double kScale = 0.3;  // of multi-token prediction's loss

/// Three layers of multi-token prediction, of which the second one has other heads, window and frequencies.
TransformerConfig small_config(bool chain_after_norm) {
  const LayerConfig full{.num_attention_heads = 8, .rope_theta = 5e6, .partial_rotary_factor = 0.5};
  const LayerConfig sliding{.num_attention_heads = 12, .sliding_window = 3, .swiglu_limit = 0.3};
  auto config = small_decoder({full, sliding});
  config.mtp_layers = {sliding, full, sliding};
  config.mtp_chain_after_norm = chain_after_norm;
  return config;
}

/// Whole parameters by the names of their segments.
using Weights = std::map<std::string, at::Tensor>;

Weights weights_of(const TransformerConfig& config) {
  GPTModel model(config, TransformerExecution{}, single());
  Weights weights;
  for (const auto& shard : start(model)) {
    for (const auto& segment : shard.segments) {
      weights[segment.name] = leaf(segment.in_local(shard.parameter).to(at::kDouble));
    }
  }
  return weights;
}

/// The model's formulas over one sequence [n, H], without batch, packing and parallelism.
class Reference {
 public:
  Reference(const TransformerConfig& config, const Weights& weights) : config_(config), weights_(weights) {}

  /// @param ids, labels  [n] int64
  /// @return             the sums of the decoder's token losses and of multi-token prediction's
  std::pair<at::Tensor, at::Tensor> losses(const at::Tensor& ids, const at::Tensor& labels) const {
    const auto embeddings = weight("embedding.word_embeddings.weight").index_select(0, ids);
    const int64_t n = ids.size(0);
    auto hidden = embeddings;
    int64_t number = 0;
    for (const auto& layer : config_.layers) {
      hidden = decoder_layer(hidden, layer, "decoder.layers." + std::to_string(number++) + ".");
    }
    const auto normed = norm(hidden, "decoder.final_layernorm");
    const auto main = loss(at::linear(normed, weight("output_layer.weight")), labels);
    if (config_.mtp_chain_after_norm) hidden = normed;
    auto mtp = at::zeros({}, main.options());
    for (int64_t k = 0; k < static_cast<int64_t>(config_.mtp_layers.size()) && n > k + 1; ++k) {
      const auto name = "mtp.layers." + std::to_string(number++) + ".";
      // Position i has the hidden states of i and token i+k+1, and is to predict the one behind that.
      const int64_t rows = n - k - 1;
      const auto token = norm(embeddings.narrow(0, k + 1, rows), name + "enorm");
      const auto both = at::cat({token, norm(hidden.narrow(0, 0, rows), name + "hnorm")}, 1);
      hidden = decoder_layer(at::linear(both, weight(name + "eh_proj.weight")),
                             config_.mtp_layers[static_cast<size_t>(k)], name + "transformer_layer.");
      const auto last = norm(hidden, name + "final_layernorm");
      mtp = mtp + loss(at::linear(last, weight(name + "output_layer.weight")), labels.narrow(0, k + 1, rows));
      if (config_.mtp_chain_after_norm) hidden = last;
    }
    return {main, mtp};
  }

 private:
  at::Tensor weight(const std::string& name) const { return weights_.at(name); }

  at::Tensor norm(const at::Tensor& x, const std::string& name) const {
    return x / (x.square().mean(-1, true) + config_.rms_norm_eps).sqrt() * (weight(name + ".weight") + 1.0);
  }

  static at::Tensor loss(const at::Tensor& logits, const at::Tensor& labels) {
    return at::cross_entropy_loss(logits, labels, {}, at::Reduction::Sum, -100);
  }

  at::Tensor rotated(const at::Tensor& x, const LayerConfig& layer) const {  // [n, heads, D]
    const RotaryEmbedding rotary(layer.rotary_dim(config_.head_dim), layer.rope_theta, layer.rope_scaling);
    const auto tables = rotary.tables(at::arange(x.size(0), at::kLong).unsqueeze(0), x.device());
    const auto cos = tables.cos.squeeze(1).to(at::kDouble);
    const auto sin = tables.sin.squeeze(1).to(at::kDouble);
    const int64_t half = cos.size(-1);
    const auto a = x.narrow(-1, 0, half);
    const auto b = x.narrow(-1, half, half);
    return at::cat({a * cos - b * sin, b * cos + a * sin, x.narrow(-1, 2 * half, x.size(-1) - 2 * half)}, -1);
  }

  at::Tensor attention(const at::Tensor& x, const LayerConfig& layer, const std::string& name) const {
    const auto heads = [&](const char* part) {
      return at::linear(x, weight(name + "linear_qkv." + part + ".weight")).unflatten(-1, {-1, config_.head_dim});
    };
    const auto q = rotated(norm(heads("q_proj"), name + "q_norm"), layer);
    const int64_t share = layer.num_attention_heads / config_.num_query_groups;
    const auto k = rotated(norm(heads("k_proj"), name + "k_norm"), layer).repeat_interleave(share, 1);
    const auto v = heads("v_proj").repeat_interleave(share, 1);
    const auto position = at::arange(x.size(0), at::TensorOptions(at::kLong).device(x.device()));
    const auto distance = position.unsqueeze(1) - position.unsqueeze(0);
    auto hides = distance.lt(0);
    if (layer.sliding_window > 0) hides = hides.logical_or(distance.ge(layer.sliding_window));
    const auto scores = at::einsum("shd,thd->hst", {q, k}) / std::sqrt(static_cast<double>(config_.head_dim));
    const auto output = at::einsum("hst,thd->shd", {scores.masked_fill(hides, -INFINITY).softmax(-1), v});
    const auto gates = at::linear(x, weight(name + "linear_qkv.g_proj.weight")).sigmoid().unsqueeze(-1);
    return at::linear((output * gates).flatten(1), weight(name + "linear_proj.weight"));
  }

  at::Tensor feed_forward(const at::Tensor& x, double limit, const std::string& name) const {
    auto gate = at::silu(at::linear(x, weight(name + "linear_fc1.gate_proj.weight")));
    auto up = at::linear(x, weight(name + "linear_fc1.up_proj.weight"));
    if (limit > 0.0) {
      gate = gate.clamp_max(limit);
      up = up.clamp(-limit, limit);
    }
    return at::linear(gate * up, weight(name + "linear_fc2.weight"));
  }

  at::Tensor decoder_layer(const at::Tensor& x, const LayerConfig& layer, const std::string& name) const {
    const auto attended = x + attention(norm(x, name + "input_layernorm"), layer, name + "self_attention.");
    return attended + feed_forward(norm(attended, name + "pre_mlp_layernorm"), layer.swiglu_limit, name + "mlp.");
  }

  const TransformerConfig& config_;
  const Weights& weights_;
};

/// Token ids and labels [B, S] and how they are packed.
struct Batch {
  at::Tensor ids;
  at::Tensor labels;
  AttentionInput attention;
  std::vector<Range> ranges;  ///< sub-sequences of each batch row
};

Batch batch_of(const std::vector<int64_t>& lengths, int64_t B) {
  Batch batch;
  batch.ids = (at::arange(B * kSequence, at::kLong) * 11).remainder(kVocabulary).view({B, kSequence});
  batch.labels = (at::arange(B * kSequence, at::kLong) * 7 + 3).remainder(kVocabulary).view({B, kSequence});
  batch.labels.narrow(1, 6, 2).fill_(-100);
  std::vector<at::Tensor> positions;
  std::vector<int64_t> ends{0};
  for (const int64_t length : lengths) {
    positions.push_back(at::arange(length, at::kLong));
    batch.ranges.push_back({ends.back(), ends.back() + length});
    ends.push_back(ends.back() + length);
  }
  batch.attention.position_ids = at::cat(positions).unsqueeze(0);
  if (lengths.size() > 1) batch.attention.cu_seqlens = at::tensor(ends, at::kInt);
  return batch;
}

class MultiTokenPrediction : public TransformerTest {
 protected:
  void expect_like_reference(const Batch& batch, bool chain_after_norm) {
    const auto config = small_config(chain_after_norm);
    const auto weights = weights_of(config);
    std::pair<at::Tensor, at::Tensor> expected;
    const Reference reference(config, weights);
    const int64_t B = batch.ids.size(0);
    for (int64_t row = 0; row < B; ++row) {
      for (const auto& range : batch.ranges) {
        const auto part = [&](const at::Tensor& x) { return on_device(x[row].narrow(0, range.begin, range.length())); };
        const auto [main, mtp] = reference.losses(part(batch.ids), part(batch.labels));
        expected.first = expected.first.defined() ? expected.first + main : main;
        expected.second = expected.second.defined() ? expected.second + mtp : mtp;
      }
    }
    (expected.first + kScale * expected.second).backward();

    for (const int t : divisors_of_world()) {
      for (const auto& [sequence_parallel, loss_chunk] : {std::pair{false, 0}, {true, 0}, {false, 3}, {true, 5}}) {
        const auto what =
            c10::str("t = ", t, ", sequence_parallel ", sequence_parallel, ", loss_chunk ", loss_chunk, ": ");
        const auto& tp = groups(t).tp;
        const TransformerExecution execution{.sequence_parallel = sequence_parallel, .loss_chunk = loss_chunk};
        GPTModel model(config, execution, tp);
        const auto shards = start(model);
        model->to(at::kDouble);
        const auto decoder_input = model->embedding->forward(batch.ids, batch.attention.position_ids);
        at::Tensor mtp_input;
        const auto hidden =
            model->hidden_states({}, batch.attention, decoder_input, /*statistics=*/nullptr, &mtp_input);
        const auto main = linear_cross_entropy(hidden, model->output_layer->weight, batch.labels.t(),
                                               output_loss_options(config, execution), tp);
        const auto mtp = model->mtp->loss_sum(mtp_input, decoder_input, batch.attention, batch.labels, kScale);
        compare(main, expected.first, what + "loss", kExact);
        compare(mtp, expected.second, what + "mtp loss", kExact);
        (main + kScale * mtp).backward();
        for (const auto& shard : shards) {
          auto gradient = shard.parameter.grad();
          if (shard.domain == GradientDomain::kReplicatedPartial) gradient = parallel::all_reduce(gradient, tp);
          for (const auto& segment : shard.segments) {
            const auto& whole = weights.at(segment.name).grad();
            const auto wanted = whole.defined() ? whole : at::zeros_like(weights.at(segment.name));
            compare(segment.in_local(gradient), segment.in_global(wanted), what + segment.name, kExact);
          }
        }
      }
    }
  }
};

TEST_F(MultiTokenPrediction, IsItsFormulaInEverySubSequence) {
  for (const bool chain_after_norm : {false, true}) {
    expect_like_reference(batch_of({5, 1, 2, 8}, 1), chain_after_norm);
    expect_like_reference(batch_of({kSequence}, 2), chain_after_norm);
  }
}

// As many sub-sequences as positions: no layer has a target.
TEST_F(MultiTokenPrediction, HasNoLossWhereNothingFollows) {
  const auto batch = batch_of(std::vector<int64_t>(kSequence, 1), 1);
  for (const bool sequence_parallel : {false, true}) {
    GPTModel model(small_config(false), TransformerExecution{.sequence_parallel = sequence_parallel}, world_tp());
    const auto shards = start(model);
    const auto decoder_input = model->embedding->forward(batch.ids, batch.attention.position_ids);
    at::Tensor mtp_input;
    model->forward({}, batch.attention, decoder_input, /*statistics=*/nullptr, &mtp_input);
    const auto loss = model->mtp->loss_sum(mtp_input, decoder_input, batch.attention, batch.labels);
    EXPECT_EQ(loss.item<double>(), 0.0);
    loss.backward();
    for (const auto& shard : shards) {
      const auto& gradient = shard.parameter.grad();
      if (!shard.name.starts_with("mtp.")) continue;
      EXPECT_TRUE(gradient.defined() && gradient.abs().max().item<double>() == 0.0) << shard.name;
    }
  }
}

TEST_F(MultiTokenPrediction, RefusesWhatDoesNotFit) {
  const auto& tp = single();
  GPTModel model(small_config(false), TransformerExecution{}, tp);
  start(model);
  const auto batch = batch_of({kSequence}, 2);
  const auto hidden = normal_values({kSequence, 2, 24}, 1);
  const auto loss = [&](const at::Tensor& decoder_input, const at::Tensor& labels) {
    return [&, decoder_input, labels] { model->mtp->loss_sum(hidden, decoder_input, batch.attention, labels); };
  };
  EXPECT_TRUE(throws(loss(hidden.narrow(0, 0, 15), batch.labels), "are not alike [sequence, batch, hidden]"));
  EXPECT_TRUE(throws(loss(hidden, batch.labels.narrow(1, 0, 15)), "labels are [2, 15], wanted [2, 16]"));
}

}  // namespace
}  // namespace megatron_cpp
