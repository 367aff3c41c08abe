#include "megatron_cpp/transformer/transformer_block.h"

#include "megatron_cpp/transformer/transformer_layer.h"

namespace megatron {

TransformerBlockImpl::TransformerBlockImpl(const TransformerConfig& config, const parallel::GroupPtr& tp) {
  config.validate(tp->getSize());
  layers = register_module("layers", torch::nn::ModuleList());
  for (int64_t number = 0; number < config.num_layers(); ++number) {
    layers->push_back(TransformerLayer(config, number, tp));
  }
  final_layernorm = register_module("final_layernorm", RMSNorm(config.hidden_size, config.rms_norm_eps,
                                                               hidden_norm_rule(config.sequence_parallel, tp)));
}

at::Tensor TransformerBlockImpl::forward(const at::Tensor& hidden_states, const AttentionInput& attention) {
  auto hidden = hidden_states;
  for (const auto& layer : *layers) hidden = layer->as<TransformerLayer>()->forward(hidden, attention);
  return final_layernorm->forward(hidden);
}

}  // namespace megatron
