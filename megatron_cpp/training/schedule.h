// The order of the forward and backward passes of a step.
#pragma once

#include <cstdint>
#include <vector>

namespace megatron_cpp {

/// A forward or backward pass of one micro-batch.
struct Action {
  /// What to do.
  enum class Kind { kForward, kBackward };
  Kind kind = Kind::kForward;  ///< forward before backward of the same micro-batch
  int64_t micro_batch = 0;     ///< its number on this data-parallel rank

  bool operator==(const Action&) const = default;  ///< same kind and micro-batch
};

/// A step without pipeline: the backward pass of each micro-batch directly follows its forward pass, so that the
/// activations of only one micro-batch are kept. Trainer executes this list; a pipeline needs another.
std::vector<Action> one_after_the_other(int64_t num_micro_batches);

}  // namespace megatron_cpp
