// A stack of decoder layers and the norm at its end.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "megatron_cpp/transformer/attention.h"
#include "megatron_cpp/transformer/rms_norm.h"
#include "megatron_cpp/transformer/transformer_config.h"
#include "megatron_cpp/transformer/transformer_layer.h"
#include "parallel/shard.h"

namespace megatron_cpp {

/// final_layernorm(layer L-1(... layer 0(x))), one TransformerLayer per entry of config.layers, or a range of these
/// layers, as in one stage of a pipeline. Modules are named by the number of the layer in the model
/// ("layers.7.mlp..."), so that a parameter has the same name in whichever block it is.
class TransformerBlockImpl : public torch::nn::Module {
 public:
  /// @param range  the layers [begin, end) of config.layers; all unless given. The norm comes with the last layer.
  /// @throws c10::ValueError as TransformerConfig::validate(t) does, or if there are no such layers.
  TransformerBlockImpl(const TransformerConfig& config, const TransformerExecution& execution,
                       const ModelGroups& groups, std::optional<parallel::Range> range = std::nullopt);

  /// @param hidden_states  [S, B, H], equal on every rank; with sequence_parallel [S/t, B, H], this rank's rows.
  /// @param attention      of the whole sequence, equal on every rank.
  /// @param cache          null, or the positions before these, to which these attend and are appended. `attention` is
  ///                       of the new positions alone, whose position_ids go on where the cached ones end. New
  ///                       positions that sequence_parallel can't split get padding behind them, as a sub-sequence of
  ///                       its own: it is not kept. Without gradients only.
  /// @param statistics     null, or where the routing of the layers with experts is added.
  /// @return               the shape of hidden_states.
  /// Comm: that of the layers. Collective over tp. Throws c10::ValueError, before anything is sent, if hidden_states
  /// have not three dimensions, if the cache is another block's or gradients are on, if the padding mask of the
  /// statistics is not [B, S], and as AttentionBatch does.
  at::Tensor forward(const at::Tensor& hidden_states, const AttentionInput& attention, KeyValueCache* cache = nullptr,
                     RouterStatistics* statistics = nullptr);

  /// forward() without the norm at the end.
  at::Tensor forward_layers(const at::Tensor& hidden_states, const AttentionInput& attention,
                            KeyValueCache* cache = nullptr, RouterStatistics* statistics = nullptr);

  /// The AttentionBatch of these hidden states; forward() makes it once for all layers. Not collective.
  /// @throws c10::ValueError as forward does.
  AttentionBatch attention_batch(const at::Tensor& hidden_states, const AttentionInput& attention) const;

  /// The mixtures of experts of the layers that have one, in their order.
  std::vector<MoELayer> moe_layers() const;

  std::vector<TransformerLayer> layers;  ///< those of the range, in their order
  RMSNorm final_layernorm{nullptr};      ///< of the hidden states, [H]; none without the last layer

 private:
  std::vector<RotaryEmbedding> rotaries_;  ///< of each layer
  int64_t sequence_ranks_;                 ///< over which the sequence is split: t or 1
};
TORCH_MODULE(TransformerBlock);

}  // namespace megatron_cpp
