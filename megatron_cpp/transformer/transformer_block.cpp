#include "megatron_cpp/transformer/transformer_block.h"

#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include <memory>
#include <string>

namespace megatron_cpp {

TransformerBlockImpl::TransformerBlockImpl(const TransformerConfig& config, const TransformerExecution& execution,
                                           const ModelGroups& groups, std::optional<parallel::Range> range)
    : sequence_ranks_(execution.sequence_parallel ? groups.tp->getSize() : 1) {
  config.validate(groups.tp->getSize());
  const auto own = range.value_or(parallel::Range{0, config.num_layers()});
  TORCH_CHECK_VALUE(own.begin >= 0 && own.begin <= own.end && own.end <= config.num_layers(), "layers [", own.begin,
                    ", ", own.end, ") of a decoder with ", config.num_layers());
  const auto by_number = register_module("layers", std::make_shared<torch::nn::Module>());
  for (int64_t number = own.begin; number < own.end; ++number) {
    layers.emplace_back(
        by_number->register_module(std::to_string(number), TransformerLayer(config, number, execution, groups)));
    rotaries_.push_back(layers.back()->self_attention->rotary());
  }
  if (own.end == config.num_layers()) {
    const auto domain = hidden_norm_domain(execution.sequence_parallel, groups.tp);
    final_layernorm = register_module("final_layernorm", RMSNorm(config.hidden_size, config.rms_norm_eps, domain));
  }
}

at::Tensor TransformerBlockImpl::forward(const at::Tensor& hidden_states, const AttentionInput& attention,
                                         KeyValueCache* cache, RouterStatistics* statistics) {
  const auto hidden = forward_layers(hidden_states, attention, cache, statistics);
  return final_layernorm ? final_layernorm->forward(hidden) : hidden;
}

at::Tensor TransformerBlockImpl::forward_layers(const at::Tensor& hidden_states, const AttentionInput& attention,
                                                KeyValueCache* cache, RouterStatistics* statistics) {
  const auto batch = attention_batch(hidden_states, attention);
  if (statistics != nullptr && statistics->padding_mask().defined()) {
    const auto shape = statistics->padding_mask().sizes();
    TORCH_CHECK_VALUE(shape == at::IntArrayRef({batch.batch_size(), batch.sequence_length()}),
                      "TransformerBlock: the padding mask is ", shape, ", the batch [", batch.batch_size(), ", ",
                      batch.sequence_length(), "]");
  }
  if (cache != nullptr) {
    TORCH_CHECK_VALUE(!c10::GradMode::is_enabled(), "TransformerBlock: a KeyValueCache goes without gradients");
    if (cache->layers.empty()) cache->layers.resize(layers.size());
    TORCH_CHECK_VALUE(cache->layers.size() == layers.size(), "TransformerBlock: the KeyValueCache is of ",
                      cache->layers.size(), " layers, the block of ", layers.size());
  }
  auto hidden = hidden_states;
  for (size_t i = 0; i < layers.size(); ++i) {
    hidden = layers[i]->forward(hidden, batch, cache == nullptr ? nullptr : &cache->layers[i], statistics);
  }
  return hidden;
}

std::vector<MoELayer> TransformerBlockImpl::moe_layers() const {
  std::vector<MoELayer> result;
  for (const auto& layer : layers) {
    if (layer->moe) result.push_back(layer->moe);
  }
  return result;
}

AttentionBatch TransformerBlockImpl::attention_batch(const at::Tensor& hidden_states,
                                                     const AttentionInput& attention) const {
  TORCH_CHECK_VALUE(hidden_states.dim() == 3, "TransformerBlock: hidden states ", hidden_states.sizes(),
                    " are not [sequence, batch, hidden]");
  return {attention, hidden_states.size(0) * sequence_ranks_, hidden_states.size(1), rotaries_, hidden_states.device()};
}

}  // namespace megatron_cpp
