#include "megatron_cpp/transformer/mlp.h"

#include <vector>

#include "megatron_cpp/transformer/recompute.h"
#include "parallel/named_range.h"

namespace megatron_cpp {

MLPImpl::MLPImpl(const TransformerConfig& config, int64_t ffn_hidden_size, double swiglu_limit,
                 const TransformerExecution& execution, const parallel::GroupPtr& tp)
    : swiglu_limit_(swiglu_limit), is_recomputed_(execution.recomputed.mlp) {
  const std::vector<OutputPart> parts{{"gate_proj", ffn_hidden_size}, {"up_proj", ffn_hidden_size}};
  const auto fc1_options = ColumnParallelLinearOptions(config.hidden_size, parts).init_std(config.init_std);
  linear_fc1 = register_module("linear_fc1", ColumnParallelLinear(execution.apply_to(fc1_options), tp));
  const auto fc2_options = RowParallelLinearOptions(ffn_hidden_size, config.hidden_size).init_std(config.init_std);
  linear_fc2 = register_module("linear_fc2", RowParallelLinear(execution.apply_to(fc2_options), tp));
}

at::Tensor MLPImpl::forward(const at::Tensor& input) {
  const RecomputedBody compute = [fc1 = linear_fc1, fc2 = linear_fc2, limit = swiglu_limit_](const auto& inputs) {
    const auto gate_and_up = parallel::in_range("fc1", [&] { return fc1.ptr()->forward(inputs[0]); });
    const auto activated = parallel::in_range("swiglu", [&] { return clamped_swiglu(gate_and_up, limit); });
    return std::vector{parallel::in_range("fc2", [&] { return fc2.ptr()->forward(activated); })};
  };
  return (is_recomputed_ ? recompute(compute, {input}, parameters()) : compute({input}))[0];
}

}  // namespace megatron_cpp
