// One decoder layer.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "megatron_cpp/transformer/attention.h"
#include "megatron_cpp/transformer/mlp.h"
#include "megatron_cpp/transformer/moe/moe_layer.h"
#include "megatron_cpp/transformer/rms_norm.h"
#include "megatron_cpp/transformer/transformer_config.h"
#include "parallel/group.h"

namespace megatron_cpp {

/// h = x + self_attention(input_layernorm(x));  y = h + feed_forward(pre_mlp_layernorm(h)).
class TransformerLayerImpl : public torch::nn::Module {
 public:
  /// @param layer_number  index into config.layers.
  /// @throws c10::ValueError as the parts' constructors do.
  TransformerLayerImpl(const TransformerConfig& config, int64_t layer_number, const TransformerExecution& execution,
                       const ModelGroups& groups);

  /// @param hidden_states  [S, B, H], equal on every rank; with sequence_parallel [S/t, B, H], this rank's rows.
  /// @param attention      of the whole sequence, equal on every rank; made with self_attention->rotary().
  /// @param cache          null, or this layer's, as SelfAttention takes it.
  /// @param statistics     null, or where the routing is added if the layer has experts.
  /// @return               the shape of hidden_states.
  /// Comm: that of SelfAttention and MLP or MoELayer; a recomputed layer's forward pass once more in the backward pass,
  /// without TokenDispatcher's constructor. Collective over tp, and with experts over ep and etp.
  at::Tensor forward(const at::Tensor& hidden_states, const AttentionBatch& attention,
                     KeyValueCache::Layer* cache = nullptr, RouterStatistics* statistics = nullptr);

  RMSNorm input_layernorm{nullptr};       ///< before the attention, [H]
  SelfAttention self_attention{nullptr};  ///< split by heads
  RMSNorm pre_mlp_layernorm{nullptr};     ///< before the feed-forward, [H]
  MLP mlp{nullptr};                       ///< the feed-forward, split by F; null if the layer has experts
  MoELayer moe{nullptr};                  ///< the mixture of experts; null if the layer has none

 private:
  /// What a later pass over the same input may not decide again.
  struct FirstPass;

  at::Tensor compute(const at::Tensor& hidden_states, const AttentionBatch& attention, KeyValueCache::Layer* cache,
                     RouterStatistics* statistics, std::optional<TokenDispatcher>* dispatcher);
  /// The same, kept by its input alone.
  at::Tensor compute_twice(const at::Tensor& hidden_states, const AttentionBatch& attention,
                           RouterStatistics* statistics);
  /// What follows the second norm, and after it whatever else gradients come back through. The one place that knows
  /// which kind of feed-forward a layer has.
  std::vector<at::Tensor> feed_forward(const at::Tensor& normed, RouterStatistics* statistics,
                                       std::optional<TokenDispatcher>* dispatcher);

  bool is_recomputed_;
  bool recomputes_norms_;
};
TORCH_MODULE(TransformerLayer);

}  // namespace megatron_cpp
