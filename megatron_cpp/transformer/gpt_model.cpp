#include "megatron_cpp/transformer/gpt_model.h"

namespace megatron_cpp {

GPTModelImpl::GPTModelImpl(const TransformerConfig& config, const TransformerExecution& execution,
                           const ModelGroups& groups) {
  const auto& tp = groups.tp;
  config.validate(tp->getSize());
  const auto embedding_options = ParallelEmbeddingOptions(config.vocabulary_size, config.hidden_size)
                                     .init_std(config.init_std)
                                     .padding_idx(config.embedding_padding_idx);
  embedding = register_module(
      "embedding", LanguageModelEmbedding(execution.apply_to(embedding_options), tp, execution.embedding_sharding));
  decoder = register_module("decoder", TransformerBlock(config, execution, groups));
  const auto output_options = ColumnParallelLinearOptions(config.hidden_size, config.vocabulary_size)
                                  .pad_out_features(true)
                                  .init_std(config.init_std);
  output_layer = register_module("output_layer", ColumnParallelLinear(execution.apply_to(output_options), tp));
}

at::Tensor GPTModelImpl::forward(const at::Tensor& input_ids, const AttentionInput& attention,
                                 const at::Tensor& decoder_input) {
  const auto embeddings =
      decoder_input.defined() ? decoder_input : embedding->forward(input_ids, attention.position_ids);
  return output_layer->forward(decoder->forward(embeddings, attention));
}

}  // namespace megatron_cpp
