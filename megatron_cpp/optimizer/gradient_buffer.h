// The gradients of all parameters in one buffer: accumulated in place, completed by at most two collectives a step.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "parallel/group.h"

namespace megatron {

/// Owns one flat tensor and makes every trainable parameter's .grad a view of it, so that backward (with or without
/// accumulate_into_grad) adds into it, micro-batch after micro-batch. Parameters that need no gradient have no place.
class GradientBuffer {
 public:
  /// @param parameters  all of one dtype and device.
  /// @throws c10::ValueError naming a parameter of another dtype or device, or if none needs a gradient.
  GradientBuffer(const std::vector<ParameterShard>& parameters, parallel::GroupPtr tp, parallel::GroupPtr dp,
                 parallel::GroupPtr tp_dp);

  /// Sets all gradients to 0 and re-attaches the views. Not collective.
  void zero();

  /// Completes the gradients after the last micro-batch of a step: sums over dp; GradientRule::kReplicatedPartial over
  /// tp and dp together. Sums, no averages: the loss is divided by the tokens of the global batch before backward.
  /// Comm: 1 all-reduce over dp and 1 over tp_dp, each of the elements that need it and of the padding between them.
  /// Collective over tp_dp.
  void reduce();

  /// The L2 norm of the whole model's gradient, every parameter counted once however it is sharded or replicated.
  /// Comm: 1 all-reduce of one element over tp. Collective over tp. After reduce(). Waits for the device.
  double norm() const;

  /// The square of norm(), [1] float64 on the parameters' device, which isn't waited for: a training step reads it
  /// together with its loss. Comm: as norm().
  at::Tensor squared_norm() const;

  /// Multiplies all gradients by `factor`. Not collective.
  void scale(double factor);

  /// The trainable parameters, in the buffer's order.
  const std::vector<ParameterShard>& parameters() const { return parameters_; }

 private:
  /// Elements from the beginning of one gradient to that of the next.
  int64_t place_of(const ParameterShard& shard) const;

  std::vector<ParameterShard> parameters_;  ///< whole or sharded gradients first, partial ones last
  parallel::GroupPtr tp_;
  parallel::GroupPtr dp_;
  parallel::GroupPtr tp_dp_;
  at::Tensor buffer_;          ///< with padding, which is always 0
  int64_t partial_begin_ = 0;  ///< first element of the partial gradients
};

}  // namespace megatron
