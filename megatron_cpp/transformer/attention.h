// Grouped-query self-attention with a gate per head: full or sliding window, over packed sequences.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <vector>

#include "megatron_cpp/tensor_parallel/column_parallel_linear.h"
#include "megatron_cpp/tensor_parallel/row_parallel_linear.h"
#include "megatron_cpp/transformer/attention_batch.h"
#include "megatron_cpp/transformer/execution.h"
#include "megatron_cpp/transformer/rms_norm.h"
#include "megatron_cpp/transformer/rotary_embedding.h"
#include "megatron_cpp/transformer/transformer_config.h"
#include "parallel/group.h"

namespace megatron_cpp {

/// Keys and values of the positions that a decoder has seen, so that tokens are generated without computing these
/// again. Empty at first; each forward pass of a TransformerBlock appends its positions. A rank has those of its own
/// heads.
struct KeyValueCache {
  /// Of one layer: [positions, B, groups/t, D], after the rotary embedding. A sliding-window layer keeps the last W - 1
  /// positions only, which are all that later ones attend to.
  struct Layer {
    at::Tensor keys;    ///< undefined before the first pass
    at::Tensor values;  ///< like keys
  };
  std::vector<Layer> layers;  ///< in the order of the block's layers
};

/// softmax(q kᵀ / sqrt(D)) v, causal, within each sub-sequence. With `sliding_window` W > 0 position i attends to j
/// with i - W < j <= i: W positions in all, itself included.
///
/// Query head n uses key/value head n / (heads / groups). float32, and everything on the CPU, goes through
/// at::scaled_dot_product_attention, one call per sub-sequence; if the window is shorter than the sub-sequence, one
/// call per block of max(W, 128) queries with the keys that these attend to, so that the cost is the sub-sequence's
/// length times W. Masks are at most [block, block + W - 1]. float16 and bfloat16 on CUDA take one variable-length
/// flash-attention call, if D is a multiple of 8 and at most 256; that path has been compiled but not run yet.
/// @param q         [S, B, heads, D]
/// @param k         [S, B, groups, D], groups a divisor of heads
/// @param v         like k
/// @param sub_sequences  of S positions and B batch rows, for the device of q
/// @return          [S, B, heads, D]. No communication.
at::Tensor core_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const SubSequences& sub_sequences, int64_t sliding_window);

/// o_proj(sigmoid(g) * attention(rotary(q_norm(q)), rotary(k_norm(k)), v)), [q k v g] = linear_qkv(x), split by heads
/// over `tp`: of `heads` query heads and `groups` key/value heads rank r of t has [r·heads/t, (r+1)·heads/t) and
/// [r·groups/t, (r+1)·groups/t).
class SelfAttentionImpl : public torch::nn::Module {
 public:
  /// @throws c10::ValueError if layer.num_attention_heads or config.num_query_groups is not divisible by t, or
  ///         the heads by the groups.
  SelfAttentionImpl(const TransformerConfig& config, const LayerConfig& layer, const TransformerExecution& execution,
                    const parallel::GroupPtr& tp);

  /// @param input      [S, B, H], equal on every rank; with sequence_parallel [S/t, B, H], this rank's rows.
  /// @param attention  of the whole sequence, equal on every rank; made with rotary().
  /// @param cache      null, or this layer's: the first sub-sequence goes on where the cached positions end, attends to
  ///                   them and is appended. Sub-sequences behind it are padding: they are not kept, and get any
  ///                   values.
  /// @return           the shape of `input`.
  /// Comm: forward 1 all-reduce of S·B·H elements, backward 1; sequence_parallel: forward 1 all-gather and 1
  /// reduce-scatter, backward 2 all-gathers (1 if linear_qkv needs no gradient) and 1 reduce-scatter. Collective over
  /// tp. Throws c10::ValueError, before anything is sent, if the input is not [.., .., H] or `attention` is of other
  /// sizes or without rotary().
  at::Tensor forward(const at::Tensor& input, const AttentionBatch& attention, KeyValueCache::Layer* cache = nullptr);

  /// The rotary embedding of q and k.
  const RotaryEmbedding& rotary() const { return rotary_; }

  ColumnParallelLinear linear_qkv{nullptr};  ///< q_proj [heads·D, H], k_proj, v_proj [groups·D, H], g_proj [heads, H]
  RMSNorm q_norm{nullptr};                   ///< [D], over each head; a rank's gradient is the part of its own heads:
                                             ///< kReplicatedPartial; null without TransformerConfig::qk_layernorm
  RMSNorm k_norm{nullptr};                   ///< like q_norm, over the key heads
  RowParallelLinear linear_proj{nullptr};    ///< o_proj [H, heads·D]

 private:
  int64_t num_heads_;   ///< of this rank
  int64_t num_groups_;  ///< of this rank
  int64_t head_dim_;
  int64_t sliding_window_;
  bool sequence_parallel_;
  bool recomputes_core_;
  RotaryEmbedding rotary_;
  parallel::GroupPtr tp_;
};
TORCH_MODULE(SelfAttention);

}  // namespace megatron_cpp
