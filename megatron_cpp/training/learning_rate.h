// The learning rate of each step.
#pragma once

#include <cstdint>

namespace megatron_cpp {

/// How the learning rate goes down after the warm-up; Megatron-Core's lr_decay_style.
enum class LearningRateDecay {
  kCosine,    ///< along half a cosine
  kLinear,    ///< along a straight line
  kConstant,  ///< not at all
  kWsd,       ///< warm-up-stable-decay: only in the last decay_steps, along 2 * 0.5^progress - 1
};

/// Linear warm-up, then down to a floor, as Megatron-Core's OptimizerParamScheduler does. Pure.
struct LearningRateSchedule {
  double peak = 1e-3;        ///< at the end of the warm-up, above 0
  double floor = 0.0;        ///< at total_steps and after, in [0, peak]; kConstant ignores it
  int64_t warmup_steps = 0;  ///< 0: none
  int64_t total_steps = 1;   ///< where the decay ends
  LearningRateDecay decay = LearningRateDecay::kCosine;  ///< after the warm-up
  int64_t decay_steps = 0;                               ///< kWsd: in [1, total_steps - warmup_steps]; otherwise 0

  /// @throws c10::ValueError naming the value that is out of range.
  void validate() const;

  /// The rate of step `step`, counted from 1: peak * step / warmup_steps up to warmup_steps, then
  /// floor + (peak - floor) * share. Progress goes from 0 at the end of the warm-up, or decay_steps before total_steps,
  /// to 1 at total_steps, and share from 1 to 0: (1 + cos(pi * progress)) / 2, 1 - progress, or as kWsd says.
  double at(int64_t step) const;
};

}  // namespace megatron_cpp
