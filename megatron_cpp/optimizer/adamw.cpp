#include "megatron_cpp/optimizer/adamw.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <utility>

namespace megatron_cpp {
namespace {

bool has_prefix(const std::string& name, const std::string& prefix) {
  return name.starts_with(prefix) && (name.size() == prefix.size() || name[prefix.size()] == '.');
}

double scale_of(const std::string& name, const ParameterScales& scales) {
  double scale = 1.0;
  for (const auto& [prefix, factor] : scales) {  // sorted, so that the longest matching prefix comes last
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

at::Tensor ParameterSlice::gradient() const {
  const auto& gradient = shard.parameter.grad();
  TORCH_CHECK_VALUE(gradient.defined(), "parameter ", shard.name, " has no gradient to step with");
  return gradient.reshape({-1}).narrow(0, elements.begin, elements.length());
}

std::vector<ParameterSlice> whole_slices(const std::vector<ParameterShard>& parameters) {
  std::vector<ParameterSlice> slices;
  for (const auto& shard : parameters) {
    if (!shard.parameter.requires_grad()) continue;
    const auto main = shard.parameter.detach().view({-1});
    slices.push_back({shard, {0, main.numel()}, main, at::zeros_like(main), at::zeros_like(main)});
  }
  return slices;
}

AdamW::AdamW(const std::vector<ParameterShard>& parameters, const AdamWOptions& options)
    : AdamW(whole_slices(parameters), options) {}

AdamW::AdamW(std::vector<ParameterSlice> slices, const AdamWOptions& options)
    : slices_(std::move(slices)), options_(options) {
  options_.validate();
  for (size_t i = 0; i < slices_.size(); ++i) {
    const auto& shard = slices_[i].shard;
    const double decay =
        shard.weight_decay ? options_.weight_decay * scale_of(shard.name, options_.weight_decay_scales) : 0.0;
    if (slices_[i].elements.length() == 0) continue;
    parameter_groups_[{scale_of(shard.name, options_.learning_rate_scales), decay}].push_back(i);
  }
}

void AdamW::step(double learning_rate) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> all_gradients;
  all_gradients.reserve(slices_.size());
  for (const auto& slice : slices_) all_gradients.push_back(slice.gradient());
  ++num_steps_;
  for (const auto& [factors, members] : parameter_groups_) {
    const auto& [scale, decay] = factors;
    std::vector<at::Tensor> mains;
    std::vector<at::Tensor> gradients;
    std::vector<at::Tensor> exp_avgs;
    std::vector<at::Tensor> exp_avg_sqs;
    for (const size_t i : members) {
      mains.push_back(slices_[i].main);
      gradients.push_back(all_gradients[i]);
      exp_avgs.push_back(slices_[i].exp_avg);
      exp_avg_sqs.push_back(slices_[i].exp_avg_sq);
    }
    const auto step_count = at::full({}, static_cast<double>(num_steps_), mains.front().options().dtype(at::kFloat));
    const std::vector<at::Tensor> steps(mains.size(), step_count);
    at::_fused_adamw_(mains, gradients, exp_avgs, exp_avg_sqs, /*max_exp_avg_sqs=*/{}, steps, learning_rate * scale,
                      options_.beta1, options_.beta2, decay, options_.eps, /*amsgrad=*/false, /*maximize=*/false);
  }
}

}  // namespace megatron_cpp
