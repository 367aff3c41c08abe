#include "megatron_cpp/tensor_parallel/embedding_look_up.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

#include <vector>

#include "megatron_cpp/tensor_parallel/rows.h"

namespace megatron_cpp::internal {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// For each row, whether it is left out.
std::vector<bool> left_out_of(int64_t num_rows, const at::Tensor& rows_left_out) {
  std::vector<bool> left_out(static_cast<size_t>(num_rows), false);
  if (!rows_left_out.defined()) return left_out;
  TORCH_CHECK_VALUE(rows_left_out.is_cpu() && rows_left_out.scalar_type() == at::kLong && rows_left_out.dim() == 1,
                    "rows_left_out must be [n] int64 on the CPU, also for ids on a GPU, got ", rows_left_out.sizes(),
                    " ", rows_left_out.scalar_type(), " on ", rows_left_out.device());
  const auto rows = rows_left_out.contiguous();
  const auto* row = rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows.numel(); ++i) {
    TORCH_CHECK_VALUE(row[i] >= 0 && row[i] < num_rows, "row ", row[i], " to leave out is not one of ", num_rows);
    left_out[static_cast<size_t>(row[i])] = true;
  }
  return left_out;
}

struct LookUpFunction : torch::autograd::Function<LookUpFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& table, const at::Tensor& output_rows,
                            const at::Tensor& table_rows, int64_t S, int64_t B, bool zero_others,
                            bool accumulate_into_grad, int64_t frozen_row) {
    context->save_for_backward({table, output_rows, table_rows});
    context->saved_data["frozen_row"] = frozen_row;
    context->saved_data["accumulate_into_grad"] = accumulate_into_grad;
    const auto options = table.options().requires_grad(false);
    auto output = zero_others ? at::zeros({S, B, table.size(1)}, options) : at::empty({S, B, table.size(1)}, options);
    copy_rows(output.view({S * B, table.size(1)}), output_rows, table, table_rows);
    return output;
  }
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), "double backward through a word embedding");
    const auto saved = context->get_saved_variables();
    const auto& table = saved[0];
    auto gradient = gather_rows(as_rows(gradients[0]), saved[1]);
    const int64_t frozen_row = context->saved_data["frozen_row"].toInt();
    if (frozen_row >= 0) gradient.masked_fill_(saved[2].eq(frozen_row).unsqueeze(1), 0);
    at::Tensor table_gradient;
    if (context->saved_data["accumulate_into_grad"].toBool() && table.grad().defined()) {
      table.grad().index_add_(0, saved[2], gradient.to(table.grad().scalar_type()));
    } else {
      table_gradient = at::zeros_like(table).index_add_(0, saved[2], gradient);
    }
    return {table_gradient, {}, {}, {}, {}, {}, {}, {}};
  }
};

}  // namespace

void check_ids(const at::Tensor& input_ids) {
  TORCH_CHECK_VALUE(input_ids.dim() == 2 && input_ids.scalar_type() == at::kLong,
                    "input_ids must be [B, S] int64, got ", input_ids.sizes(), " ", input_ids.scalar_type());
}

LookUp plan_look_up(const at::Tensor& input_ids, const at::Tensor& rows_left_out, int64_t vocabulary_size,
                    parallel::Range own, const at::Device& device) {
  const int64_t B = input_ids.size(0);
  const int64_t S = input_ids.size(1);
  const auto left_out = left_out_of(B * S, rows_left_out);
  const auto contiguous_ids = input_ids.contiguous();
  const auto* ids = contiguous_ids.const_data_ptr<int64_t>();
  std::vector<int64_t> output_rows;
  std::vector<int64_t> table_rows;
  output_rows.reserve(static_cast<size_t>(B * S));
  table_rows.reserve(static_cast<size_t>(B * S));
  for (int64_t s = 0; s < S; ++s) {
    for (int64_t b = 0; b < B; ++b) {
      const int64_t id = ids[b * S + s];
      TORCH_CHECK_VALUE(id >= 0 && id < vocabulary_size, "token id ", id, " at batch row ", b, ", position ", s,
                        " is outside the vocabulary [0, ", vocabulary_size, ")");
      if (!own.contains(id) || left_out[static_cast<size_t>(s * B + b)]) continue;
      output_rows.push_back(s * B + b);
      table_rows.push_back(id - own.begin);
    }
  }
  const auto there = index_tensors({output_rows, table_rows}, device);
  return {there[0], there[1]};
}

LookUp plan_look_up_on_device(const at::Tensor& input_ids, const at::Tensor& rows_left_out, int64_t vocabulary_size,
                              parallel::Range own) {
  const auto ids = input_ids.t().reshape({-1});
  at::_assert_async(ids.ge(0).logical_and(ids.lt(vocabulary_size)).all());
  const auto left_out = left_out_of(ids.numel(), rows_left_out);
  std::vector<int64_t> rows;
  rows.reserve(left_out.size());
  for (size_t row = 0; row < left_out.size(); ++row) {
    if (!left_out[row]) rows.push_back(static_cast<int64_t>(row));
  }
  const auto output_rows = index_tensors({rows}, ids.device())[0];
  return {output_rows, (ids - own.begin).remainder(own.length()).index_select(0, output_rows)};
}

at::Tensor look_up_rows(const at::Tensor& table, const LookUp& look_up, int64_t S, int64_t B, bool zero_others,
                        bool accumulate_into_grad) {
  return LookUpFunction::apply(table, look_up.output_rows, look_up.table_rows, S, B, zero_others, accumulate_into_grad,
                               look_up.frozen_row);
}

}  // namespace megatron_cpp::internal
