#include "megatron_cpp/training/loss_spike.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace megatron_cpp {
namespace {

/// Of an even number the mean of the two in the middle.
double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

}  // namespace

LossSpikes::LossSpikes(double threshold) : threshold_(threshold) {
  TORCH_CHECK_VALUE(threshold >= 0, "loss_spike ", threshold, " is below 0");
}

std::optional<std::string> LossSpikes::add(double loss) {
  if (threshold_ == 0.0 || !std::isfinite(loss)) return std::nullopt;
  std::optional<std::string> spike;
  if (losses_.size() >= kLeast) {
    const double middle = median({losses_.begin(), losses_.end()});
    std::vector<double> distances;
    for (const double before : losses_) distances.push_back(std::abs(before - middle));
    const double deviation = std::max(1.4826 * median(distances), 0.01 * std::abs(middle));
    if (loss - middle > threshold_ * deviation) {
      spike = fmt::format("loss {:.6g} is far above the last {}: their median is {:.6g}, and their deviation {:.3g}",
                          loss, losses_.size(), middle, deviation);
    }
  }
  losses_.push_back(loss);
  if (losses_.size() > kKept) losses_.pop_front();
  return spike;
}

}  // namespace megatron_cpp
