// The learning rate of each step.
#pragma once

#include <cstdint>

namespace megatron {

/// Linear warm-up, then half a cosine down to a floor. Pure.
struct LearningRateSchedule {
  double peak = 1e-3;        ///< at the end of the warm-up, above 0
  double floor = 0.0;        ///< at total_steps and after, in [0, peak]
  int64_t warmup_steps = 0;  ///< 0: none
  int64_t total_steps = 1;   ///< where the cosine ends

  /// @throws c10::ValueError naming the value that is out of range.
  void validate() const;

  /// The rate of step `step`, counted from 1: peak * step / warmup_steps up to warmup_steps, then
  /// floor + (peak - floor) * (1 + cos(pi * progress)) / 2, progress going from 0 to 1 at total_steps.
  double at(int64_t step) const;
};

}  // namespace megatron
