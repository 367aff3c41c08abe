#include "megatron_cpp/training/learning_rate.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <numbers>

namespace megatron {

void LearningRateSchedule::validate() const {
  TORCH_CHECK_VALUE(peak > 0, "learning rate ", peak, " is not above 0");
  TORCH_CHECK_VALUE(floor >= 0 && floor <= peak, "minimum learning rate ", floor, " is not in [0, ", peak, "]");
  TORCH_CHECK_VALUE(total_steps >= 1, "number of steps ", total_steps, " is below 1");
  TORCH_CHECK_VALUE(warmup_steps >= 0, "warm-up steps ", warmup_steps, " are below 0");
}

double LearningRateSchedule::at(int64_t step) const {
  if (step <= warmup_steps) return peak * static_cast<double>(step) / static_cast<double>(warmup_steps);
  const auto rest = static_cast<double>(std::max<int64_t>(1, total_steps - warmup_steps));
  const double progress = std::min(1.0, static_cast<double>(step - warmup_steps) / rest);
  return floor + (peak - floor) * 0.5 * (1.0 + std::cos(std::numbers::pi * progress));
}

}  // namespace megatron
