// Root-mean-square norm whose weight is the scale minus 1.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <vector>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "parallel/group.h"

namespace megatron_cpp {

/// The domain for a norm of the hidden states: under sequence parallelism a rank norms its own rows only, so that it
/// has a part of the weight's gradient (kReplicatedPartial, if t > 1), otherwise kReplicated.
GradientDomain hidden_norm_domain(bool sequence_parallel, const parallel::GroupPtr& tp);

/// y = x / sqrt(mean(x²) + eps) * (1 + weight), over the last dimension; computed in float32 (float64 for float64
/// inputs) and rounded once. `weight` starts at zero and gets no weight decay.
/// Saved for backward: x and one float32 per row.
class RMSNormImpl : public ParallelModule {
 public:
  /// @param size  of the last dimension.
  /// @param domain  kReplicated or kReplicatedPartial; follows from how the norm is used.
  /// @throws c10::ValueError if size isn't positive or `domain` is kSharded.
  RMSNormImpl(int64_t size, double eps, GradientDomain domain);

  /// @param input  [.., size].
  /// @return       the same shape and dtype.
  /// No communication. Throws c10::ValueError if input.size(-1) != size; double backward throws
  /// c10::NotImplementedError.
  at::Tensor forward(const at::Tensor& input);

  std::vector<ParameterShard> own_parameters() const override;

  at::Tensor weight;  ///< [size]

 private:
  double eps_;
  GradientDomain domain_;
};
TORCH_MODULE(RMSNorm);

}  // namespace megatron_cpp
