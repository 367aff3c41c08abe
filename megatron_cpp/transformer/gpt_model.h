// A decoder-only language model: embedding, decoder, output layer.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include "megatron_cpp/tensor_parallel/column_parallel_linear.h"
#include "megatron_cpp/tensor_parallel/language_model_embedding.h"
#include "megatron_cpp/transformer/attention.h"
#include "megatron_cpp/transformer/multi_token_prediction.h"
#include "megatron_cpp/transformer/transformer_block.h"
#include "megatron_cpp/transformer/transformer_config.h"

namespace megatron_cpp {

/// output_layer(decoder(embedding(ids))); the embedding and the output layer share no weight.
class GPTModelImpl : public torch::nn::Module {
 public:
  /// @throws c10::ValueError as TransformerConfig::validate(t) does.
  GPTModelImpl(const TransformerConfig& config, const TransformerExecution& execution, const ModelGroups& groups);

  /// @param input_ids      [B, S] int64, equal on every rank; not read when decoder_input is given.
  /// @param attention      of the whole sequence, equal on every rank.
  /// @param decoder_input  undefined, or embeddings computed elsewhere: [S, B, H], equal on every rank; with
  ///                       sequence_parallel [S/t, B, H], this rank's rows.
  /// @param statistics     null, or where the decoder's routing is added, as TransformerBlock takes it.
  /// @param mtp_input      null, or gets the hidden states that `mtp` goes on from, of that shape.
  /// @return               logits [S, B, V'/t], V' = padded_vocabulary_size(V, t): rank r's columns
  ///                       [r·V'/t, (r+1)·V'/t) of the vocabulary, for every position of the sequence. Columns beyond V
  ///                       are padding: they are 0, and must get no gradient.
  /// Comm: embedding: see ParallelEmbedding::reduce; decoder: see TransformerLayer; output layer: backward 1 all-reduce
  /// of S·B·H elements; sequence_parallel: forward 1 all-gather, backward 1 all-gather and 1 reduce-scatter. Collective
  /// over tp. Throws c10::ValueError if shapes don't fit.
  at::Tensor forward(const at::Tensor& input_ids, const AttentionInput& attention, const at::Tensor& decoder_input = {},
                     RouterStatistics* statistics = nullptr, at::Tensor* mtp_input = nullptr);

  /// forward without the output layer: its input, [S, B, H], or with sequence_parallel [S/t, B, H], for
  /// linear_cross_entropy.
  at::Tensor hidden_states(const at::Tensor& input_ids, const AttentionInput& attention,
                           const at::Tensor& decoder_input = {}, RouterStatistics* statistics = nullptr,
                           at::Tensor* mtp_input = nullptr);

  LanguageModelEmbedding embedding{nullptr};   ///< may be borrowed: an image insert shares it
  TransformerBlock decoder{nullptr};           ///< all layers and the norm at their end
  ColumnParallelLinear output_layer{nullptr};  ///< [V'/t, H]
  MultiTokenPredictionBlock mtp{nullptr};      ///< config.mtp_layers; null without; forward() doesn't use it

 private:
  bool mtp_chain_after_norm_;
};
TORCH_MODULE(GPTModel);

}  // namespace megatron_cpp
