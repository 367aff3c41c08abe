#include "megatron_cpp/transformer/transformer_layer.h"

#include <ATen/ATen.h>

#include <memory>
#include <vector>

#include "megatron_cpp/transformer/recompute.h"
#include "parallel/named_range.h"

namespace megatron_cpp {

TransformerLayerImpl::TransformerLayerImpl(const TransformerConfig& config, int64_t layer_number,
                                           const TransformerExecution& execution, const ModelGroups& groups)
    : is_recomputed_(execution.recomputed.layers), recomputes_norms_(execution.recomputed.norms) {
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

std::vector<at::Tensor> TransformerLayerImpl::feed_forward(const at::Tensor& normed, RouterStatistics* statistics,
                                                           std::optional<TokenDispatcher>* dispatcher) {
  const parallel::NamedRange range(moe ? "moe" : "mlp");
  if (!moe) return {mlp->forward(normed)};
  const auto output = moe->forward(normed, statistics, dispatcher);
  if (statistics == nullptr) return {output};
  return {output, statistics->layers().back().sums};
}

at::Tensor TransformerLayerImpl::compute(const at::Tensor& hidden_states, const AttentionBatch& attention,
                                         KeyValueCache::Layer* cache, RouterStatistics* statistics,
                                         std::optional<TokenDispatcher>* dispatcher) {
  // The layer's two gradients of its input are added to each other first, and then to those of other uses: the same
  // order whether the layer is recomputed or not.
  const auto input = at::alias(hidden_states);
  const auto behind = [&](const RMSNorm& norm, const at::Tensor& x, const auto& consume) {
    const auto produce = [norm = norm.ptr()](const at::Tensor& again) {
      const parallel::NamedRange range("norm");
      return norm->forward(again);
    };
    return (recomputes_norms_ ? recompute_between(produce, x, consume) : consume(produce(x)))[0];
  };
  const auto attended = input + behind(input_layernorm, input, [&](const at::Tensor& normed) {
                          const parallel::NamedRange range("self attention");
                          return std::vector{self_attention->forward(normed, attention, cache)};
                        });
  return attended + behind(pre_mlp_layernorm, attended,
                           [&](const at::Tensor& normed) { return feed_forward(normed, statistics, dispatcher); });
}

struct TransformerLayerImpl::FirstPass {
  std::optional<TokenDispatcher> dispatcher;
  at::Tensor tokens_per_expert;  ///< is counted once
};

at::Tensor TransformerLayerImpl::compute_twice(const at::Tensor& hidden_states, const AttentionBatch& attention,
                                               RouterStatistics* statistics) {
  const bool counts = moe && statistics != nullptr;
  const auto mask = counts ? statistics->padding_mask() : at::Tensor();
  const auto first = std::make_shared<FirstPass>();
  const auto body = [this, self = shared_from_this(), attention, counts, mask, first](const auto& inputs) {
    RouterStatistics own(mask);
    std::vector outputs{compute(inputs[0], attention, nullptr, counts ? &own : nullptr, &first->dispatcher)};
    if (!counts) return outputs;
    // The sums have gradients, so that those of the router's losses come back into this pass.
    const auto& layer = own.layers().front();
    first->tokens_per_expert = layer.tokens_per_expert;
    if (layer.sums.defined()) outputs.push_back(layer.sums);
    return outputs;
  };
  const auto outputs = recompute(body, {hidden_states}, parameters());
  if (counts) statistics->add({first->tokens_per_expert, outputs.size() > 1 ? outputs[1] : at::Tensor()});
  return outputs[0];
}

at::Tensor TransformerLayerImpl::forward(const at::Tensor& hidden_states, const AttentionBatch& attention,
                                         KeyValueCache::Layer* cache, RouterStatistics* statistics) {
  const parallel::NamedRange range("layer");
  // A cache goes without gradients, and without them there is nothing to keep.
  return is_recomputed_ && cache == nullptr ? compute_twice(hidden_states, attention, statistics)
                                            : compute(hidden_states, attention, cache, statistics, nullptr);
}

}  // namespace megatron_cpp
