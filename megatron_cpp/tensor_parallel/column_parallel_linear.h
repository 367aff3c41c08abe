// A linear layer whose output columns are split over the tensor-parallel group.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "parallel/group.h"

namespace megatron_cpp {

/// One of several matrices that are stacked in a fused weight (q, k and v in one product).
struct OutputPart {
  std::string name;      ///< the matrix's name in checkpoints, below the layer's ("q_proj")
  int64_t out_features;  ///< over all ranks
};

/// Sizes over all ranks, and what is done with input and output.
struct ColumnParallelLinearOptions {
  /// A plain weight [out_features, in_features].
  ColumnParallelLinearOptions(int64_t in_features, int64_t out_features)
      : in_features_(in_features), out_features_(out_features) {}
  /// A fused weight: each part is split over the ranks, so that a rank's output holds its columns of each part.
  ColumnParallelLinearOptions(int64_t in_features, std::vector<OutputPart> parts);

  TORCH_ARG(int64_t, in_features);   ///< C
  TORCH_ARG(int64_t, out_features);  ///< F, over all ranks; the sum of the parts
  /// Empty for a plain weight.
  TORCH_ARG(std::vector<OutputPart>, parts);
  TORCH_ARG(bool, bias) = false;  ///< sharded like the columns, starts at 0
  /// Round out_features up to F' = padded_vocabulary_size(F, t): for an output layer over a vocabulary. Not for parts.
  TORCH_ARG(bool, pad_out_features) = false;
  /// The input is this rank's rows of the sequence.
  TORCH_ARG(bool, sequence_parallel) = false;
  /// Gather the output's columns, so that every rank has all.
  TORCH_ARG(bool, gather_output) = false;
  /// Backward adds into the parameters' existing gradients and gives autograd none: for training loops that keep
  /// gradients between micro-batches.
  TORCH_ARG(bool, accumulate_into_grad) = false;
  /// Standard deviation of the initial weights.
  TORCH_ARG(double, init_std) = 0.02;
};

/// Y = X Aᵀ + b, A [F, C] split by rows over `tp`: rank r of t holds rows [r·F/t, (r+1)·F/t) (of each part).
/// With pad_out_features all shapes have F' instead of F; rows of the padding are zero, and no checkpoint has them.
class ColumnParallelLinearImpl : public ParallelModule {
 public:
  /// @throws c10::ValueError if F, or a part of it, is not divisible by t (without pad_out_features), or
  ///         pad_out_features or gather_output goes with parts.
  ColumnParallelLinearImpl(ColumnParallelLinearOptions options, parallel::GroupPtr tp);

  /// @param input  [.., C], equal on every rank; with sequence_parallel [S/t, .., C], this rank's rows of S.
  /// @return       [.., F/t], this rank's columns; with gather_output [.., F].
  /// Comm: backward 1 all-reduce of the input's elements if it needs a gradient; sequence_parallel: forward 1
  /// all-gather, backward 1 reduce-scatter, and 1 all-gather if the weight needs a gradient. gather_output: forward 1
  /// all-gather of the output (its gradient must be the same on every rank).
  /// Collective over tp. Throws c10::ValueError, before anything is sent, if input.size(-1) != C.
  at::Tensor forward(const at::Tensor& input);

  std::vector<ParameterShard> own_parameters() const override;

  at::Tensor weight;  ///< [F/t, C]
  at::Tensor bias;    ///< [F/t], undefined without bias

 private:
  ColumnParallelLinearOptions options_;
  parallel::GroupPtr tp_;
};
TORCH_MODULE(ColumnParallelLinear);

}  // namespace megatron_cpp
