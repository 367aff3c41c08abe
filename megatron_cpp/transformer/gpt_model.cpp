#include "megatron_cpp/transformer/gpt_model.h"

namespace megatron_cpp {

GPTModelImpl::GPTModelImpl(const TransformerConfig& config, const TransformerExecution& execution,
                           const ModelGroups& groups)
    : mtp_chain_after_norm_(config.mtp_chain_after_norm) {
  const auto& tp = groups.tp;
  config.validate(tp->getSize());
  const auto embedding_options = ParallelEmbeddingOptions(config.vocabulary_size, config.hidden_size)
                                     .init_std(config.init_std)
                                     .padding_idx(config.embedding_padding_idx);
  embedding = register_module(
      "embedding", LanguageModelEmbedding(execution.apply_to(embedding_options), tp, execution.embedding_sharding));
  decoder = register_module("decoder", TransformerBlock(config, execution, groups));
  output_layer = register_module("output_layer", make_output_layer(config, execution, tp));
  if (!config.mtp_layers.empty()) {
    mtp = register_module("mtp", MultiTokenPredictionBlock(config, execution, groups));
  }
}

at::Tensor GPTModelImpl::forward(const at::Tensor& input_ids, const AttentionInput& attention,
                                 const at::Tensor& decoder_input, RouterStatistics* statistics, at::Tensor* mtp_input) {
  return output_layer->forward(hidden_states(input_ids, attention, decoder_input, statistics, mtp_input));
}

at::Tensor GPTModelImpl::hidden_states(const at::Tensor& input_ids, const AttentionInput& attention,
                                       const at::Tensor& decoder_input, RouterStatistics* statistics,
                                       at::Tensor* mtp_input) {
  const auto embeddings =
      decoder_input.defined() ? decoder_input : embedding->forward(input_ids, attention.position_ids);
  const auto hidden = decoder->forward_layers(embeddings, attention, /*cache=*/nullptr, statistics);
  const auto normed = decoder->final_layernorm->forward(hidden);
  if (mtp_input != nullptr) *mtp_input = mtp_chain_after_norm_ ? normed : hidden;
  return normed;
}

}  // namespace megatron_cpp
