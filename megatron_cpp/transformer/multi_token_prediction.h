// Layers behind the decoder that predict tokens further ahead.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <vector>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "megatron_cpp/tensor_parallel/column_parallel_linear.h"
#include "megatron_cpp/transformer/rms_norm.h"
#include "megatron_cpp/transformer/transformer_config.h"
#include "megatron_cpp/transformer/transformer_layer.h"

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

/// Layer k of multi-token prediction: from the hidden states h_i and the embedding of token i+k+1 it predicts token
/// i+k+2:  h' = transformer_layer(eh_proj [enorm(embedding), hnorm(h)]);  logits = output_layer(final_layernorm(h')).
/// It has its own norm and output layer, as in the published Step3.7 checkpoint (vllm/model_executor/models/
/// step3p5_mtp.py), where h of layer 0 is the decoder's output before its final norm and h' goes on to the next layer.
class MultiTokenPredictionLayerImpl : public torch::nn::Module {
 public:
  /// @param layer_number  index into config.mtp_layers.
  /// @throws c10::ValueError as the parts' constructors do.
  MultiTokenPredictionLayerImpl(const TransformerConfig& config, int64_t layer_number,
                                const TransformerExecution& execution, const ModelGroups& groups);

  /// h'.
  /// @param hidden_states, embeddings  [S, B, H], equal on every rank; with sequence_parallel [S/t, B, H], this rank's
  ///                                   rows.
  /// @param attention                  of the whole sequence; made with transformer_layer->self_attention->rotary().
  /// Comm: that of TransformerLayer. Collective over tp.
  at::Tensor forward(const at::Tensor& hidden_states, const at::Tensor& embeddings, const AttentionBatch& attention);

  /// Logits [S, B, V'/t] of forward's result, as GPTModel's. Comm: that of its output layer. Collective over tp.
  at::Tensor logits(const at::Tensor& hidden_states);

  RMSNorm enorm{nullptr};                       ///< of the embedding, [H]
  RMSNorm hnorm{nullptr};                       ///< of the hidden states, [H]
  ReplicatedLinear eh_proj{nullptr};            ///< [H, 2H]
  TransformerLayer transformer_layer{nullptr};  ///< config.mtp_layers[layer_number]
  RMSNorm final_layernorm{nullptr};             ///< before the output layer, [H]
  ColumnParallelLinear output_layer{nullptr};   ///< [V'/t, H]
};
TORCH_MODULE(MultiTokenPredictionLayer);

}  // namespace megatron_cpp
