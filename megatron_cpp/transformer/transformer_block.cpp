#include "megatron_cpp/transformer/transformer_block.h"

#include <c10/util/Exception.h>

#include "megatron_cpp/transformer/transformer_layer.h"

namespace megatron {

TransformerBlockImpl::TransformerBlockImpl(const TransformerConfig& config, const parallel::GroupPtr& tp)
    : sequence_ranks_(config.sequence_parallel ? tp->getSize() : 1) {
  config.validate(tp->getSize());
  layers = register_module("layers", torch::nn::ModuleList());
  for (int64_t number = 0; number < config.num_layers(); ++number) {
    TransformerLayer layer(config, number, tp);
    rotaries_.push_back(layer->self_attention->rotary());
    layers->push_back(layer);
  }
  final_layernorm = register_module("final_layernorm", RMSNorm(config.hidden_size, config.rms_norm_eps,
                                                               hidden_norm_domain(config.sequence_parallel, tp)));
}

at::Tensor TransformerBlockImpl::forward(const at::Tensor& hidden_states, const AttentionInput& attention) {
  const auto batch = attention_batch(hidden_states, attention);
  auto hidden = hidden_states;
  for (const auto& layer : *layers) hidden = layer->as<TransformerLayer>()->forward(hidden, batch);
  return final_layernorm->forward(hidden);
}

AttentionBatch TransformerBlockImpl::attention_batch(const at::Tensor& hidden_states,
                                                     const AttentionInput& attention) const {
  TORCH_CHECK_VALUE(hidden_states.dim() == 3, "TransformerBlock: hidden states ", hidden_states.sizes(),
                    " are not [sequence, batch, hidden]");
  return {attention, hidden_states.size(0) * sequence_ranks_, hidden_states.size(1), rotaries_, hidden_states.device()};
}

}  // namespace megatron
