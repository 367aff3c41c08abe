#include "megatron_cpp/training/training_loop.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <chrono>

#include "parallel/activity.h"
#include "parallel/named_range.h"

namespace megatron_cpp {

std::vector<std::pair<std::string, double>> StepMetrics::numbers() const {
  std::vector<std::pair<std::string, double>> all = {
      {"loss", result.loss}, {"grad_norm", result.grad_norm}, {"learning_rate", result.learning_rate}};
  all.insert(all.end(), result.auxiliary_losses.begin(), result.auxiliary_losses.end());
  all.insert(all.end(), result.metrics.begin(), result.metrics.end());
  all.insert(all.end(), counts.begin(), counts.end());
  all.insert(all.end(), values.begin(), values.end());
  const auto tokens = std::ranges::find(counts, "tokens", [](const auto& count) { return count.first; });
  if (tokens != counts.end()) all.emplace_back("tokens_per_second", static_cast<double>(tokens->second) / seconds);
  all.emplace_back("step_seconds", seconds);
  if (validation_loss) all.emplace_back("validation_loss", *validation_loss);
  return all;
}

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
    parallel::set_step(step);
    if (options.profile) options.profile->begin_step(step);
    const auto start = Clock::now();
    StepMetrics metrics;
    metrics.step = step;
    {
      const auto batch = parallel::in_range("data", callbacks.next_batch);
      metrics.result = trainer.step(batch.loss_sum, batch.num_micro_batches, batch.num_loss_tokens, batch.sample_names);
      metrics.counts = batch.counts;
      metrics.values = batch.values;
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
    const bool stops = callbacks.stops && callbacks.stops();
    if (options.profile) stops ? options.profile->finish() : options.profile->end_step(step);
    if (!stops) continue;
    if (!saves && callbacks.save) callbacks.save(step);
    return step;
  }
  return step;
}

}  // namespace megatron_cpp
