#include "megatron_cpp/tensor_parallel/vocab_parallel_embedding.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>

#include "parallel/mappings.h"
#include "parallel/shard.h"

namespace megatron {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Which rows of the output come from which rows of the rank's weight.
struct LookUp {
  at::Tensor output_rows;  ///< [k] int64, flat numbers s*B + b
  at::Tensor weight_rows;  ///< [k] int64
};

at::Tensor to_tensor(const std::vector<int64_t>& values) {
  return at::from_blob(const_cast<int64_t*>(values.data()), {static_cast<int64_t>(values.size())}, at::kLong).clone();
}

/// For ids on the CPU: exactly the rows this rank owns.
LookUp plan_on_host(const at::Tensor& input_ids, const at::Tensor& rows_left_out, int64_t vocabulary_size,
                    parallel::Range own) {
  const int64_t B = input_ids.size(0);
  const int64_t S = input_ids.size(1);
  std::vector<bool> left_out(static_cast<size_t>(B * S), false);
  if (rows_left_out.defined()) {
    const auto rows = rows_left_out.contiguous();
    const auto* row = rows.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < rows.numel(); ++i) {
      TORCH_CHECK_VALUE(row[i] >= 0 && row[i] < B * S, "row ", row[i], " to leave out is not one of ", B * S);
      left_out[static_cast<size_t>(row[i])] = true;
    }
  }
  const auto contiguous_ids = input_ids.contiguous();
  const auto* ids = contiguous_ids.const_data_ptr<int64_t>();
  std::vector<int64_t> output_rows;
  std::vector<int64_t> weight_rows;
  for (int64_t s = 0; s < S; ++s) {
    for (int64_t b = 0; b < B; ++b) {
      const int64_t id = ids[b * S + s];
      TORCH_CHECK_VALUE(id >= 0 && id < vocabulary_size, "token id ", id, " at batch row ", b, ", position ", s,
                        " is outside the vocabulary [0, ", vocabulary_size, ")");
      if (!own.contains(id) || left_out[static_cast<size_t>(s * B + b)]) continue;
      output_rows.push_back(s * B + b);
      weight_rows.push_back(id - own.begin);
    }
  }
  return {to_tensor(output_rows), to_tensor(weight_rows)};
}

struct LookUpFunction : torch::autograd::Function<LookUpFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& weight, const at::Tensor& output_rows,
                            const at::Tensor& weight_rows, int64_t S, int64_t B, bool accumulate_into_grad) {
    context->save_for_backward({weight, output_rows, weight_rows});
    context->saved_data["accumulate_into_grad"] = accumulate_into_grad;
    auto output = at::zeros({S, B, weight.size(1)}, weight.options().requires_grad(false));
    output.view({S * B, weight.size(1)}).index_copy_(0, output_rows, weight.index_select(0, weight_rows));
    return output;
  }
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), "double backward through VocabParallelEmbedding");
    const auto saved = context->get_saved_variables();
    const auto& weight = saved[0];
    const auto gradient = gradients[0].reshape({-1, weight.size(1)}).index_select(0, saved[1]);
    at::Tensor weight_grad;
    if (context->saved_data["accumulate_into_grad"].toBool() && weight.grad().defined()) {
      weight.grad().index_add_(0, saved[2], gradient);
    } else {
      weight_grad = at::zeros_like(weight).index_add_(0, saved[2], gradient);
    }
    return {weight_grad, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

/// For ids on a GPU: every row is looked up, and those that aren't this rank's are masked, so that nothing has to come
/// back to the host.
at::Tensor masked_look_up(const at::Tensor& weight, const at::Tensor& input_ids, const at::Tensor& rows_left_out,
                          int64_t vocabulary_size, int64_t vocabulary_begin) {
  const auto ids = input_ids.t().contiguous();  // [S, B]
  at::_assert_async(ids.ge(0).logical_and(ids.lt(vocabulary_size)).all());
  const auto local = ids - vocabulary_begin;
  auto other = local.lt(0).logical_or(local.ge(weight.size(0)));
  if (rows_left_out.defined()) {
    other.view(-1).index_fill_(0, rows_left_out.to(ids.device(), /*non_blocking=*/true), true);
  }
  const auto looked_up = at::embedding(weight, local.masked_fill(other, 0));
  return looked_up.masked_fill(other.unsqueeze(-1), 0);
}

}  // namespace

int64_t padded_vocabulary_size(int64_t vocabulary_size, int t, int64_t divisible_by) {
  const int64_t multiple = t * divisible_by;
  return (vocabulary_size + multiple - 1) / multiple * multiple;
}

VocabParallelEmbeddingImpl::VocabParallelEmbeddingImpl(VocabParallelEmbeddingOptions options, parallel::GroupPtr tp)
    : options_(std::move(options)), tp_(std::move(tp)) {
  const int t = tp_->getSize();
  const int64_t rows = padded_vocabulary_size(options_.vocabulary_size(), t) / t;
  vocabulary_begin_ = rows * tp_->getRank();
  weight = register_parameter("weight", at::zeros({rows, options_.hidden_size()}));
}

at::Tensor VocabParallelEmbeddingImpl::partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out) {
  TORCH_CHECK_VALUE(input_ids.dim() == 2 && input_ids.scalar_type() == at::kLong,
                    "input_ids must be [B, S] int64, got ", input_ids.sizes(), " ", input_ids.scalar_type());
  if (!input_ids.is_cpu()) {
    return masked_look_up(weight, input_ids, rows_left_out, options_.vocabulary_size(), vocabulary_begin_);
  }
  const auto look_up = plan_on_host(input_ids, rows_left_out, options_.vocabulary_size(),
                                    {vocabulary_begin_, vocabulary_begin_ + weight.size(0)});
  return LookUpFunction::apply(weight, look_up.output_rows.to(weight.device(), /*non_blocking=*/true),
                               look_up.weight_rows.to(weight.device(), /*non_blocking=*/true), input_ids.size(1),
                               input_ids.size(0), options_.accumulate_into_grad());
}

at::Tensor VocabParallelEmbeddingImpl::reduce(const at::Tensor& partial) {
  if (!options_.sequence_parallel()) return parallel::reduce_from_tensor_model_parallel_region(partial, tp_);
  parallel::even_shard_size(partial.size(0), tp_->getSize(), "sequence length");
  return parallel::reduce_scatter_to_sequence_parallel_region(partial, tp_);
}

at::Tensor VocabParallelEmbeddingImpl::forward(const at::Tensor& input_ids) { return reduce(partial(input_ids)); }

std::vector<ParameterShard> VocabParallelEmbeddingImpl::own_parameters() const {
  const int64_t V = options_.vocabulary_size();
  auto shard = sharded_parameter("weight", weight, {V, options_.hidden_size()}, 0, vocabulary_begin_,
                                 InitialValue::normal(options_.init_std()), true);
  auto& segment = shard.segments.front();
  segment.global_begin = std::min(vocabulary_begin_, V);
  segment.length = std::clamp<int64_t>(V - vocabulary_begin_, 0, weight.size(0));
  return {std::move(shard)};
}

}  // namespace megatron
