#include "megatron_cpp/training/training_loop.h"

#include <c10/util/Exception.h>

#include <chrono>

namespace megatron_cpp {

bool TrainingLoopOptions::is_due(int64_t step, int64_t interval) const {
  return step == steps || (interval > 0 && step % interval == 0);
}

int64_t run_training_loop(Trainer& trainer, const TrainingLoopOptions& options,
                          const TrainingLoopCallbacks& callbacks) {
  using Clock = std::chrono::steady_clock;
  TORCH_CHECK_VALUE(callbacks.next_batch, "a training loop needs next_batch");
  int64_t step = trainer.optimizer().num_steps();
  while (step < options.steps) {
    ++step;
    const auto start = Clock::now();
    StepMetrics metrics;
    metrics.step = step;
    {
      const auto batch = callbacks.next_batch();
      metrics.result = trainer.step(batch.loss_sum, batch.num_micro_batches, batch.num_loss_tokens, batch.sample_names);
      metrics.counts = batch.counts;
      metrics.counts.emplace_back("repeated_steps", trainer.step_counts().repeated);
      metrics.counts.emplace_back("skipped_steps", trainer.step_counts().skipped);
    }
    metrics.seconds = std::chrono::duration<double>(Clock::now() - start).count();
    if (callbacks.validation_loss && options.is_due(step, options.validation_interval)) {
      metrics.validation_loss = callbacks.validation_loss();
    }
    if (callbacks.report) callbacks.report(metrics);
    const bool saves = options.is_due(step, options.checkpoint_interval);
    if (saves && callbacks.save) callbacks.save(step);
    if (!callbacks.stops || !callbacks.stops()) continue;
    if (!saves && callbacks.save) callbacks.save(step);
    return step;
  }
  return step;
}

}  // namespace megatron_cpp
