// Layers behind the decoder that predict tokens further ahead.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <vector>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "megatron_cpp/tensor_parallel/column_parallel_linear.h"
#include "megatron_cpp/tensor_parallel/linear_cross_entropy.h"
#include "megatron_cpp/transformer/attention_batch.h"
#include "megatron_cpp/transformer/execution.h"
#include "megatron_cpp/transformer/rms_norm.h"
#include "megatron_cpp/transformer/rotary_embedding.h"
#include "megatron_cpp/transformer/transformer_config.h"
#include "megatron_cpp/transformer/transformer_layer.h"
#include "parallel/group.h"

namespace megatron_cpp {

/// A linear map of [enorm(embedding), hnorm(hidden)], whole on every rank: under sequence parallelism each rank maps
/// its own rows, so that nothing is sent.
class ReplicatedLinearImpl : public ParallelModule {
 public:
  /// A weight [out_features, in_features]; see hidden_norm_domain for `domain`.
  ReplicatedLinearImpl(int64_t in_features, int64_t out_features, double init_std, GradientDomain domain);

  /// [.., in_features] -> [.., out_features]. No communication.
  at::Tensor forward(const at::Tensor& input);

  std::vector<ParameterShard> own_parameters() const override;

  at::Tensor weight;  ///< [out_features, in_features]

 private:
  double init_std_;
  GradientDomain domain_;
};
TORCH_MODULE(ReplicatedLinear);

/// The output layer of a decoder: a ColumnParallelLinear [V', H] with a padded vocabulary.
ColumnParallelLinear make_output_layer(const TransformerConfig& config, const TransformerExecution& execution,
                                       const parallel::GroupPtr& tp);

/// What linear_cross_entropy needs beside such a layer's weight.
LinearCrossEntropyOptions output_loss_options(const TransformerConfig& config, const TransformerExecution& execution);

/// linear_cross_entropy of such a layer, with its weight once that may be read (ParallelModule::use_parameters).
at::Tensor output_loss_sum(const ColumnParallelLinear& output_layer, const at::Tensor& input, const at::Tensor& target,
                           const LinearCrossEntropyOptions& options, const parallel::GroupPtr& tp,
                           double loss_gradient);

/// Layer k of multi-token prediction: from the hidden states h_i and the embedding of token i+k+1 it predicts token
/// i+k+2:  h' = transformer_layer(eh_proj [enorm(embedding), hnorm(h)]);  logits = output_layer(final_layernorm(h')).
/// It has its own norm and output layer, as in the published Step3.7 checkpoint (vllm/model_executor/models/
/// step3p5_mtp.py).
class MultiTokenPredictionLayerImpl : public torch::nn::Module {
 public:
  /// @param layer_number  index into config.mtp_layers.
  /// @throws c10::ValueError as the parts' constructors do.
  MultiTokenPredictionLayerImpl(const TransformerConfig& config, int64_t layer_number,
                                const TransformerExecution& execution, const ModelGroups& groups);

  /// h', from which `final_layernorm` and `output_layer` make logits [S, B, V'/t], as GPTModel's.
  /// @param hidden_states, embeddings  [S, B, H], equal on every rank; with sequence_parallel [S/t, B, H], this rank's
  ///                                   rows.
  /// @param attention                  of the whole sequence; made with transformer_layer->self_attention->rotary().
  /// Comm: that of TransformerLayer. Collective over tp.
  at::Tensor forward(const at::Tensor& hidden_states, const at::Tensor& embeddings, const AttentionBatch& attention);

  RMSNorm enorm{nullptr};                       ///< of the embedding, [H]
  RMSNorm hnorm{nullptr};                       ///< of the hidden states, [H]
  ReplicatedLinear eh_proj{nullptr};            ///< [H, 2H]
  TransformerLayer transformer_layer{nullptr};  ///< config.mtp_layers[layer_number]
  RMSNorm final_layernorm{nullptr};             ///< before the output layer, [H]
  ColumnParallelLinear output_layer{nullptr};   ///< [V'/t, H]
};
TORCH_MODULE(MultiTokenPredictionLayer);

/// The layers of config.mtp_layers, one behind the other, and their loss. As modules they have the numbers that follow
/// the decoder's layers ("layers.45").
///
/// Layer 0 goes on from the decoder's output before its final norm, layer k > 0 from h' of layer k-1; with
/// TransformerConfig::mtp_chain_after_norm from the decoder's normed output and from final_layernorm(h').
class MultiTokenPredictionBlockImpl : public torch::nn::Module {
 public:
  /// @throws c10::ValueError as the parts' constructors do.
  MultiTokenPredictionBlockImpl(const TransformerConfig& config, const TransformerExecution& execution,
                                const ModelGroups& groups);

  /// The token losses of all layers, summed over positions and layers: a float32 scalar (float64 for such weights),
  /// equal on every rank.
  ///
  /// Embeddings and labels move by one position from layer to layer, within each sub-sequence. Its last positions lack
  /// what they would need from behind its end: their embedding is 0, their label -100. No loss depends on these zeros:
  /// where a position has a loss, it and all before it in its sub-sequence have an embedding, and attention goes
  /// backwards, within the sub-sequence.
  /// @param hidden_states  GPTModel::forward's mtp_input: [S, B, H], with sequence_parallel [S/t, B, H].
  /// @param decoder_input  that of the decoder, with whatever was inserted into it; the same shape.
  /// @param labels         [B, S] int64 on the CPU, equal on every rank: the next token at each position, -100 for
  ///                       none.
  /// @param loss_gradient  what the result's gradient will be: read with TransformerExecution::loss_chunk, see
  ///                       linear_cross_entropy.
  /// Comm: per layer that of MultiTokenPredictionLayer and of linear_cross_entropy; with sequence_parallel one row of
  /// the embeddings, forward and backward. Collective over tp. Throws c10::ValueError if shapes don't fit.
  at::Tensor loss_sum(const at::Tensor& hidden_states, const at::Tensor& decoder_input, const AttentionInput& attention,
                      const at::Tensor& labels, double loss_gradient = 1.0);

  std::vector<MultiTokenPredictionLayer> layers;  ///< in the order of config.mtp_layers

 private:
  std::vector<RotaryEmbedding> rotaries_;  ///< of each layer
  LinearCrossEntropyOptions loss_options_;
  bool chain_after_norm_;
  bool sequence_parallel_;
  parallel::GroupPtr tp_;
};
TORCH_MODULE(MultiTokenPredictionBlock);

}  // namespace megatron_cpp
