// The mixture of experts of a decoder layer.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <optional>

#include "megatron_cpp/transformer/execution.h"
#include "megatron_cpp/transformer/mlp.h"
#include "megatron_cpp/transformer/moe/experts.h"
#include "megatron_cpp/transformer/moe/router.h"
#include "megatron_cpp/transformer/moe/router_statistics.h"
#include "megatron_cpp/transformer/moe/token_dispatcher.h"
#include "megatron_cpp/transformer/transformer_config.h"
#include "parallel/group.h"

namespace megatron_cpp {

/// Σ over a token's K experts of their weighted outputs, plus shared_experts(token). Each tensor-parallel rank routes
/// and dispatches its own 1/t of the tokens (TokenDispatcher), also without sequence parallelism.
class MoELayerImpl : public torch::nn::Module {
 public:
  /// @param groups  tp, ep and etp. If a copy of the experts is on ranks of several data-parallel replicas, these must
  ///                run as many forward and backward passes.
  /// @throws c10::ValueError as MoEConfig::validate does, or if there is no `config.moe`.
  MoELayerImpl(const TransformerConfig& config, const LayerConfig& layer, const TransformerExecution& execution,
               const ModelGroups& groups);

  /// @param input       [S, B, H], equal on every rank of tp; with sequence_parallel [S/t, B, H], this rank's rows.
  /// @param statistics  null, or where this layer's routing is added.
  /// @param dispatcher  null, or of another pass over this input: an empty one is filled in, another one is gone by, so
  ///                    that no token takes other ways, not even if a score is rounded otherwise.
  /// @return            the same shape.
  /// Comm: TokenDispatcher's, and MLP's for the shared experts. Without sequence_parallel also forward 1 all-gather of
  /// S·B·H elements, and backward 1. Collective over tp, ep and etp.
  at::Tensor forward(const at::Tensor& input, RouterStatistics* statistics = nullptr,
                     std::optional<TokenDispatcher>* dispatcher = nullptr);

  /// The shape of the mixture.
  const MoEConfig& config() const { return config_; }

  TopKRouter router{nullptr};       ///< whole on every rank
  GroupedExperts experts{nullptr};  ///< split over ep and etp
  MLP shared_experts{nullptr};      ///< split over tp; null if shared_expert_ffn_hidden_size is 0

 private:
  /// Of tokens [n, H], the first of which has the number `begin` in the batch.
  at::Tensor routed_experts(const at::Tensor& tokens, int64_t begin, RouterStatistics* statistics,
                            std::optional<TokenDispatcher>* dispatcher);

  ModelGroups groups_;
  MoEConfig config_;
  bool sequence_parallel_;
  bool recomputes_experts_;
};
TORCH_MODULE(MoELayer);

}  // namespace megatron_cpp
