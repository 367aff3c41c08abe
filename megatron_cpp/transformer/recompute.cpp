#include "megatron_cpp/transformer/recompute.h"

#include <ATen/ATen.h>
#include <ATen/core/ivalue.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <utility>

namespace megatron_cpp {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// What the backward pass needs besides tensors.
struct Recomputation : torch::CustomClassHolder {
  Recomputation(RecomputedBody recomputed, size_t inputs) : body(std::move(recomputed)), num_inputs(inputs) {}

  RecomputedBody body;
  size_t num_inputs;
};

using RecomputationPtr = c10::intrusive_ptr<Recomputation>;

variable_list without_history(at::TensorList tensors) {
  variable_list result;
  for (const auto& tensor : tensors) result.push_back(tensor.detach());
  return result;
}

struct RecomputeFunction : torch::autograd::Function<RecomputeFunction> {
  /// @param tensors  the inputs, then the parameters.
  static variable_list forward(AutogradContext* context, at::TensorList tensors,
                               const RecomputationPtr& recomputation) {
    context->save_for_backward(tensors.vec());
    context->saved_data["recomputation"] = c10::IValue::make_capsule(recomputation);
    context->set_materialize_grads(false);
    return recomputation->body(without_history(tensors.slice(0, recomputation->num_inputs)));
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), "double backward through recompute");
    const auto saved = context->get_saved_variables();
    const auto capsule = context->saved_data["recomputation"].toCapsule();
    const auto& recomputation = static_cast<const Recomputation&>(*capsule);
    auto tensors = saved;
    variable_list wanted;
    std::vector<size_t> places;
    for (size_t i = 0; i < tensors.size(); ++i) {
      const bool is_input = i < recomputation.num_inputs;
      if (is_input) tensors[i] = saved[i].detach();
      if (!context->needs_input_grad(i)) continue;
      if (is_input) tensors[i].requires_grad_();
      wanted.push_back(tensors[i]);
      places.push_back(i);
    }
    variable_list outputs;
    {
      const c10::AutoGradMode with_gradients(true);
      outputs = recomputation.body(at::TensorList(tensors).slice(0, recomputation.num_inputs).vec());
    }
    TORCH_CHECK(outputs.size() == gradients.size(), "recompute: the body gave ", gradients.size(), " tensors, then ",
                outputs.size());
    variable_list roots;
    variable_list root_gradients;
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (!gradients[i].defined() || !outputs[i].requires_grad()) continue;
      roots.push_back(outputs[i]);
      root_gradients.push_back(gradients[i]);
    }
    outputs.clear();
    variable_list result(tensors.size() + 1);
    if (roots.empty() || wanted.empty()) return result;
    const auto found = torch::autograd::grad(roots, wanted, root_gradients, /*retain_graph=*/false,
                                             /*create_graph=*/false, /*allow_unused=*/true);
    for (size_t i = 0; i < places.size(); ++i) result[places[i]] = found[i];
    return result;
  }
};

}  // namespace

std::vector<at::Tensor> recompute(const RecomputedBody& body, const std::vector<at::Tensor>& inputs,
                                  const std::vector<at::Tensor>& parameters) {
  if (!c10::GradMode::is_enabled()) return body(inputs);
  auto tensors = inputs;
  // Others may change until the backward pass.
  std::copy_if(parameters.begin(), parameters.end(), std::back_inserter(tensors),
               [](const auto& parameter) { return parameter.requires_grad(); });
  return RecomputeFunction::apply(at::TensorList(tensors), c10::make_intrusive<Recomputation>(body, inputs.size()));
}

}  // namespace megatron_cpp
