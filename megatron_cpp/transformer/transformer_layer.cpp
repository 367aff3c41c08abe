#include "megatron_cpp/transformer/transformer_layer.h"

#include <ATen/ATen.h>

namespace megatron_cpp {

TransformerLayerImpl::TransformerLayerImpl(const TransformerConfig& config, int64_t layer_number,
                                           const TransformerExecution& execution, const ModelGroups& groups) {
  const auto& tp = groups.tp;
  const auto& layer = config.layers.at(static_cast<size_t>(layer_number));
  const auto norm = [&] {
    return RMSNorm(config.hidden_size, config.rms_norm_eps, hidden_norm_domain(execution.sequence_parallel, tp));
  };
  input_layernorm = register_module("input_layernorm", norm());
  self_attention = register_module("self_attention", SelfAttention(config, layer, execution, tp));
  pre_mlp_layernorm = register_module("pre_mlp_layernorm", norm());
  if (layer.has_experts) {
    moe = register_module("moe", MoELayer(config, layer, execution, groups));
  } else {
    mlp = register_module("mlp", MLP(config, config.ffn_hidden_size, layer.swiglu_limit, execution, tp));
  }
}

at::Tensor TransformerLayerImpl::feed_forward(const at::Tensor& normed, RouterStatistics* statistics) {
  return moe ? moe->forward(normed, statistics) : mlp->forward(normed);
}

at::Tensor TransformerLayerImpl::forward(const at::Tensor& hidden_states, const AttentionBatch& attention,
                                         KeyValueCache::Layer* cache, RouterStatistics* statistics) {
  const auto attended =
      hidden_states + self_attention->forward(input_layernorm->forward(hidden_states), attention, cache);
  return attended + feed_forward(pre_mlp_layernorm->forward(attended), statistics);
}

}  // namespace megatron_cpp
