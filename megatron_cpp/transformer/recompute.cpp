#include "megatron_cpp/transformer/recompute.h"

#include <ATen/ATen.h>
#include <ATen/core/ivalue.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <memory>
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

/// A tensor's values, which whoever shares its storage loses and gets back.
struct Intermediate {
  std::function<at::Tensor(const at::Tensor&)> produce;
  torch::autograd::SavedVariable input;  ///< cut off from the graph; throws if it has been written to
  c10::Storage storage;
  bool is_freed = false;

  void free() {
    storage.set_data_ptr_noswap({nullptr, storage.device()});
    is_freed = true;
  }
  void compute_again() {
    if (!is_freed) return;
    const c10::NoGradGuard no_grad;
    const auto again = produce(input.unpack()).storage();
    TORCH_CHECK(again.nbytes() == storage.nbytes(), "recompute_between: ", storage.nbytes(), " bytes, then ",
                again.nbytes());
    storage.set_data_ptr_noswap(again.set_data_ptr({nullptr, again.device()}));
    is_freed = false;
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

std::vector<at::Tensor> recompute_between(const std::function<at::Tensor(const at::Tensor&)>& produce,
                                          const at::Tensor& input,
                                          const std::function<std::vector<at::Tensor>(const at::Tensor&)>& consume) {
  const auto produced = produce(input);
  auto outputs = consume(produced);
  if (!produced.requires_grad()) return outputs;
  TORCH_INTERNAL_ASSERT(!produced.is_alias_of(input));
  const auto between =
      std::make_shared<Intermediate>(Intermediate{produce, {input.detach(), /*is_output=*/false}, produced.storage()});
  for (const auto& output : outputs) {
    if (!output.defined() || !output.requires_grad()) continue;
    TORCH_INTERNAL_ASSERT(!output.is_alias_of(produced));
    output.register_hook([between](const at::Tensor& /*gradient*/) { between->compute_again(); });
  }
  // The hooks may outlive their use: a graph is there as long as its loss.
  produced.register_hook([between](const at::Tensor& /*gradient*/) {
    if (!torch::autograd::get_current_graph_task_keep_graph()) *between = {};
  });
  between->free();
  return outputs;
}

}  // namespace megatron_cpp
