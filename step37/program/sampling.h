// Chooses the next token from a model's logits.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <random>

namespace megatron_cpp::step37 {

/// How a token is chosen.
struct SamplingOptions {
  double temperature = 0.0;  ///< what logits are divided by; 0: greedy, the most probable token
  double top_p = 1.0;        ///< draw from the fewest most probable tokens whose probabilities sum to at least this
  uint64_t seed = 0;         ///< of the draws

  /// @throws c10::ValueError naming the option of `step37 generate` that is out of range: a temperature below 0 or not
  ///         finite, top_p outside (0, 1].
  void validate() const;
};

/// The chosen id. Greedy takes the lowest of those with the largest logit, and draws nothing from `random`. Otherwise
/// probabilities are computed in float64 on the CPU, and among equal ones the lower id comes first. Not collective.
/// @param logits  [V], of the whole vocabulary; -inf is never chosen.
int64_t choose_token(const at::Tensor& logits, const SamplingOptions& options, std::mt19937_64& random);

}  // namespace megatron_cpp::step37
