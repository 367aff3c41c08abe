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
  int64_t epoch = 0;        ///< passes completed
  int64_t position = 0;     ///< in [0, num_samples)
  int64_t num_samples = 0;  ///< draws of this pass; 0 stands for the sampler's number

  bool operator==(const SamplerState&) const = default;
};

/// In which order a pass goes through its samples.
enum class SampleOrder {
  kSequential,  ///< 0, 1, 2, .. in every pass
  kShuffled,    ///< permutation(n, epoch_seed(seed, epoch)) in each pass
};

/// The seed of a pass. Pass 1 of seed 5 and pass 0 of seed 6 have different ones (with their sum, the runs of two
/// neighbouring seeds would see the same orders, one pass apart). Two pairs in 2^64 are equal by chance.
uint64_t epoch_seed(uint64_t seed, int64_t epoch);

/// Draws sample indices pass after pass, without end: a caller that wants one pass looks at state().epoch.
class Sampler {
 public:
  /// @throws c10::ValueError if `num_samples` isn't positive.
  Sampler(int64_t num_samples, SampleOrder order, uint64_t seed = 0);

  /// The next index, in [0, num_samples()).
  int64_t next();

  /// Samples of the data set: draws of each pass that begins from now on.
  int64_t num_samples() const { return num_samples_; }

  /// What restore() takes to go on from here.
  SamplerState state() const { return state_; }
  /// Continues as the sampler that `state` was taken from, if that had the same order and seed. If samples were added
  /// to the data set since, which the pass that is under way doesn't have, they come in the next one. If some were
  /// removed, the next pass begins: the numbers of those that are left may be others.
  /// @throws c10::ValueError if the epoch or number of samples is negative or the position isn't in [0, num_samples).
  void restore(const SamplerState& state);

 private:
  void start_epoch(const SamplerState& state);

  int64_t num_samples_;
  SampleOrder order_;
  uint64_t seed_;
  SamplerState state_;
  std::vector<int64_t> permutation_;  ///< of the current epoch; empty for kSequential
};

/// Draws from several data sets in given proportions. Each draw adds every data set's weight to its credit, goes to the
/// data set with the largest credit, the first of equals, and takes 1 from it ("smooth weighted round-robin", as nginx
/// calls it). Draws are not random: with two data sets each stays within one draw of its share, with n > 2 within n.
class MixedSampler {
 public:
  /// A sample and where it comes from.
  struct Draw {
    int64_t data_set;  ///< index of its sampler
    int64_t sample;    ///< that sampler's draw

    bool operator==(const Draw&) const = default;
  };

  /// @param weights one per sampler, scaled to sum 1 here; a data set of weight 0 is never drawn from
  /// @throws c10::ValueError if there is no sampler, the counts differ, a weight is negative or not finite, or all
  ///         are 0.
  MixedSampler(std::vector<Sampler> samplers, std::vector<double> weights);

  /// The next draw.
  Draw next();

  /// Where a data set of the mix is.
  struct State {
    SamplerState sampler = {};  ///< of the data set alone
    double credit = 0.0;        ///< draws that it is behind its share, in (-1, n) for n data sets; 0 at the beginning

    bool operator==(const State&) const = default;
  };

  /// One state per data set.
  std::vector<State> state() const;
  /// Continues as the mix that the states were taken from. With other weights than then, shares follow the new ones
  /// from here on; a data set that has just been added has State{}.
  /// @throws c10::ValueError if there are more or fewer states than data sets, a credit isn't finite, and as
  ///         Sampler::restore.
  void restore(const std::vector<State>& states);

 private:
  std::vector<Sampler> samplers_;
  std::vector<double> weights_;
  std::vector<double> credits_;
};

}  // namespace megatron_cpp
