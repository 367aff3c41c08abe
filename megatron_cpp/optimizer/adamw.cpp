#include "megatron_cpp/optimizer/adamw.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <utility>

namespace megatron {
namespace {

bool has_prefix(const std::string& name, const std::string& prefix) {
  return name.starts_with(prefix) && (name.size() == prefix.size() || name[prefix.size()] == '.');
}

double scale_of(const std::string& name, const ParameterScales& scales) {
  double scale = 1.0;
  for (const auto& [prefix, factor] : scales) {  // of prefixes of one name the longer comes later
    if (has_prefix(name, prefix)) scale = factor;
  }
  return scale;
}

}  // namespace

void AdamWOptions::validate() const {
  TORCH_CHECK_VALUE(beta1 >= 0 && beta1 < 1, "beta1 ", beta1, " is not in [0, 1)");
  TORCH_CHECK_VALUE(beta2 >= 0 && beta2 < 1, "beta2 ", beta2, " is not in [0, 1)");
  TORCH_CHECK_VALUE(eps > 0, "eps ", eps, " is not above 0");
  TORCH_CHECK_VALUE(weight_decay >= 0, "weight decay ", weight_decay, " is below 0");
  for (const auto* scales : {&learning_rate_scales, &weight_decay_scales}) {
    for (const auto& [prefix, scale] : *scales) {
      TORCH_CHECK_VALUE(scale >= 0, "the scale ", scale, " of ", prefix, " is below 0");
    }
  }
}

void AdamWOptions::check_prefixes(const std::vector<std::string>& names) const {
  for (const auto* scales : {&learning_rate_scales, &weight_decay_scales}) {
    for (const auto& [prefix, scale] : *scales) {
      const bool is_known =
          std::any_of(names.begin(), names.end(), [&](const auto& name) { return has_prefix(name, prefix); });
      TORCH_CHECK_VALUE(is_known, "a scale is given for ", prefix, ", but no parameter is called so or ", prefix,
                        ".*; there are ", names.front(), ", ", names[names.size() / 2], ", ", names.back(), ", ...");
    }
  }
}

AdamW::AdamW(std::vector<ParameterShard> parameters, const AdamWOptions& options)
    : parameters_(std::move(parameters)), options_(options) {
  options_.validate();
  std::erase_if(parameters_, [](const ParameterShard& shard) { return !shard.parameter.requires_grad(); });
  moments_.reserve(parameters_.size());
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const auto& shard = parameters_[i];
    const auto like = shard.parameter.detach();
    moments_.push_back({at::zeros_like(like), at::zeros_like(like)});
    const double decay =
        shard.weight_decay ? options_.weight_decay * scale_of(shard.name, options_.weight_decay_scales) : 0.0;
    if (like.numel() > 0) parameter_groups_[{scale_of(shard.name, options_.learning_rate_scales), decay}].push_back(i);
  }
}

void AdamW::step(double learning_rate) {
  const at::NoGradGuard no_grad;
  for (const auto& shard : parameters_) {
    TORCH_CHECK_VALUE(shard.parameter.grad().defined(), "parameter ", shard.name, " has no gradient to step with");
  }
  ++num_steps_;
  for (const auto& [factors, members] : parameter_groups_) {
    const auto& [scale, decay] = factors;
    std::vector<at::Tensor> parameters;
    std::vector<at::Tensor> gradients;
    std::vector<at::Tensor> exp_avgs;
    std::vector<at::Tensor> exp_avg_sqs;
    for (const size_t i : members) {
      parameters.push_back(parameters_[i].parameter);
      gradients.push_back(parameters_[i].parameter.grad());
      exp_avgs.push_back(moments_[i].exp_avg);
      exp_avg_sqs.push_back(moments_[i].exp_avg_sq);
    }
    const auto step_count =
        at::full({}, static_cast<double>(num_steps_), parameters.front().options().dtype(at::kFloat));
    const std::vector<at::Tensor> steps(parameters.size(), step_count);
    at::_fused_adamw_(parameters, gradients, exp_avgs, exp_avg_sqs, /*max_exp_avg_sqs=*/{}, steps,
                      learning_rate * scale, options_.beta1, options_.beta2, decay, options_.eps,
                      /*amsgrad=*/false, /*maximize=*/false);
  }
}

}  // namespace megatron
