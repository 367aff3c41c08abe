// A linear layer whose input columns are split over the tensor-parallel group.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <vector>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "parallel/group.h"

namespace megatron_cpp {

/// Sizes over all ranks, and what is done with input and output.
struct RowParallelLinearOptions {
  /// A weight [out_features, in_features].
  RowParallelLinearOptions(int64_t in_features, int64_t out_features)
      : in_features_(in_features), out_features_(out_features) {}

  TORCH_ARG(int64_t, in_features);   ///< C, over all ranks
  TORCH_ARG(int64_t, out_features);  ///< F
  TORCH_ARG(bool, bias) = false;     ///< whole on every rank, starts at 0
  /// The output becomes this rank's rows of the sequence.
  TORCH_ARG(bool, sequence_parallel) = false;
  /// The input is this rank's columns already; otherwise every rank has the whole input and takes its columns.
  TORCH_ARG(bool, input_is_parallel) = true;
  /// Sum the ranks' products; otherwise the output is this rank's summand, the bias in that of rank 0.
  TORCH_ARG(bool, reduce_output) = true;
  /// Backward adds into the weight's existing gradient and gives autograd none. The bias uses autograd.
  TORCH_ARG(bool, accumulate_into_grad) = false;
  TORCH_ARG(double, init_std) = 0.02;  ///< standard deviation of the initial weights
};

/// Y = X Aᵀ + b, A [F, C] split by columns over `tp`: rank r of t holds columns [r·C/t, (r+1)·C/t).
class RowParallelLinearImpl : public ParallelModule {
 public:
  /// @throws c10::ValueError if C is not divisible by t, or sequence_parallel goes with an input that isn't parallel.
  RowParallelLinearImpl(RowParallelLinearOptions options, parallel::GroupPtr tp);

  /// @param input  [S, .., C/t], this rank's columns; [S, .., C] with input_is_parallel(false).
  /// @return       [S, .., F], equal on every rank; [S/t, .., F] with sequence_parallel; this rank's summand [S, .., F]
  ///               without reduce_output.
  /// Comm: forward 1 all-reduce of the output's elements; sequence_parallel: forward 1 reduce-scatter, backward 1
  /// all-gather of them; input_is_parallel(false): backward 1 all-gather of the input's elements. Without reduce_output
  /// the output isn't communicated: the caller sums, and must pass back the gradient of the sum, the same on every
  /// rank. Collective over tp. Throws c10::ValueError, before anything is sent, if sizes don't fit (S % t with
  /// sequence_parallel).
  at::Tensor forward(const at::Tensor& input);

  std::vector<ParameterShard> own_parameters() const override;

  at::Tensor weight;  ///< [F, C/t]
  at::Tensor bias;    ///< [F], on every rank; undefined without bias. Added once to the sum.

 private:
  RowParallelLinearOptions options_;
  parallel::GroupPtr tp_;
};
TORCH_MODULE(RowParallelLinear);

}  // namespace megatron_cpp
