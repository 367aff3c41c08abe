// One optimizer step over micro-batches and ranks.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "megatron_cpp/optimizer/adamw.h"
#include "megatron_cpp/optimizer/gradient_buffer.h"
#include "megatron_cpp/parameters/parameter_shard.h"
#include "megatron_cpp/training/learning_rate.h"
#include "parallel/process_groups.h"

namespace megatron_cpp {

class ExpertBalance;

/// Optimizer, learning rate and clipping.
struct TrainerOptions {
  AdamWOptions adamw;                    ///< constants of the optimizer
  LearningRateSchedule learning_rate;    ///< of each step
  double clip_grad_norm = 1.0;           ///< 0: no clipping
  GradientBufferOptions gradients = {};  ///< dtypes of the gradients, and whether the optimizer is distributed
  /// Names of what is trained on beside the token losses, in the order of LossSum::auxiliary; equal on every rank, also
  /// on one without a micro-batch.
  std::vector<std::string> auxiliary_losses = {};
  /// Of a model with experts, or null: each step begins it, reports its numbers, and ends with its bias rule.
  std::shared_ptr<ExpertBalance> expert_balance = nullptr;
  int64_t check_replicas = 0;  ///< steps between two calls of megatron_cpp::check_replicas; 0: none
};

/// What a micro-batch adds to the loss of a step, before the division by the loss tokens of the global batch. All are
/// scalars with gradients, equal over tp.
struct LossSum {
  /// A tensor alone is a LossSum, too.
  LossSum(at::Tensor token_losses,
          std::vector<at::Tensor> auxiliary_losses = {})  // NOLINT(google-explicit-constructor)
      : tokens(std::move(token_losses)), auxiliary(std::move(auxiliary_losses)) {}

  at::Tensor tokens;                  ///< the sum of the token losses
  std::vector<at::Tensor> auxiliary;  ///< one for each of TrainerOptions::auxiliary_losses, with its coefficient
};

/// What a step did; equal on every rank.
struct StepResult {
  double loss = 0.0;           ///< mean over the loss tokens of the global batch, without auxiliary losses
  double grad_norm = 0.0;      ///< before clipping
  double learning_rate = 0.0;  ///< of this step
  std::vector<std::pair<std::string, double>> auxiliary_losses = {};  ///< as they are added to `loss`, by name
  std::vector<std::pair<std::string, double>> metrics = {};           ///< ExpertBalance::metric_names, if there is one
};

/// Forward and backward over the micro-batches, gradient reduction, clipping by the global norm, AdamW.
class Trainer {
 public:
  /// @param parameters  the model's, from parameter_shards(); those that need no gradient aren't changed.
  Trainer(const std::vector<ParameterShard>& parameters, const parallel::ProcessGroups& groups,
          const TrainerOptions& options);

  /// One step. The loss is the sum of the token losses of the global batch, over all micro-batches and data-parallel
  /// ranks, divided by num_loss_tokens, so that all tokens have the same weight; auxiliary losses are summed and
  /// divided in the same way, and added.
  /// @param num_micro_batches  of this data-parallel rank, equal over tp; 0 if the global batch has none left for it.
  /// @param loss_sum           for micro-batch i of this data-parallel rank, in [0, num_micro_batches).
  /// @param num_loss_tokens    of the global batch; equal on every rank.
  /// Comm: that of loss_sum, of GradientBuffer::reduce, norm and gather_parameters, and of ExpertBalance::reduce; 1
  /// all-reduce of the losses over dp; now and then that of check_replicas. Collective over tp and dp. Waits for a GPU
  /// once, to read all numbers together. Throws c10::ValueError, on every rank alike, if there is no loss token, or a
  /// loss or the gradient is not finite (naming the step and all; the parameters are left as they were), or a
  /// micro-batch has not as many auxiliary losses as have names. Throws AgreedError as check_replicas does, naming the
  /// step.
  StepResult step(const std::function<LossSum(int64_t)>& loss_sum, int64_t num_micro_batches, int64_t num_loss_tokens);

  /// Completes the parameters after a checkpoint was loaded into the optimizer's slices. Comm: that of
  /// GradientBuffer::gather_parameters. Collective over the same groups.
  void write_parameters();

  /// Returns when all parameters are complete: with a distributed optimizer step() and write_parameters() may leave
  /// them on their way. Modules wait for their own (GradientBuffer::gather_parameters); call it before the parameters
  /// are read or written in another way. Not collective.
  void finish_gather() { gradients_.finish_gather(); }

  /// The optimizer, for initial values, resuming, and checkpoints of its slices.
  AdamW& optimizer() { return optimizer_; }
  /// The same, read-only.
  const AdamW& optimizer() const { return optimizer_; }

 private:
  parallel::ProcessGroups groups_;
  TrainerOptions options_;
  std::vector<ParameterShard> parameters_;  ///< the frozen ones, too
  GradientBuffer gradients_;
  AdamW optimizer_;
};

}  // namespace megatron_cpp
