#include "megatron_cpp/transformer/swiglu.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

namespace megatron_cpp {

at::Tensor internal::swiglu_product(const at::Tensor& gate_up, double limit) {
  const auto halves = gate_up.chunk(2, -1);
  auto activated = at::silu(halves[0]);
  if (limit <= 0.0) return activated.mul_(halves[1]);
  return activated.clamp_max_(limit).mul_(halves[1].clamp(-limit, limit));
}

at::Tensor internal::swiglu_gradient(const at::Tensor& gradient, const at::Tensor& gate_up, double limit) {
  const auto halves = gate_up.chunk(2, -1);
  const auto& gate = halves[0];
  const auto& up = halves[1];
  auto activated = at::silu(gate);
  at::Tensor activated_gradient;
  at::Tensor up_gradient;
  if (limit > 0.0) {
    // Clamped elements pass no gradient; those at the limit do, as in at::clamp.
    const auto gate_passes = activated.le(limit);
    const auto up_passes = up.abs().le(limit);
    activated_gradient = gradient * up.clamp(-limit, limit) * gate_passes;
    up_gradient = gradient * activated.clamp_max_(limit) * up_passes;
  } else {
    activated_gradient = gradient * up;
    up_gradient = gradient * activated;
  }
  return at::cat({at::silu_backward(activated_gradient, gate), up_gradient}, -1);
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct SwiGLUFunction : torch::autograd::Function<SwiGLUFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& gate_up, double limit) {
    context->save_for_backward({gate_up});
    context->saved_data["limit"] = limit;
    return internal::swiglu_product(gate_up, limit);
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), "double backward through clamped_swiglu");
    const auto gate_up = context->get_saved_variables()[0];
    return {internal::swiglu_gradient(gradients[0], gate_up, context->saved_data["limit"].toDouble()), at::Tensor()};
  }
};

}  // namespace

at::Tensor clamped_swiglu(const at::Tensor& gate_up, double limit) {
  TORCH_CHECK_VALUE(gate_up.dim() >= 1 && gate_up.size(-1) % 2 == 0, "clamped_swiglu: ", gate_up.sizes(),
                    " does not have an even number of columns");
  return SwiGLUFunction::apply(gate_up, limit);
}

}  // namespace megatron_cpp
