// Losses far above those of the steps before.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>
#include <string>

namespace megatron_cpp {

/// Keeps the last losses of a run, and tells which new one is far above them, by the Hampel identifier (Davies and
/// Gather, JASA 1993): more than `threshold` times 1.4826 MAD above their median, where MAD is the median of the
/// distances to the median, and 1.4826 MAD the standard deviation of normal numbers. Unlike mean and deviation, neither
/// moves with the spikes themselves. A hundredth of the median takes the place of a smaller deviation, so that the
/// ripples of a loss that hardly changes are none.
class LossSpikes {
 public:
  static constexpr int64_t kKept = 100;  ///< losses that a new one is compared with, at most
  static constexpr int64_t kLeast = 20;  ///< of fewer no spike is told

  /// @param threshold  0: no loss is a spike.
  /// @throws c10::ValueError naming a threshold below 0.
  explicit LossSpikes(double threshold);

  /// Takes the loss of the next step. Returns "loss 7 is far above the last 100: their median is 2, ..." if it is a
  /// spike. Depends on the losses alone; one that isn't finite is ignored. Not collective.
  std::optional<std::string> add(double loss);

 private:
  double threshold_;
  std::deque<double> losses_;
};

}  // namespace megatron_cpp
