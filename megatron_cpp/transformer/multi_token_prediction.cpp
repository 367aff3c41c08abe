#include "megatron_cpp/transformer/multi_token_prediction.h"

#include <ATen/ATen.h>

namespace megatron_cpp {

ReplicatedLinearImpl::ReplicatedLinearImpl(int64_t in_features, int64_t out_features, double init_std,
                                           GradientDomain domain)
    : weight(register_parameter("weight", at::zeros({out_features, in_features}))),
      init_std_(init_std),
      domain_(domain) {}

at::Tensor ReplicatedLinearImpl::forward(const at::Tensor& input) { return at::linear(input, weight); }

std::vector<ParameterShard> ReplicatedLinearImpl::own_parameters() const {
  return {replicated_parameter("weight", weight, domain_, InitialValue::normal(init_std_), true)};
}

ColumnParallelLinear make_output_layer(const TransformerConfig& config, const TransformerExecution& execution,
                                       const parallel::GroupPtr& tp) {
  const auto options = ColumnParallelLinearOptions(config.hidden_size, config.vocabulary_size)
                           .pad_out_features(true)
                           .init_std(config.init_std);
  return ColumnParallelLinear(execution.apply_to(options), tp);
}

MultiTokenPredictionLayerImpl::MultiTokenPredictionLayerImpl(const TransformerConfig& config, int64_t layer_number,
                                                             const TransformerExecution& execution,
                                                             const ModelGroups& groups) {
  const auto domain = hidden_norm_domain(execution.sequence_parallel, groups.tp);
  const auto norm = [&](const char* name) {
    return register_module(name, RMSNorm(config.hidden_size, config.rms_norm_eps, domain));
  };
  enorm = norm("enorm");
  hnorm = norm("hnorm");
  eh_proj =
      register_module("eh_proj", ReplicatedLinear(2 * config.hidden_size, config.hidden_size, config.init_std, domain));
  auto layers = config;
  layers.layers = config.mtp_layers;
  transformer_layer = register_module("transformer_layer", TransformerLayer(layers, layer_number, execution, groups));
  final_layernorm = norm("final_layernorm");
  output_layer = register_module("output_layer", make_output_layer(config, execution, groups.tp));
}

at::Tensor MultiTokenPredictionLayerImpl::forward(const at::Tensor& hidden_states, const at::Tensor& embeddings,
                                                  const AttentionBatch& attention) {
  const auto both = at::cat({enorm->forward(embeddings), hnorm->forward(hidden_states)}, -1);
  return transformer_layer->forward(eh_proj->forward(both), attention);
}

at::Tensor MultiTokenPredictionLayerImpl::logits(const at::Tensor& hidden_states) {
  return output_layer->forward(final_layernorm->forward(hidden_states));
}

}  // namespace megatron_cpp
