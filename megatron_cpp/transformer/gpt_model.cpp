#include "megatron_cpp/transformer/gpt_model.h"

#include <memory>
#include <string>

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
  output_layer = register_module("output_layer", make_output_layer(config, execution, tp));
  if (config.mtp_layers.empty()) return;
  const auto mtp = register_module("mtp", std::make_shared<torch::nn::Module>());
  const auto by_number = mtp->register_module("layers", std::make_shared<torch::nn::Module>());
  for (size_t number = 0; number < config.mtp_layers.size(); ++number) {
    const auto layer = static_cast<int64_t>(number);
    mtp_layers.emplace_back(config, layer, execution, groups);
    by_number->register_module(std::to_string(config.num_layers() + layer), mtp_layers.back());
  }
}

at::Tensor GPTModelImpl::forward(const at::Tensor& input_ids, const AttentionInput& attention,
                                 const at::Tensor& decoder_input) {
  const auto embeddings =
      decoder_input.defined() ? decoder_input : embedding->forward(input_ids, attention.position_ids);
  return output_layer->forward(decoder->forward(embeddings, attention));
}

}  // namespace megatron_cpp
