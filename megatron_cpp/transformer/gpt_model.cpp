#include "megatron_cpp/transformer/gpt_model.h"

namespace megatron {
namespace {

LanguageModelEmbedding make_embedding(const TransformerConfig& config, const parallel::GroupPtr& tp) {
  return LanguageModelEmbedding(ParallelEmbeddingOptions(config.vocabulary_size, config.hidden_size)
                                    .sequence_parallel(config.sequence_parallel)
                                    .accumulate_into_grad(config.accumulate_into_grad)
                                    .init_std(config.init_std),
                                tp, config.embedding_sharding);
}

}  // namespace

GPTModelImpl::GPTModelImpl(const TransformerConfig& config, const parallel::GroupPtr& tp) {
  config.validate(tp->getSize());
  embedding = register_module("embedding", make_embedding(config, tp));
  decoder = register_module("decoder", TransformerBlock(config, tp));
  const auto output_options = ColumnParallelLinearOptions(config.hidden_size, config.vocabulary_size)
                                  .pad_out_features(true)
                                  .sequence_parallel(config.sequence_parallel)
                                  .accumulate_into_grad(config.accumulate_into_grad)
                                  .init_std(config.init_std);
  output_layer = register_module("output_layer", ColumnParallelLinear(output_options, tp));
}

at::Tensor GPTModelImpl::forward(const at::Tensor& input_ids, const AttentionInput& attention,
                                 const at::Tensor& decoder_input) {
  const auto embeddings =
      decoder_input.defined() ? decoder_input : embedding->forward(input_ids, attention.position_ids);
  return output_layer->forward(decoder->forward(embeddings, attention));
}

}  // namespace megatron
