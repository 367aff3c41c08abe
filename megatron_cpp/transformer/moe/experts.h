// The feed-forwards of a mixture of experts.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <vector>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "megatron_cpp/transformer/execution.h"
#include "megatron_cpp/transformer/transformer_config.h"
#include "parallel/shard.h"

namespace megatron_cpp {

/// Tokens for the experts of this rank.
struct ExpertTokens {
  at::Tensor rows;     ///< [M, H]
  at::Tensor weights;  ///< [M, K], with gradient: of the K experts that each token was routed to, here and elsewhere
  /// [C] int64, places in `weights` read row by row, those of this rank's experts: expert by expert, each in increasing
  /// order.
  at::Tensor order;
  std::vector<int64_t> counts;  ///< tokens of each of this rank's experts; their sum is C
};

/// This rank's experts, each as MLP is: Σ over its experts e of weight_e · down_e(clamped_swiglu([gate_e up_e] token)).
/// Rank q of `ep` has the experts [q·E/ep, (q+1)·E/ep), rank r of `etp` the columns [r·I/etp, (r+1)·I/etp) of each.
class GroupedExpertsImpl : public ParallelModule {
 public:
  /// @param config  with `moe`; MoEConfig::validate has passed.
  GroupedExpertsImpl(const TransformerConfig& config, double swiglu_limit, const TransformerExecution& execution,
                     const ModelGroups& groups);

  /// @return  [M, H], the dtype of the rows: this rank's experts' sum for each token, of which each rank of `etp` has a
  ///          summand; zero for a token that has no expert here.
  /// One matrix product after the other, for experts that have tokens; sizes are known on the host, so nothing waits
  /// for the device. Sums are in float32 (float64 for float64) and in the order of the experts: no atomics, the same
  /// bits every time. Backward saves rows, weights and the products of the first matrix [C, 2I/etp]; it works with
  /// M = 0, too. Its gradient of the weights is a summand over `etp`, as is that of the rows. No communication.
  at::Tensor forward(const ExpertTokens& tokens);

  std::vector<ParameterShard> own_parameters() const override;

  /// The experts of this rank.
  parallel::Range experts() const { return experts_; }

  at::Tensor linear_fc1;  ///< [E/ep, 2I/etp, H]: the rows of gate_proj, then those of up_proj
  at::Tensor linear_fc2;  ///< [E/ep, H, I/etp]: the columns of down_proj

 private:
  MoEConfig config_;
  int64_t hidden_size_;
  double init_std_;
  double swiglu_limit_;
  bool accumulate_into_grad_;
  parallel::Range experts_;
  parallel::Range columns_;
};
TORCH_MODULE(GroupedExperts);

}  // namespace megatron_cpp
