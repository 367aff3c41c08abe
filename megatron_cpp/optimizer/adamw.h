// AdamW over a model's parameters.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "megatron_cpp/tensor_parallel/parameter_shard.h"

namespace megatron {

struct AdamWOptions {
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  double weight_decay = 0.1;  ///< not applied where ParameterShard::weight_decay is false

  /// @throws c10::ValueError naming the value that is out of range.
  void validate() const;
};

/// Decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), by LibTorch's fused kernel. Each rank updates its
/// own parameters from their .grad; equal replicas stay equal because their gradients are.
class AdamW {
 public:
  AdamW(std::vector<ParameterShard> parameters, const AdamWOptions& options);

  /// One update. Not collective.
  void step(double learning_rate);

  /// The moments of one parameter; of its shape, dtype and device.
  struct Moments {
    at::Tensor exp_avg;
    at::Tensor exp_avg_sq;
  };
  const std::vector<ParameterShard>& parameters() const { return parameters_; }
  const std::vector<Moments>& moments() const { return moments_; }
  /// Updates so far.
  int64_t num_steps() const { return num_steps_; }
  /// For resuming: continues as if this many updates had been made. The moments are restored in place.
  void set_num_steps(int64_t num_steps) { num_steps_ = num_steps; }

 private:
  std::vector<ParameterShard> parameters_;
  std::vector<Moments> moments_;
  AdamWOptions options_;
  int64_t num_steps_ = 0;
};

}  // namespace megatron
