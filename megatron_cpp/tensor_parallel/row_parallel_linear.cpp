#include "megatron_cpp/tensor_parallel/row_parallel_linear.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

#include <utility>

#include "megatron_cpp/tensor_parallel/linear_function.h"
#include "parallel/mappings.h"
#include "parallel/shard.h"

namespace megatron_cpp {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Adds `bias` [F] to `summand` [.., F] if `adds`, which is true on one of the ranks whose summands are summed. All
/// ranks get the gradient of the sum, and so the whole gradient of the bias.
struct AddToSum : torch::autograd::Function<AddToSum> {
  static at::Tensor forward(AutogradContext* context, at::Tensor summand, const at::Tensor& bias, bool adds) {
    context->mark_dirty({summand});
    return adds ? summand.add_(bias) : summand;
  }
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const auto& gradient = gradients[0];
    at::Tensor bias_gradient;
    if (context->needs_input_grad(1)) bias_gradient = gradient.reshape({-1, gradient.size(-1)}).sum(0);
    return {gradient, bias_gradient, {}};
  }
};

}  // namespace

RowParallelLinearImpl::RowParallelLinearImpl(RowParallelLinearOptions options, parallel::GroupPtr tp)
    : options_(std::move(options)), tp_(std::move(tp)) {
  const int64_t columns = parallel::even_shard_size(options_.in_features(), tp_->getSize(), "in_features");
  TORCH_CHECK_VALUE(!options_.sequence_parallel() || options_.input_is_parallel(),
                    "sequence_parallel needs an input that is parallel: input_is_parallel(true)");
  weight = register_parameter("weight", at::zeros({options_.out_features(), columns}));
  bias = register_parameter("bias", options_.bias() ? at::zeros({options_.out_features()}) : at::Tensor(),
                            options_.bias());
}

at::Tensor RowParallelLinearImpl::forward(const at::Tensor& input) {
  use_parameters();
  if (options_.reduce_output() && options_.sequence_parallel()) {
    parallel::even_shard_size(input.size(0), tp_->getSize(), "sequence length");
  }
  const auto own = options_.input_is_parallel() ? input : parallel::scatter_to_tensor_model_parallel_region(input, tp_);
  auto output = internal::linear_with_communication(own, weight, {}, internal::LinearInput::kOwn,
                                                    options_.accumulate_into_grad(), tp_);
  if (!options_.reduce_output()) {
    return options_.bias() ? AddToSum::apply(output, bias, tp_->getRank() == 0) : output;
  }
  output = options_.sequence_parallel() ? parallel::reduce_scatter_to_sequence_parallel_region(output, tp_)
                                        : parallel::reduce_from_tensor_model_parallel_region(output, tp_);
  return options_.bias() ? output + bias : output;
}

std::vector<ParameterShard> RowParallelLinearImpl::own_parameters() const {
  const auto range = parallel::even_shard(options_.in_features(), tp_->getSize(), tp_->getRank(), "in_features");
  std::vector<ParameterShard> result{sharded_parameter("weight", weight,
                                                       {options_.out_features(), options_.in_features()}, 1,
                                                       range.begin, InitialValue::normal(options_.init_std()), true)};
  if (options_.bias()) {
    // Under sequence parallelism a rank adds the bias to its own rows only.
    const bool own_rows = options_.sequence_parallel() && options_.reduce_output();
    const auto domain = own_rows ? GradientDomain::kReplicatedPartial : GradientDomain::kReplicated;
    result.push_back(replicated_parameter("bias", bias, domain, InitialValue::constant(0.0), false));
  }
  return result;
}

}  // namespace megatron_cpp
