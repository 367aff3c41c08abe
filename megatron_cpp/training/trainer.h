// One optimizer step over micro-batches and ranks, and what becomes of it if its numbers aren't finite.
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
#include "megatron_cpp/training/loss_spike.h"
#include "parallel/process_groups.h"

namespace megatron_cpp {

class ExpertBalance;

namespace internal {
class NotFiniteSearch;
}  // namespace internal

/// What becomes of a step whose loss or gradient norm isn't finite, and is no other when the step is repeated.
enum class NotFiniteAction {
  kStop,  ///< AgreedError
  kSkip,  ///< the batch is left out
};

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
  /// Called in each step before parameters, optimizer state or correction biases change; empty: nothing. See
  /// CheckpointSaver::synchronize_staging.
  std::function<void()> before_update = {};
  int64_t check_replicas = 0;  ///< steps between two calls of megatron_cpp::check_replicas; 0: none
  NotFiniteAction not_finite = NotFiniteAction::kStop;  ///< of data and model; see Trainer::step
  int64_t max_skipped_steps = 10;                       ///< in a row; one more is an error all the same
  double loss_spike = 0.0;                              ///< threshold of LossSpikes; 0: nobody looks
};

/// The names of the samples of a micro-batch of this data-parallel rank, for messages; equal over tp. May be empty.
using SampleNames = std::function<std::vector<std::string>(int64_t)>;

/// Steps that went another way than usual, since the run began; equal on every rank.
struct StepCounts {
  int64_t repeated = 0;  ///< gave numbers that aren't finite, and finite ones when they were repeated
  int64_t skipped = 0;   ///< whose batch was left out (NotFiniteAction::kSkip)
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
  double grad_norm = 0.0;      ///< before clipping; of a skipped step this or `loss` isn't finite
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
  /// @param loss_sum           for micro-batch i of this data-parallel rank, in [0, num_micro_batches); the same bits
  ///                           each time it is called for it within a step.
  /// @param num_loss_tokens    of the global batch; equal on every rank.
  /// @param sample_names       called only when a message names samples.
  /// Comm: that of loss_sum, of GradientBuffer::reduce, norm and gather_parameters, and of ExpertBalance::reduce; 1
  /// all-reduce of the losses over dp; now and then that of check_replicas. Collective over tp and dp. Waits for a GPU
  /// once, to read all numbers together. Throws c10::ValueError, on every rank alike, if there is no loss token, or a
  /// micro-batch has not as many auxiliary losses as have names. Throws AgreedError as check_replicas does, naming the
  /// step.
  ///
  /// If a loss or the gradient norm isn't finite, the same micro-batches are computed again in place (loss_sum is
  /// called again for each), as Megatron-Core's rerun state machine does, and what each rank computed by itself, and
  /// all together, is compared with the first time:
  ///  - the same bits (NaN equals NaN; on a GPU, where sums may be added in any order: as many finite numbers): data or
  ///    model are the reason. A third, slower pass finds the first thing that isn't finite: a parameter; else the first
  ///    operator of a forward pass whose output has NaN or infinity, and the module that it is in; else the first
  ///    gradient in the order of the backward pass. Then as TrainerOptions::not_finite says: AgreedError with
  ///    kNotFiniteStatus, parameters as they were; or a warning on world rank 0, and the batch is left out: parameters,
  ///    moments and correction biases stay, but the step counts as done, in the learning rate's schedule and AdamW's
  ///    bias correction.
  ///  - other bits: a machine is the reason, that of the ranks whose own numbers changed. If the numbers are finite
  ///    now, the step goes on with them, after a warning on world rank 0; else AgreedError with kSuspectedHostStatus.
  ///    Both name the ranks and hosts.
  /// All ranks decide alike. Comm then: the same collectives once or twice more, and a few of texts over the world,
  /// which all ranks must be part of.
  ///
  /// A loss far above the last ones (TrainerOptions::loss_spike) is a warning on world rank 0, with the names of the
  /// samples of the whole step. Comm then: two all-gathers of texts over dp.
  StepResult step(const std::function<LossSum(int64_t)>& loss_sum, int64_t num_micro_batches, int64_t num_loss_tokens,
                  const SampleNames& sample_names = {});

  /// Of the steps so far.
  const StepCounts& step_counts() const { return step_counts_; }
  /// For resuming.
  void set_step_counts(const StepCounts& counts) { step_counts_ = counts; }

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
  /// What step() takes.
  struct Batch {
    const std::function<LossSum(int64_t)>& loss_sum;
    int64_t num_micro_batches;
    int64_t num_loss_tokens;
    const SampleNames& sample_names;
  };
  /// What a forward and backward pass over all micro-batches gave.
  struct Pass {
    at::Tensor own_losses;  ///< [1 + auxiliary losses] float64 on the parameters' device, of this rank
    /// float64 on the CPU, equal on every rank: these of all ranks, the squared gradient norm, ExpertBalance's numbers.
    at::Tensor numbers;
    bool is_finite;  ///< all losses and the norm are; equal on every rank
  };

  /// Leaves the reduced gradients in the buffer.
  /// @param search  looks at what is computed; null: nobody does.
  Pass run_pass(const Batch& batch, internal::NotFiniteSearch* search);
  StepResult result_of(const Pass& pass, int64_t step_number) const;
  /// This rank's own numbers of the last pass, [n] float64 on the CPU.
  at::Tensor own_numbers(const Pass& pass) const;
  void warn_of_spike(const std::string& what, const Batch& batch) const;
  /// After a pass that wasn't finite: repeats it, and finds out why. Returns a finite one, or one that is to be
  /// skipped.
  Pass repeat(const Batch& batch, const Pass& first);

  parallel::ProcessGroups groups_;
  TrainerOptions options_;
  std::vector<ParameterShard> parameters_;  ///< the frozen ones, too
  GradientBuffer gradients_;
  AdamW optimizer_;
  LossSpikes spikes_;
  StepCounts step_counts_;
  int64_t skipped_in_a_row_ = 0;
};

}  // namespace megatron_cpp
