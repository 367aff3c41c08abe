#include "megatron_cpp/training/trainer.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <map>
#include <string>

#include "megatron_cpp/training/expert_balance.h"
#include "megatron_cpp/training/replica_check.h"
#include "megatron_cpp/training/schedule.h"
#include "parallel/collectives.h"

namespace megatron_cpp {

Trainer::Trainer(const std::vector<ParameterShard>& parameters, const parallel::ProcessGroups& groups,
                 const TrainerOptions& options)
    : groups_(groups),
      options_(options),
      parameters_(parameters),
      gradients_(parameters, groups, options.gradients),
      optimizer_(gradients_.slices(options.adamw), options.adamw) {
  options_.learning_rate.validate();
  TORCH_CHECK_VALUE(options_.clip_grad_norm >= 0, "clip_grad_norm ", options_.clip_grad_norm, " is below 0");
  TORCH_CHECK_VALUE(options_.check_replicas >= 0, "check_replicas ", options_.check_replicas, " is below 0");
}

StepResult Trainer::step(const std::function<LossSum(int64_t)>& loss_sum, int64_t num_micro_batches,
                         int64_t num_loss_tokens) {
  TORCH_CHECK_VALUE(num_loss_tokens > 0, "the global batch has no loss token");
  const int64_t step_number = optimizer_.num_steps() + 1;
  const auto& names = options_.auxiliary_losses;
  const auto& balance = options_.expert_balance;
  gradients_.zero();
  if (balance) balance->zero();
  // Also on a rank without a micro-batch.
  auto losses = at::zeros({1 + static_cast<int64_t>(names.size())},
                          gradients_.parameters().front().parameter.options().dtype(at::kDouble).requires_grad(false));
  std::map<int64_t, at::Tensor> means;  // of micro-batches between their forward and backward pass
  for (const auto& [kind, micro_batch] : one_after_the_other(num_micro_batches)) {
    if (kind == Action::Kind::kForward) {
      const auto sums = loss_sum(micro_batch);
      TORCH_CHECK_VALUE(sums.auxiliary.size() == names.size(), "a micro-batch has ", sums.auxiliary.size(),
                        " auxiliary losses, and ", names.size(), " have names");
      auto mean = sums.tokens / static_cast<double>(num_loss_tokens);
      std::vector<at::Tensor> parts{mean.detach().reshape({})};
      for (const auto& auxiliary : sums.auxiliary) {
        parts.push_back((auxiliary.detach() / static_cast<double>(num_loss_tokens)).reshape({}));
        mean = mean + auxiliary / static_cast<double>(num_loss_tokens);
      }
      losses.add_(at::stack(parts));
      means[micro_batch] = mean;
    } else {
      if (micro_batch == num_micro_batches - 1) gradients_.reduce_in_backward();
      means.extract(micro_batch).mapped().backward();
    }
  }
  gradients_.reduce();
  gradients_.finish_gather();  // of modules that no micro-batch has used
  // The only wait for the device in a step; the work up to the norm is queued before it.
  std::vector<at::Tensor> parts{parallel::all_reduce(losses, groups_.dp), gradients_.squared_norm()};
  if (balance) parts.push_back(balance->reduce());
  const auto numbers = at::cat(parts).cpu();
  const auto* number = numbers.const_data_ptr<double>();
  StepResult result;
  result.loss = *number++;
  for (const auto& name : names) result.auxiliary_losses.emplace_back(name, *number++);
  result.grad_norm = std::sqrt(*number++);
  if (balance) {
    for (const auto& name : ExpertBalance::metric_names()) result.metrics.emplace_back(name, *number++);
  }
  result.learning_rate = options_.learning_rate.at(step_number);
  bool finite = std::isfinite(result.loss) && std::isfinite(result.grad_norm);
  std::string auxiliary;
  for (const auto& [name, value] : result.auxiliary_losses) {
    finite = finite && std::isfinite(value);
    auxiliary += ", " + name + " " + c10::str(value);
  }
  TORCH_CHECK_VALUE(finite, "step ", step_number, ": loss ", result.loss, auxiliary, " and gradient norm ",
                    result.grad_norm, " are not all finite");
  if (options_.clip_grad_norm > 0 && result.grad_norm > options_.clip_grad_norm) {
    gradients_.scale(options_.clip_grad_norm / result.grad_norm);
  }
  optimizer_.step(result.learning_rate);
  gradients_.gather_parameters();
  if (balance) balance->update_biases();
  if (options_.check_replicas > 0 && step_number % options_.check_replicas == 0) {
    gradients_.finish_gather();
    check_replicas(parameters_, groups_, c10::str("after step ", step_number));
  }
  return result;
}

void Trainer::write_parameters() {
  optimizer_.write_parameters();
  gradients_.gather_parameters();
}

}  // namespace megatron_cpp
