#include "megatron_cpp/training/trainer.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <map>

#include "megatron_cpp/training/schedule.h"
#include "parallel/collectives.h"

namespace megatron_cpp {

Trainer::Trainer(const std::vector<ParameterShard>& parameters, const parallel::ProcessGroups& groups,
                 const TrainerOptions& options)
    : groups_(groups),
      options_(options),
      gradients_(parameters, groups),
      optimizer_(gradients_.parameters(), options.adamw) {
  options_.learning_rate.validate();
  TORCH_CHECK_VALUE(options_.clip_grad_norm >= 0, "clip_grad_norm ", options_.clip_grad_norm, " is below 0");
}

StepResult Trainer::step(const std::function<at::Tensor(int64_t)>& loss_sum, int64_t num_micro_batches,
                         int64_t num_loss_tokens) {
  TORCH_CHECK_VALUE(num_loss_tokens > 0, "the global batch has no loss token");
  const int64_t step_number = optimizer_.num_steps() + 1;
  gradients_.zero();
  // Also on a rank without a micro-batch.
  auto loss =
      at::zeros({1}, gradients_.parameters().front().parameter.options().dtype(at::kDouble).requires_grad(false));
  std::map<int64_t, at::Tensor> means;  // of micro-batches between their forward and backward pass
  for (const auto& [kind, micro_batch] : one_after_the_other(num_micro_batches)) {
    if (kind == Action::Kind::kForward) {
      means[micro_batch] = loss_sum(micro_batch) / static_cast<double>(num_loss_tokens);
    } else {
      const auto mean = means.extract(micro_batch).mapped();
      mean.backward();
      loss.add_(mean.detach());
    }
  }
  gradients_.reduce();
  // The only wait for the device in a step; the work up to the norm is queued before it.
  const auto loss_and_square = at::cat({parallel::all_reduce(loss, groups_.dp), gradients_.squared_norm()}).cpu();
  StepResult result;
  result.loss = loss_and_square.const_data_ptr<double>()[0];
  result.grad_norm = std::sqrt(loss_and_square.const_data_ptr<double>()[1]);
  result.learning_rate = options_.learning_rate.at(step_number);
  TORCH_CHECK_VALUE(std::isfinite(result.loss) && std::isfinite(result.grad_norm), "step ", step_number, ": loss ",
                    result.loss, " and gradient norm ", result.grad_norm, " are not both finite");
  if (options_.clip_grad_norm > 0 && result.grad_norm > options_.clip_grad_norm) {
    gradients_.scale(options_.clip_grad_norm / result.grad_norm);
  }
  optimizer_.step(result.learning_rate);
  return result;
}

}  // namespace megatron_cpp
