// Draws samples without end: in the same order on every machine, resumable from a few numbers.
#pragma once

#include <cstdint>
#include <vector>

namespace megatron_cpp {

/// A permutation of 0 .. count - 1: Fisher-Yates from the last element down, element i swapped with element
/// j <= i, where j is drawn from std::mt19937_64(seed) without bias: outputs x below 2^64 mod (i + 1) are drawn again,
/// j = x mod (i + 1). (std::shuffle and std::uniform_int_distribution may differ between standard libraries.)
std::vector<int64_t> permutation(int64_t count, uint64_t seed);

/// Where a sampler is: `position` draws of pass `epoch` are done.
struct SamplerState {
  int64_t epoch = 0;     ///< passes completed
  int64_t position = 0;  ///< in [0, num_samples)

  bool operator==(const SamplerState&) const = default;
};

/// In which order a pass goes through its samples.
enum class SampleOrder {
  kSequential,  ///< 0, 1, 2, .. in every pass
  kShuffled,    ///< permutation(num_samples, seed + epoch) in each pass
};

/// Draws sample indices pass after pass, without end: a caller that wants one pass looks at state().epoch.
class Sampler {
 public:
  /// @throws c10::ValueError if `num_samples` isn't positive.
  Sampler(int64_t num_samples, SampleOrder order, uint64_t seed = 0);

  /// The next index, in [0, num_samples()).
  int64_t next();

  /// Draws of a pass.
  int64_t num_samples() const { return num_samples_; }
  /// Draws so far, over all passes.
  int64_t num_draws() const { return state_.epoch * num_samples_ + state_.position; }

  /// What restore() takes to go on from here.
  SamplerState state() const { return state_; }
  /// Continues as the sampler that `state` was taken from, if that had the same constructor arguments.
  /// @throws c10::ValueError if the epoch is negative or the position isn't in [0, num_samples()).
  void restore(const SamplerState& state);

 private:
  void start_epoch();

  int64_t num_samples_;
  SampleOrder order_;
  uint64_t seed_;
  SamplerState state_;
  std::vector<int64_t> permutation_;  ///< of the current epoch; empty for kSequential
};

/// Draws from several data sets in given proportions: each draw goes to the data set that is furthest behind,
/// the largest weight * (draws so far + 1) - draws from it, the first of equals. Draws are not random: with two data
/// sets each stays within one draw of its share, with n > 2 within n draws.
class MixedSampler {
 public:
  /// A sample and where it comes from.
  struct Draw {
    int64_t data_set;  ///< index of its sampler
    int64_t sample;    ///< that sampler's draw

    bool operator==(const Draw&) const = default;
  };

  /// @param weights one per sampler, scaled to sum 1 here; a data set of weight 0 is never drawn
  /// @throws c10::ValueError if there is no sampler, the counts differ, a weight is negative or not finite, or all
  ///         are 0.
  MixedSampler(std::vector<Sampler> samplers, std::vector<double> weights);

  /// The next draw.
  Draw next();

  /// One state per data set; the numbers of draws determine which comes next.
  std::vector<SamplerState> state() const;
  /// @throws c10::ValueError if there are more or fewer states than data sets, and as Sampler::restore.
  void restore(const std::vector<SamplerState>& states);

 private:
  std::vector<Sampler> samplers_;
  std::vector<double> weights_;
};

}  // namespace megatron_cpp
