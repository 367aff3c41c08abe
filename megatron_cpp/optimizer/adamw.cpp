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

/// Elements of a slice that are converted to main's dtype at a time.
constexpr int64_t kConvertedAtATime = 1 << 22;

/// What an update reads and writes.
struct Operand {
  at::Tensor main;
  at::Tensor gradient;
  at::Tensor exp_avg;
  at::Tensor exp_avg_sq;

  bool has_one_dtype() const {
    const auto dtype = main.scalar_type();
    return gradient.scalar_type() == dtype && exp_avg.scalar_type() == dtype && exp_avg_sq.scalar_type() == dtype;
  }
  Operand narrow(int64_t begin, int64_t length) const {
    return {main.narrow(0, begin, length), gradient.narrow(0, begin, length), exp_avg.narrow(0, begin, length),
            exp_avg_sq.narrow(0, begin, length)};
  }
  /// In main's dtype; a view where there is nothing to convert.
  Operand converted() const {
    const auto dtype = main.scalar_type();
    return {main, gradient.to(dtype), exp_avg.to(dtype), exp_avg_sq.to(dtype)};
  }
};

/// What one call of the fused kernel updates.
struct Operands {
  std::vector<at::Tensor> main;
  std::vector<at::Tensor> gradient;
  std::vector<at::Tensor> exp_avg;
  std::vector<at::Tensor> exp_avg_sq;

  void add(const Operand& operand) {
    main.push_back(operand.main);
    gradient.push_back(operand.gradient);
    exp_avg.push_back(operand.exp_avg);
    exp_avg_sq.push_back(operand.exp_avg_sq);
  }
};

}  // namespace

void AdamWOptions::validate() const {
  TORCH_CHECK_VALUE(beta1 >= 0 && beta1 < 1, "beta1 ", beta1, " is not in [0, 1)");
  TORCH_CHECK_VALUE(beta2 >= 0 && beta2 < 1, "beta2 ", beta2, " is not in [0, 1)");
  TORCH_CHECK_VALUE(eps > 0, "eps ", eps, " is not above 0");
  for (const auto dtype : {exp_avg, exp_avg_sq}) {
    TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16, "moments in ", dtype,
                      ": they can be float32 or bfloat16");
  }
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

ParameterSlice parameter_slice(const ParameterShard& shard, parallel::Range elements, const AdamWOptions& options) {
  auto main = shard.parameter.detach().view({-1}).narrow(0, elements.begin, elements.length());
  if (c10::isReducedFloatingType(main.scalar_type())) main = main.to(at::kFloat);
  const auto zeros = [&](at::ScalarType dtype) {
    return at::zeros_like(main, main.options().dtype(main.scalar_type() == at::kFloat ? dtype : main.scalar_type()));
  };
  return {shard, elements, main, zeros(options.exp_avg), zeros(options.exp_avg_sq)};
}

std::vector<ParameterSlice> whole_slices(const std::vector<ParameterShard>& parameters, const AdamWOptions& options) {
  std::vector<ParameterSlice> slices;
  for (const auto& shard : parameters) {
    if (shard.parameter.requires_grad()) {
      slices.push_back(parameter_slice(shard, {0, shard.parameter.numel()}, options));
    }
  }
  return slices;
}

AdamW::AdamW(const std::vector<ParameterShard>& parameters, const AdamWOptions& options)
    : AdamW(whole_slices(parameters, options), options) {}

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
    const auto update = [&, scale = scale, decay = decay](const Operands& operands) {
      const auto& like = operands.main.front();
      const std::vector<at::Tensor> steps(
          operands.main.size(), at::full({}, static_cast<double>(num_steps_), like.options().dtype(at::kFloat)));
      at::_fused_adamw_(operands.main, operands.gradient, operands.exp_avg, operands.exp_avg_sq,
                        /*max_exp_avg_sqs=*/{}, steps, learning_rate * scale, options_.beta1, options_.beta2, decay,
                        options_.eps, /*amsgrad=*/false, /*maximize=*/false);
    };
    Operands of_one_dtype;
    for (const size_t i : members) {
      const auto& slice = slices_[i];
      const Operand operand{slice.main, all_gradients[i], slice.exp_avg, slice.exp_avg_sq};
      if (operand.has_one_dtype()) {
        of_one_dtype.add(operand);
        continue;
      }
      for (int64_t begin = 0; begin < slice.elements.length(); begin += kConvertedAtATime) {
        const auto part = operand.narrow(begin, std::min(kConvertedAtATime, slice.elements.length() - begin));
        const auto converted = part.converted();
        Operands one;
        one.add(converted);
        update(one);
        part.exp_avg.copy_(converted.exp_avg);
        part.exp_avg_sq.copy_(converted.exp_avg_sq);
      }
    }
    if (!of_one_dtype.main.empty()) update(of_one_dtype);
  }
  write_parameters();
}

void AdamW::fill_parameters(const std::vector<ParameterShard>& parameters,
                            const std::function<void(const ParameterShard&)>& fill) {
  const at::NoGradGuard no_grad;
  std::map<std::string, const ParameterSlice*> copied;
  for (const auto& slice : slices_) {
    if (slice.has_copy()) copied.emplace(slice.shard.name, &slice);
  }
  for (const auto& shard : parameters) {
    const auto found = copied.find(shard.name);
    if (found == copied.end()) {
      fill(shard);
      continue;
    }
    const auto& slice = *found->second;
    auto wide = shard;
    wide.parameter = shard.parameter.detach().to(slice.main.scalar_type());
    fill(wide);
    shard.parameter.detach().copy_(wide.parameter);
    slice.main.copy_(wide.parameter.view({-1}).narrow(0, slice.elements.begin, slice.elements.length()));
  }
}

void AdamW::write_parameters() {
  const at::NoGradGuard no_grad;
  for (const auto& slice : slices_) {
    if (!slice.has_copy()) continue;
    slice.shard.parameter.view({-1}).narrow(0, slice.elements.begin, slice.elements.length()).copy_(slice.main);
  }
}

}  // namespace megatron_cpp
