#include "megatron_cpp/tensor_parallel/linear_function.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <utility>

#include "megatron_cpp/tensor_parallel/matrix_product.h"
#include "parallel/collectives.h"

namespace megatron_cpp::internal {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// gradientᵀ · input, added into the weight's gradient or returned.
at::Tensor weight_gradient(const at::Tensor& weight, const at::Tensor& gradient, const at::Tensor& input,
                           bool accumulate_into_grad) {
  const auto rows = as_matrix(gradient).t();
  if (accumulate_into_grad && weight.grad().defined()) {
    add_matrix_product(weight.grad(), rows, as_matrix(input));
    return {};
  }
  return matrix_product(rows, as_matrix(input));
}

at::Tensor bias_gradient(const at::Tensor& bias, const at::Tensor& gradient, bool accumulate_into_grad) {
  if (accumulate_into_grad && bias.grad().defined()) {
    bias.grad().add_(as_matrix(gradient).sum(0, /*keepdim=*/false, bias.grad().scalar_type()));
    return {};
  }
  return as_matrix(gradient).sum(0);
}

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& input, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, int64_t input_kind, bool accumulate_into_grad,
                            const parallel::GroupPtr& group) {
    context->save_for_backward({input, weight, bias.value_or(at::Tensor())});
    context->saved_data["input_kind"] = input_kind;
    context->saved_data["accumulate_into_grad"] = accumulate_into_grad;
    context->saved_data["group"] = group;
    const bool gather = static_cast<LinearInput>(input_kind) == LinearInput::kSequenceParallel;
    const auto whole = gather ? parallel::all_gather(input, group) : input;
    return linear_product(whole, weight, bias.value_or(at::Tensor()));
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), "double backward through a tensor-parallel linear layer");
    const auto saved = context->get_saved_variables();
    const auto& input = saved[0];
    const auto& weight = saved[1];
    const auto& bias = saved[2];
    const auto input_kind = static_cast<LinearInput>(context->saved_data["input_kind"].toInt());
    const bool accumulate = context->saved_data["accumulate_into_grad"].toBool();
    const auto group = context->saved_data["group"].toCustomClass<c10d::ProcessGroup>();
    const bool needs_input = context->needs_input_grad(0);
    const bool needs_weight = context->needs_input_grad(1);
    const auto gradient = gradients[0].contiguous();

    std::optional<parallel::PendingTensor> gathered;
    if (needs_weight && input_kind == LinearInput::kSequenceParallel)
      gathered = parallel::start_all_gather(input, group);
    at::Tensor input_gradient;
    std::optional<parallel::PendingTensor> reduced;
    if (needs_input) {
      input_gradient = matrix_product(gradient, weight);
      if (input_kind == LinearInput::kReplicated) {
        reduced = parallel::start_all_reduce_in_place(input_gradient, group);
      }
      if (input_kind == LinearInput::kSequenceParallel) reduced = parallel::start_reduce_scatter(input_gradient, group);
    }
    at::Tensor weight_grad;
    at::Tensor bias_grad;
    if (needs_weight) weight_grad = weight_gradient(weight, gradient, gathered ? gathered->wait() : input, accumulate);
    if (bias.defined() && context->needs_input_grad(2)) bias_grad = bias_gradient(bias, gradient, accumulate);
    if (reduced) input_gradient = reduced->wait();
    return {input_gradient, weight_grad, bias_grad, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor linear_with_communication(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                                     LinearInput input_kind, bool accumulate_into_grad,
                                     const parallel::GroupPtr& group) {
  TORCH_CHECK_VALUE(input.dim() >= 1 && input.size(-1) == weight.size(1), "linear layer: input ", input.sizes(),
                    " does not have the ", weight.size(1), " columns that the weight ", weight.sizes(), " takes");
  // An undefined tensor is no argument of an autograd function; an empty optional is.
  const auto given_bias = bias.defined() ? std::optional<at::Tensor>(bias) : std::nullopt;
  return LinearFunction::apply(input, weight, given_bias, static_cast<int64_t>(input_kind), accumulate_into_grad,
                               group);
}

}  // namespace megatron_cpp::internal
