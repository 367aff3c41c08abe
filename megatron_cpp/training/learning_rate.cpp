#include "megatron_cpp/training/learning_rate.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <numbers>

namespace megatron_cpp {

void LearningRateSchedule::validate() const {
  TORCH_CHECK_VALUE(peak > 0, "learning rate ", peak, " is not above 0");
  TORCH_CHECK_VALUE(floor >= 0 && floor <= peak, "minimum learning rate ", floor, " is not in [0, ", peak, "]");
  TORCH_CHECK_VALUE(total_steps >= 1, "number of steps ", total_steps, " is below 1");
  TORCH_CHECK_VALUE(warmup_steps >= 0, "warm-up steps ", warmup_steps, " are below 0");
  if (decay == LearningRateDecay::kWsd) {
    TORCH_CHECK_VALUE(decay_steps >= 1 && decay_steps <= total_steps - warmup_steps, "decay_steps ", decay_steps,
                      " is not in [1, ", total_steps - warmup_steps, "], the steps after the warm-up");
  } else {
    TORCH_CHECK_VALUE(decay_steps == 0, "decay_steps ", decay_steps, " needs the decay wsd");
  }
}

double LearningRateSchedule::at(int64_t step) const {
  if (step <= warmup_steps) return peak * static_cast<double>(step) / static_cast<double>(warmup_steps);
  const bool is_wsd = decay == LearningRateDecay::kWsd;
  const int64_t begin = is_wsd ? total_steps - decay_steps : warmup_steps;
  if (decay == LearningRateDecay::kConstant || step <= begin) return peak;
  const auto length = static_cast<double>(std::max<int64_t>(1, total_steps - begin));
  const double progress = std::min(1.0, static_cast<double>(step - begin) / length);
  double share = 0.5 * (1.0 + std::cos(std::numbers::pi * progress));
  if (decay == LearningRateDecay::kLinear) share = 1.0 - progress;
  if (is_wsd) share = 2.0 * std::pow(0.5, progress) - 1.0;
  return floor + (peak - floor) * share;
}

}  // namespace megatron_cpp
