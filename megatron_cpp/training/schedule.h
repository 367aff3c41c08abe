// The order of the forward and backward passes of a step.
#pragma once

#include <cstdint>
#include <vector>

namespace megatron_cpp {

/// One thing to do with one micro-batch.
struct Action {
  /// What to do.
  enum class Kind { kForward, kBackward };
  Kind kind = Kind::kForward;  ///< forward before backward of the same micro-batch
  int64_t micro_batch = 0;     ///< of this data-parallel rank

  bool operator==(const Action&) const = default;  ///< same kind and micro-batch
};

/// A step without pipeline: each micro-batch forward and at once backward, so that the activations of one are kept at a
/// time. Trainer does what the list says; a pipeline's list would send and receive between the stages.
std::vector<Action> one_after_the_other(int64_t num_micro_batches);

}  // namespace megatron_cpp
