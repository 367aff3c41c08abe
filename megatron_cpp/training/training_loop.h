// A training loop for any model, data and checkpoint format.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "megatron_cpp/training/step_profile.h"
#include "megatron_cpp/training/trainer.h"

namespace megatron_cpp {

/// What one step trains on.
struct StepBatch {
  int64_t num_micro_batches = 0;  ///< of this data-parallel rank, equal over tp
  int64_t num_loss_tokens = 0;    ///< of the global batch; equal on every rank
  /// As Trainer::step takes it: may be called again for the same micro-batch. Owns or refers to what it needs of the
  /// batch.
  std::function<LossSum(int64_t)> loss_sum;
  /// Numbers for the step's metrics, by name: tokens, images.
  std::vector<std::pair<std::string, int64_t>> counts = {};
  std::vector<std::pair<std::string, double>> values = {};  ///< more of them: padding_share
  SampleNames sample_names = {};                            ///< for messages; may be empty
};

/// What a step did, and how long it took.
struct StepMetrics {
  int64_t step = 0;        ///< counted from 1 over the whole run
  StepResult result = {};  ///< loss, gradient norm, learning rate
  /// StepBatch::counts, then `repeated_steps` and `skipped_steps`: StepCounts of the run.
  std::vector<std::pair<std::string, int64_t>> counts = {};
  std::vector<std::pair<std::string, double>> values = {};  ///< StepBatch::values
  double seconds = 0.0;                                     ///< including loading the batch; differs between ranks
  std::optional<double> validation_loss = std::nullopt;     ///< on steps that validate

  /// All numbers by the names that files have them under: loss, grad_norm, learning_rate, the auxiliary losses,
  /// StepResult::metrics, counts and values by their names, tokens_per_second if "tokens" is among them, step_seconds,
  /// and validation_loss on steps that validate.
  std::vector<std::pair<std::string, double>> numbers() const;
};

/// Length of a run, and intervals of validation and checkpoints.
struct TrainingLoopOptions {
  int64_t steps = 0;                ///< of the whole run, also after resuming
  int64_t validation_interval = 0;  ///< steps between validations; 0: at the end only
  int64_t checkpoint_interval = 0;  ///< steps between checkpoints; 0: at the end only
  /// Records its steps, from loading the batch to `stops`; null: nobody does. Ranks may have one or not.
  std::shared_ptr<StepProfile> profile = nullptr;

  /// Every `interval` steps, and at the last step.
  bool is_due(int64_t step, int64_t interval) const;
};

/// What a loop calls, in this order in each step; every rank calls each at the same step. All but next_batch may be
/// empty.
struct TrainingLoopCallbacks {
  std::function<StepBatch()> next_batch;                        ///< the batch of the next step
  std::function<std::optional<double>()> validation_loss = {};  ///< on steps that validate
  std::function<void(const StepMetrics&)> report = {};          ///< after each step: metrics file, progress
  std::function<void(int64_t)> save = {};                       ///< writes the checkpoint of this step
  /// Whether to stop after this step; equal on every rank (see parallel::all_reduce). The loop then saves.
  std::function<bool()> stops = {};
};

/// Trains with `trainer` from the step after trainer.optimizer().num_steps() on, so that a restored optimizer resumes.
/// Collective over all ranks of the trainer's groups.
/// @return  the last step done; below options.steps if `stops` ended the loop, after `save`.
/// @throws c10::ValueError if there is no next_batch; and as Trainer::step and the callbacks do.
int64_t run_training_loop(Trainer& trainer, const TrainingLoopOptions& options, const TrainingLoopCallbacks& callbacks);

}  // namespace megatron_cpp
