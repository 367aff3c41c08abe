#include "megatron_cpp/optimizer/adamw.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <utility>

namespace megatron {

void AdamWOptions::validate() const {
  TORCH_CHECK_VALUE(beta1 >= 0 && beta1 < 1, "beta1 ", beta1, " is not in [0, 1)");
  TORCH_CHECK_VALUE(beta2 >= 0 && beta2 < 1, "beta2 ", beta2, " is not in [0, 1)");
  TORCH_CHECK_VALUE(eps > 0, "eps ", eps, " is not above 0");
  TORCH_CHECK_VALUE(weight_decay >= 0, "weight decay ", weight_decay, " is below 0");
}

AdamW::AdamW(std::vector<ParameterShard> parameters, const AdamWOptions& options)
    : parameters_(std::move(parameters)), options_(options) {
  options_.validate();
  std::erase_if(parameters_, [](const ParameterShard& shard) { return !shard.parameter.requires_grad(); });
  moments_.reserve(parameters_.size());
  for (const auto& shard : parameters_) {
    const auto like = shard.parameter.detach();
    moments_.push_back({at::zeros_like(like), at::zeros_like(like)});
  }
}

void AdamW::step(double learning_rate) {
  const at::NoGradGuard no_grad;
  for (const auto& shard : parameters_) {
    TORCH_CHECK_VALUE(shard.parameter.grad().defined(), "parameter ", shard.name, " has no gradient to step with");
  }
  ++num_steps_;
  for (const bool decays : {true, false}) {
    std::vector<at::Tensor> parameters;
    std::vector<at::Tensor> gradients;
    std::vector<at::Tensor> exp_avgs;
    std::vector<at::Tensor> exp_avg_sqs;
    for (size_t i = 0; i < parameters_.size(); ++i) {
      if (parameters_[i].weight_decay != decays || parameters_[i].parameter.numel() == 0) continue;
      parameters.push_back(parameters_[i].parameter);
      gradients.push_back(parameters_[i].parameter.grad());
      exp_avgs.push_back(moments_[i].exp_avg);
      exp_avg_sqs.push_back(moments_[i].exp_avg_sq);
    }
    if (parameters.empty()) continue;
    const auto step_count =
        at::full({}, static_cast<double>(num_steps_), parameters.front().options().dtype(at::kFloat));
    const std::vector<at::Tensor> steps(parameters.size(), step_count);
    at::_fused_adamw_(parameters, gradients, exp_avgs, exp_avg_sqs, /*max_exp_avg_sqs=*/{}, steps, learning_rate,
                      options_.beta1, options_.beta2, decays ? options_.weight_decay : 0.0, options_.eps,
                      /*amsgrad=*/false, /*maximize=*/false);
  }
}

}  // namespace megatron
