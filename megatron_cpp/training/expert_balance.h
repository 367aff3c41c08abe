// How evenly a model's experts are used in each optimizer step, and the rule that evens their use out.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "megatron_cpp/transformer/moe/moe_layer.h"
#include "megatron_cpp/transformer/moe/router_statistics.h"
#include "parallel/group.h"
#include "parallel/process_groups.h"

namespace megatron_cpp {

/// Counts each expert's tokens over the micro-batches and ranks of a step. Trainer calls it (TrainerOptions); only
/// add() is for the loss of a micro-batch.
class ExpertBalance {
 public:
  /// @param layers  of the model, all with as many experts, at least one; their modules are kept.
  /// @param groups  tp_dp and etp_ep.
  /// Not collective. Throws c10::ValueError if there is no layer, or a group wasn't made.
  ExpertBalance(std::vector<MoELayer> layers, const parallel::ProcessGroups& groups);

  /// Names of the numbers that reduce() returns.
  ///  - moe_max_load: the tokens of an expert, divided by their mean over the layer's experts; the largest of all.
  ///  - moe_expert_norm_dispersion: the L2 norm of all weights of an expert, divided by the median over the layer's
  ///    experts (of an even number the lower one of the two in the middle); the largest of all. It grows where the
  ///    activations of single experts blow up (Step-3.5-Flash, arXiv 2602.10604).
  static std::vector<std::string> metric_names();

  /// Begins a step: no token has been counted. Not collective.
  void zero();

  /// Counts the tokens of a micro-batch. Not collective.
  /// @param statistics  of a forward pass through all layers.
  void add(const RouterStatistics& statistics);

  /// Completes the counts of the step.
  /// @return  [2] float64 on the device of the layers, metric_names() of this step, with the weights as they are now;
  ///          equal on every rank.
  /// Comm: 1 all-reduce over tp_dp and 1 over etp_ep, each of a number for each expert. Collective over these groups.
  /// Doesn't wait for the device.
  at::Tensor reduce();

  /// [layers, E] float64: each expert's tokens since zero(), of this rank, and after reduce() of all ranks.
  const at::Tensor& tokens_per_expert() const { return tokens_per_expert_; }

  /// The rule of loss-free balancing (Wang et al., arXiv 2408.15664; Megatron-Core, moe_utils.py:
  /// get_updated_expert_bias): each correction bias grows by MoEConfig::router_bias_update_rate if the expert had
  /// fewer tokens in the step than the mean of its layer, and falls by as much if it had more. Call it after reduce();
  /// all ranks have the same counts, so that copies of the biases stay equal. Not collective.
  void update_biases();

 private:
  /// [layers, E] float64, of all weights of each expert. Comm: 1 all-reduce over etp_ep.
  at::Tensor squared_norms() const;

  std::vector<MoELayer> layers_;
  parallel::GroupPtr tp_dp_;
  parallel::GroupPtr etp_ep_;
  at::Tensor tokens_per_expert_;
};

}  // namespace megatron_cpp
