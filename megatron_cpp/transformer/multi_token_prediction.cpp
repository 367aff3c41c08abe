#include "megatron_cpp/transformer/multi_token_prediction.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <memory>

#include "megatron_cpp/tensor_parallel/rows.h"
#include "parallel/mappings.h"

namespace megatron_cpp {
namespace {

/// The last position of each sub-sequence.
struct LastPositions {
  /// @param begin, count  this rank's positions.
  LastPositions(const SubSequences& sub_sequences, int64_t begin, int64_t count) {
    for (const auto& range : sub_sequences.ranges()) {
      const int64_t last = range.end - 1;
      all.push_back(last);
      if (last >= begin && last < begin + count) own.push_back(last - begin);
    }
  }

  std::vector<int64_t> all;  ///< of the whole sequence
  std::vector<int64_t> own;  ///< counted from this rank's first position
};

}  // namespace

ReplicatedLinearImpl::ReplicatedLinearImpl(int64_t in_features, int64_t out_features, double init_std,
                                           GradientDomain domain)
    : weight(register_parameter("weight", at::zeros({out_features, in_features}))),
      init_std_(init_std),
      domain_(domain) {}

at::Tensor ReplicatedLinearImpl::forward(const at::Tensor& input) {
  use_parameters();
  return at::linear(input, weight);
}

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

LinearCrossEntropyOptions output_loss_options(const TransformerConfig& config, const TransformerExecution& execution) {
  const CrossEntropyOptions loss{.vocabulary_size = config.vocabulary_size};
  return execution.apply_to(LinearCrossEntropyOptions(loss).chunk(execution.loss_chunk));
}

at::Tensor output_loss_sum(const ColumnParallelLinear& output_layer, const at::Tensor& input, const at::Tensor& target,
                           const LinearCrossEntropyOptions& options, const parallel::GroupPtr& tp,
                           double loss_gradient) {
  output_layer->use_parameters();
  return linear_cross_entropy(input, output_layer->weight, target, options, tp, loss_gradient);
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

MultiTokenPredictionBlockImpl::MultiTokenPredictionBlockImpl(const TransformerConfig& config,
                                                             const TransformerExecution& execution,
                                                             const ModelGroups& groups)
    : loss_options_(output_loss_options(config, execution)),
      chain_after_norm_(config.mtp_chain_after_norm),
      sequence_parallel_(execution.sequence_parallel),
      tp_(groups.tp) {
  const auto by_number = register_module("layers", std::make_shared<torch::nn::Module>());
  for (int64_t number = 0; number < static_cast<int64_t>(config.mtp_layers.size()); ++number) {
    layers.emplace_back(config, number, execution, groups);
    by_number->register_module(fmt::to_string(config.num_layers() + number), layers.back());
    rotaries_.push_back(layers.back()->transformer_layer->self_attention->rotary());
  }
}

at::Tensor MultiTokenPredictionBlockImpl::loss_sum(const at::Tensor& hidden_states, const at::Tensor& decoder_input,
                                                   const AttentionInput& attention, const at::Tensor& labels,
                                                   double loss_gradient) {
  TORCH_CHECK_VALUE(decoder_input.dim() == 3 && hidden_states.sizes() == decoder_input.sizes(),
                    "MultiTokenPredictionBlock: hidden states ", hidden_states.sizes(), " and decoder input ",
                    decoder_input.sizes(), " are not alike [sequence, batch, hidden]");
  const int64_t own = decoder_input.size(0);
  const int64_t S = sequence_parallel_ ? own * tp_->getSize() : own;
  const int64_t B = decoder_input.size(1);
  TORCH_CHECK_VALUE(labels.dim() == 2 && labels.size(0) == B && labels.size(1) == S,
                    "MultiTokenPredictionBlock: labels are ", labels.sizes(), ", wanted [", B, ", ", S, "]");
  const AttentionBatch batch(attention, S, B, rotaries_, decoder_input.device());
  const LastPositions last(batch.sub_sequences(), sequence_parallel_ ? own * tp_->getRank() : 0, own);
  const auto own_last = internal::index_tensors({last.own}, decoder_input.device()).front();

  auto hidden = hidden_states;
  auto embeddings = decoder_input;
  auto targets = labels.t();
  at::Tensor sum;
  for (auto& layer : layers) {
    embeddings = sequence_parallel_ ? parallel::roll_sequence_parallel_region(embeddings, tp_) : embeddings.roll(-1, 0);
    embeddings.index_fill_(0, own_last, 0);
    targets = targets.roll(-1, 0).index_fill_(0, at::tensor(last.all, at::kLong), loss_options_.loss().ignore_index);
    hidden = layer->forward(hidden, embeddings, batch);
    const auto normed = layer->final_layernorm->forward(hidden);
    const auto loss = output_loss_sum(layer->output_layer, normed, targets, loss_options_, tp_, loss_gradient);
    sum = sum.defined() ? sum + loss : loss;
    if (chain_after_norm_) hidden = normed;
  }
  return sum;
}

}  // namespace megatron_cpp
