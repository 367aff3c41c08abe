#include "megatron_cpp/transformer/mlp.h"

#include <vector>

namespace megatron_cpp {

MLPImpl::MLPImpl(const TransformerConfig& config, int64_t ffn_hidden_size, double swiglu_limit,
                 const TransformerExecution& execution, const parallel::GroupPtr& tp)
    : swiglu_limit_(swiglu_limit) {
  const std::vector<OutputPart> parts{{"gate_proj", ffn_hidden_size}, {"up_proj", ffn_hidden_size}};
  const auto fc1_options = ColumnParallelLinearOptions(config.hidden_size, parts).init_std(config.init_std);
  linear_fc1 = register_module("linear_fc1", ColumnParallelLinear(execution.apply_to(fc1_options), tp));
  const auto fc2_options = RowParallelLinearOptions(ffn_hidden_size, config.hidden_size).init_std(config.init_std);
  linear_fc2 = register_module("linear_fc2", RowParallelLinear(execution.apply_to(fc2_options), tp));
}

at::Tensor MLPImpl::forward(const at::Tensor& input) {
  return linear_fc2->forward(clamped_swiglu(linear_fc1->forward(input), swiglu_limit_));
}

}  // namespace megatron_cpp
