// The dense feed-forward of a decoder layer, or the shared expert of a mixture of experts.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <cstdint>

#include "megatron_cpp/tensor_parallel/column_parallel_linear.h"
#include "megatron_cpp/tensor_parallel/row_parallel_linear.h"
#include "megatron_cpp/transformer/execution.h"
#include "megatron_cpp/transformer/swiglu.h"
#include "megatron_cpp/transformer/transformer_config.h"
#include "parallel/group.h"

namespace megatron_cpp {

/// linear_fc2(clamped_swiglu(linear_fc1(x))), F split over `tp`: rank r of t computes columns [r·F/t, (r+1)·F/t) of
/// gate_proj and up_proj (one fused product) and their summand of down_proj (linear_fc2.weight).
class MLPImpl : public torch::nn::Module {
 public:
  /// @param ffn_hidden_size  F; not read from `config`, which has it for dense layers only.
  /// @param swiglu_limit     0: no clamp.
  /// @throws c10::ValueError if ffn_hidden_size is not divisible by t.
  MLPImpl(const TransformerConfig& config, int64_t ffn_hidden_size, double swiglu_limit,
          const TransformerExecution& execution, const parallel::GroupPtr& tp);

  /// @param input  [S, B, H], equal on every rank; with sequence_parallel [S/t, B, H], this rank's rows.
  /// @return       the same shape.
  /// Comm: forward 1 all-reduce of S·B·H elements, backward 1; sequence_parallel: forward 1 all-gather and 1
  /// reduce-scatter, backward 2 all-gathers (1 if linear_fc1 needs no gradient) and 1 reduce-scatter. Collective over
  /// tp. A recomputed one's forward pass once more in the backward pass.
  at::Tensor forward(const at::Tensor& input);

  ColumnParallelLinear linear_fc1{nullptr};  ///< gate_proj [F, H] and up_proj [F, H]
  RowParallelLinear linear_fc2{nullptr};     ///< down_proj [H, F]

 private:
  double swiglu_limit_;
  bool is_recomputed_;
};
TORCH_MODULE(MLP);

}  // namespace megatron_cpp
