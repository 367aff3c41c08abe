#include "megatron_cpp/transformer/moe/experts.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

#include <functional>
#include <utility>

#include "megatron_cpp/tensor_parallel/matrix_product.h"
#include "megatron_cpp/transformer/swiglu.h"

namespace megatron_cpp {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Calls visit(expert, places in `order`) for every expert that has tokens.
void for_each_expert(const std::vector<int64_t>& counts, const std::function<void(int64_t, parallel::Range)>& visit) {
  int64_t begin = 0;
  for (size_t expert = 0; expert < counts.size(); ++expert) {
    if (counts[expert] > 0) visit(static_cast<int64_t>(expert), {begin, begin + counts[expert]});
    begin += counts[expert];
  }
}

at::Tensor rows_of(const at::Tensor& tensor, parallel::Range range) {
  return tensor.narrow(0, range.begin, range.length());
}

struct ExpertsFunction : torch::autograd::Function<ExpertsFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& rows, const at::Tensor& weights,
                            const at::Tensor& fc1, const at::Tensor& fc2, const at::Tensor& order,
                            const std::vector<int64_t>& counts, double limit, bool accumulate_into_grad) {
    const auto tokens = order.div(weights.size(1), "floor");
    const auto scale = weights.reshape({-1}).index_select(0, order).unsqueeze(1);
    auto gate_up = at::empty({order.size(0), fc1.size(1)}, rows.options().requires_grad(false));
    auto sum = at::zeros(rows.sizes(), scale.options());
    for_each_expert(counts, [&](int64_t expert, parallel::Range range) {
      const auto own = rows_of(tokens, range);
      const auto hidden = internal::linear_product(rows.index_select(0, own), fc1[expert], {});
      rows_of(gate_up, range).copy_(hidden);
      // Before the second product: backward then needs no output of it.
      const auto weighted = (internal::swiglu_product(hidden, limit) * rows_of(scale, range)).to(rows.scalar_type());
      sum.index_add_(0, own, internal::linear_product(weighted, fc2[expert], {}).to(sum.scalar_type()));
    });
    context->save_for_backward({rows, weights, fc1, fc2, order, gate_up});
    context->saved_data["counts"] = counts;
    context->saved_data["limit"] = limit;
    context->saved_data["accumulate_into_grad"] = accumulate_into_grad;
    return sum.to(rows.scalar_type());
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), "double backward through a mixture of experts");
    const auto saved = context->get_saved_variables();
    const auto& rows = saved[0];
    const auto& weights = saved[1];
    const auto& fc1 = saved[2];
    const auto& fc2 = saved[3];
    const auto& order = saved[4];
    const auto& gate_up = saved[5];
    const auto counts = context->saved_data["counts"].toIntVector();
    const double limit = context->saved_data["limit"].toDouble();
    const bool accumulates = context->saved_data["accumulate_into_grad"].toBool();
    const bool needs_rows = context->needs_input_grad(0);
    const bool needs_weights = context->needs_input_grad(1);
    const auto gradient_of = [&](size_t input, const at::Tensor& parameter) {
      if (!context->needs_input_grad(input)) return at::Tensor();
      return accumulates && parameter.grad().defined() ? parameter.grad() : at::zeros_like(parameter);
    };
    const auto fc1_gradient = gradient_of(2, fc1);
    const auto fc2_gradient = gradient_of(3, fc2);
    const auto tokens = order.div(weights.size(1), "floor");
    const auto scale = weights.reshape({-1}).index_select(0, order).unsqueeze(1);
    const auto wide = scale.scalar_type();
    auto rows_gradient = needs_rows ? at::zeros(rows.sizes(), scale.options()) : at::Tensor();
    auto scale_gradient = at::zeros(order.sizes(), scale.options());
    for_each_expert(counts, [&](int64_t expert, parallel::Range range) {
      const auto own = rows_of(tokens, range);
      const auto hidden = rows_of(gate_up, range);
      const auto gradient = gradients[0].index_select(0, own);
      const auto activated = internal::swiglu_product(hidden, limit);
      const auto weighted_gradient = internal::matrix_product(gradient, fc2[expert]);
      if (needs_weights) {
        rows_of(scale_gradient, range).copy_((weighted_gradient.to(wide) * activated).sum(-1));
      }
      if (fc2_gradient.defined()) {
        const auto weighted = (activated * rows_of(scale, range)).to(rows.scalar_type());
        internal::add_matrix_product(fc2_gradient[expert], gradient.t(), weighted);
      }
      if (!needs_rows && !fc1_gradient.defined()) return;
      const auto activated_gradient = (weighted_gradient * rows_of(scale, range)).to(rows.scalar_type());
      const auto hidden_gradient = internal::swiglu_gradient(activated_gradient, hidden, limit);
      if (fc1_gradient.defined()) {
        internal::add_matrix_product(fc1_gradient[expert], hidden_gradient.t(), rows.index_select(0, own));
      }
      if (needs_rows) {
        rows_gradient.index_add_(0, own, internal::matrix_product(hidden_gradient, fc1[expert]).to(wide));
      }
    });
    at::Tensor weights_gradient;
    if (needs_weights) {
      weights_gradient = at::zeros({weights.numel()}, scale.options()).index_copy_(0, order, scale_gradient);
      weights_gradient = weights_gradient.view(weights.sizes());
    }
    if (needs_rows) rows_gradient = rows_gradient.to(rows.scalar_type());
    const auto to_autograd = [&](const at::Tensor& gradient, const at::Tensor& parameter) {
      return gradient.defined() && gradient.is_same(parameter.grad()) ? at::Tensor() : gradient;
    };
    return {rows_gradient,
            weights_gradient,
            to_autograd(fc1_gradient, fc1),
            to_autograd(fc2_gradient, fc2),
            {},
            {},
            {},
            {}};
  }
};

}  // namespace

GroupedExpertsImpl::GroupedExpertsImpl(const TransformerConfig& config, double swiglu_limit,
                                       const TransformerExecution& execution, const ModelGroups& groups)
    : config_(config.moe.value()),
      hidden_size_(config.hidden_size),
      init_std_(config.init_std),
      swiglu_limit_(swiglu_limit),
      accumulate_into_grad_(execution.accumulate_into_grad) {
  experts_ =
      parallel::even_shard(config_.num_experts, groups.ep_size(), groups.ep_rank(), "num_experts", "expert-parallel");
  columns_ = parallel::even_shard(config_.ffn_hidden_size, groups.etp->getSize(), groups.etp->getRank(),
                                  "the experts' ffn_hidden_size", "expert-tensor-parallel");
  const int64_t own_experts = experts_.length();
  const int64_t own_columns = columns_.length();
  linear_fc1 = register_parameter("linear_fc1", at::zeros({own_experts, 2 * own_columns, hidden_size_}));
  linear_fc2 = register_parameter("linear_fc2", at::zeros({own_experts, hidden_size_, own_columns}));
}

at::Tensor GroupedExpertsImpl::forward(const ExpertTokens& tokens) {
  use_parameters();
  return ExpertsFunction::apply(tokens.rows, tokens.weights, linear_fc1, linear_fc2, tokens.order, tokens.counts,
                                swiglu_limit_, accumulate_into_grad_);
}

std::vector<ParameterShard> GroupedExpertsImpl::own_parameters() const {
  const int64_t E = config_.num_experts;
  const int64_t I = config_.ffn_hidden_size;
  const int64_t own_experts = experts_.length();
  const int64_t own_columns = columns_.length();
  const auto rows_of_first = [&](const char* name, int64_t local_begin) {
    const Box box{{experts_.begin, columns_.begin, 0}, {own_experts, own_columns, hidden_size_}};
    return ParameterSegment{name, {E, I, hidden_size_}, box, {0, local_begin, 0}};
  };
  const Box second{{experts_.begin, 0, columns_.begin}, {own_experts, hidden_size_, own_columns}};
  const auto initial_value = InitialValue::normal(init_std_);
  return {{.name = "linear_fc1",
           .parameter = linear_fc1,
           .domain = GradientDomain::kExpert,
           .segments = {rows_of_first("gate_proj.weight", 0), rows_of_first("up_proj.weight", own_columns)},
           .initial_value = initial_value},
          {.name = "linear_fc2",
           .parameter = linear_fc2,
           .domain = GradientDomain::kExpert,
           .segments = {{"down_proj.weight", {E, hidden_size_, I}, second, {0, 0, 0}}},
           .initial_value = initial_value}};
}

}  // namespace megatron_cpp
