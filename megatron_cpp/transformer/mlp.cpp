#include "megatron_cpp/transformer/mlp.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

#include <vector>

namespace megatron_cpp {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct SwiGLUFunction : torch::autograd::Function<SwiGLUFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& gate_up, double limit) {
    context->save_for_backward({gate_up});
    context->saved_data["limit"] = limit;
    const auto halves = gate_up.chunk(2, -1);
    auto activated = at::silu(halves[0]);
    if (limit <= 0.0) return activated.mul_(halves[1]);
    return activated.clamp_max_(limit).mul_(halves[1].clamp(-limit, limit));
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), "double backward through clamped_swiglu");
    const auto gate_up = context->get_saved_variables()[0];
    const double limit = context->saved_data["limit"].toDouble();
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
      activated_gradient = gradients[0] * up.clamp(-limit, limit) * gate_passes;
      up_gradient = gradients[0] * activated.clamp_max_(limit) * up_passes;
    } else {
      activated_gradient = gradients[0] * up;
      up_gradient = gradients[0] * activated;
    }
    return {at::cat({at::silu_backward(activated_gradient, gate), up_gradient}, -1), at::Tensor()};
  }
};

}  // namespace

at::Tensor clamped_swiglu(const at::Tensor& gate_up, double limit) {
  TORCH_CHECK_VALUE(gate_up.dim() >= 1 && gate_up.size(-1) % 2 == 0, "clamped_swiglu: ", gate_up.sizes(),
                    " does not have an even number of columns");
  return SwiGLUFunction::apply(gate_up, limit);
}

MLPImpl::MLPImpl(const TransformerConfig& config, double swiglu_limit, const TransformerExecution& execution,
                 const parallel::GroupPtr& tp)
    : swiglu_limit_(swiglu_limit) {
  const std::vector<OutputPart> parts{{"gate_proj", config.ffn_hidden_size}, {"up_proj", config.ffn_hidden_size}};
  const auto fc1_options = ColumnParallelLinearOptions(config.hidden_size, parts).init_std(config.init_std);
  linear_fc1 = register_module("linear_fc1", ColumnParallelLinear(execution.apply_to(fc1_options), tp));
  const auto fc2_options =
      RowParallelLinearOptions(config.ffn_hidden_size, config.hidden_size).init_std(config.init_std);
  linear_fc2 = register_module("linear_fc2", RowParallelLinear(execution.apply_to(fc2_options), tp));
}

at::Tensor MLPImpl::forward(const at::Tensor& input) {
  return linear_fc2->forward(clamped_swiglu(linear_fc1->forward(input), swiglu_limit_));
}

}  // namespace megatron_cpp
