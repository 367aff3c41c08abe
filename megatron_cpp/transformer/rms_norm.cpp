#include "megatron_cpp/transformer/rms_norm.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

namespace megatron_cpp {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// float32, or the dtype itself where it is wider.
at::Tensor wide(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? tensor : tensor.to(at::kFloat);
}

struct RMSNormFunction : torch::autograd::Function<RMSNormFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& input, const at::Tensor& weight, double eps) {
    const auto x = wide(input);
    const auto inverse_rms = x.square().mean(-1, /*keepdim=*/true).add_(eps).rsqrt_();
    context->save_for_backward({input, weight, inverse_rms});
    return (x * inverse_rms).mul_(wide(weight) + 1.0).to(input.scalar_type());
  }

  // With n = x * inverse_rms and g the gradient of n: dx = inverse_rms * (g - n * mean(g * n)).
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), "double backward through RMSNorm");
    const auto saved = context->get_saved_variables();
    const auto& input = saved[0];
    const auto& weight = saved[1];
    const auto& inverse_rms = saved[2];
    const auto gradient = wide(gradients[0]);
    const auto normed = wide(input) * inverse_rms;
    at::Tensor input_gradient;
    at::Tensor weight_gradient;
    if (context->needs_input_grad(1)) {
      weight_gradient = (gradient * normed).reshape({-1, weight.size(0)}).sum(0).to(weight.scalar_type());
    }
    if (context->needs_input_grad(0)) {
      auto scaled = gradient * (wide(weight) + 1.0);
      const auto mean = (scaled * normed).mean(-1, /*keepdim=*/true);
      input_gradient = scaled.sub_(normed * mean).mul_(inverse_rms).to(input.scalar_type());
    }
    return {input_gradient, weight_gradient, at::Tensor()};
  }
};

}  // namespace

GradientDomain hidden_norm_domain(bool sequence_parallel, const parallel::GroupPtr& tp) {
  return sequence_parallel && tp->getSize() > 1 ? GradientDomain::kReplicatedPartial : GradientDomain::kReplicated;
}

RMSNormImpl::RMSNormImpl(int64_t size, double eps, GradientDomain domain) : eps_(eps), domain_(domain) {
  TORCH_CHECK_VALUE(size > 0, "RMSNorm size ", size, " is not positive");
  TORCH_CHECK_VALUE(domain.sharded_over.empty(),
                    "RMSNorm holds its whole weight on every rank: its gradient domain is "
                    "kReplicated or kReplicatedPartial, not kSharded");
  weight = register_parameter("weight", at::zeros({size}));
}

at::Tensor RMSNormImpl::forward(const at::Tensor& input) {
  use_parameters();
  TORCH_CHECK_VALUE(input.dim() >= 1 && input.size(-1) == weight.size(0), "RMSNorm: input ", input.sizes(),
                    " does not have ", weight.size(0), " columns");
  return RMSNormFunction::apply(input, weight, eps_);
}

std::vector<ParameterShard> RMSNormImpl::own_parameters() const {
  return {replicated_parameter("weight", weight, domain_, InitialValue::constant(0.0), /*weight_decay=*/false)};
}

}  // namespace megatron_cpp
