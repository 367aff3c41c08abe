// Chooses the experts of each token.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <vector>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "megatron_cpp/transformer/transformer_config.h"

namespace megatron_cpp {

/// Which experts each token goes to, and how their outputs are weighed.
struct Routing {
  at::Tensor experts;      ///< [n, K] int64: the chosen experts, the highest score first
  at::Tensor weights;      ///< [n, K], with gradient, of their outputs: float32, or float64 for float64 tokens
  at::Tensor logits = {};  ///< [n, E], with gradient, of all experts; of the same dtype
  at::Tensor scores = {};  ///< [n, E], likewise: without the bias
};

/// [n, K] int64: of each row of [n, E] the columns of the K highest values, the highest first; of equal ones the lower
/// number wins.
at::Tensor highest_scores(const at::Tensor& scores, int64_t topk);

/// Scores are sigmoid(weight · token). A token goes to the K experts of the highest score + expert_bias; of equal ones
/// the lower number wins. Their weights are the scores without the bias, divided by their sum, times
/// MoEConfig::router_scaling_factor. Nothing is added to the sum (Step3p7, modeling_step3p7.py in transformers 5.24).
/// If all K scores are 0 in float32 (logits below -104), which leaves 0/0 there, the K weights are equal here.
///
/// The weight is whole on every tensor-parallel rank, and each routes its own tokens only: the gradient is a summand.
class TopKRouterImpl : public ParallelModule {
 public:
  /// @param domain  of the weight's gradient: kReplicatedPartial, or kReplicated if there is one tensor-parallel rank.
  TopKRouterImpl(const MoEConfig& config, int64_t hidden_size, double init_std, GradientDomain domain);

  /// @param tokens   [n, H], this rank's; n may be 0.
  /// @param earlier  undefined, or the choice of an earlier pass over these tokens, Routing::experts, which stays.
  /// No communication. Deterministic.
  Routing forward(const at::Tensor& tokens, const at::Tensor& earlier = {});

  std::vector<ParameterShard> own_parameters() const override;

  /// As of every module, but expert_bias stays float32 (or float64) in a lower precision: its updates are too small for
  /// bfloat16, and near ties it decides.
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;  ///< likewise
  using torch::nn::Module::to;

  at::Tensor weight;  ///< [E, H]
  /// [E]: is added to the scores for the choice only. A parameter, so that checkpoints have it, that never needs a
  /// gradient.
  at::Tensor expert_bias;

 private:
  MoEConfig config_;
  double init_std_;
  GradientDomain domain_;
};
TORCH_MODULE(TopKRouter);

}  // namespace megatron_cpp
