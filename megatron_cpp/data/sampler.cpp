#include "megatron_cpp/data/sampler.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <utility>

#include "parallel/hash.h"

namespace megatron_cpp {
namespace {

/// A number in [0, bound), every one equally likely.
uint64_t uniform_below(uint64_t bound, std::mt19937_64& generator) {
  // 2^64 mod bound: what is left above this many outputs is a multiple of the bound.
  const uint64_t rejected = (0 - bound) % bound;
  uint64_t output = generator();
  while (output < rejected) output = generator();
  return output % bound;
}

}  // namespace

std::vector<int64_t> permutation(int64_t count, uint64_t seed) {
  TORCH_CHECK_VALUE(count >= 0, "a permutation of ", count, " elements");
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  std::mt19937_64 generator(seed);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[uniform_below(i, generator)]);
  return order;
}

uint64_t epoch_seed(uint64_t seed, int64_t epoch) {
  return parallel::mixed_hash(parallel::mixed_hash(seed) + static_cast<uint64_t>(epoch));
}

Sampler::Sampler(int64_t num_samples, SampleOrder order, uint64_t seed)
    : num_samples_(num_samples), order_(order), seed_(seed) {
  TORCH_CHECK_VALUE(num_samples > 0, "a sampler needs at least 1 sample, got ", num_samples);
  start_epoch({0, 0, num_samples});
}

void Sampler::start_epoch(const SamplerState& state) {
  state_ = state;
  if (order_ == SampleOrder::kSequential) return;
  permutation_ = permutation(state_.num_samples, epoch_seed(seed_, state_.epoch));
}

int64_t Sampler::next() {
  const int64_t position = state_.position++;
  const int64_t index = order_ == SampleOrder::kSequential ? position : permutation_[static_cast<size_t>(position)];
  if (state_.position == state_.num_samples) start_epoch({state_.epoch + 1, 0, num_samples_});
  return index;
}

void Sampler::restore(const SamplerState& state) {
  auto restored = state;
  if (restored.num_samples == 0) restored.num_samples = num_samples_;
  TORCH_CHECK_VALUE(restored.epoch >= 0, "sampler epoch ", restored.epoch, " is negative");
  TORCH_CHECK_VALUE(restored.num_samples > 0, "a sampler's pass of ", restored.num_samples, " samples");
  TORCH_CHECK_VALUE(restored.position >= 0 && restored.position < restored.num_samples, "sampler position ",
                    restored.position, " isn't in [0, ", restored.num_samples,
                    "): was it saved with another data set?");
  if (restored.num_samples > num_samples_) restored = {restored.epoch + 1, 0, num_samples_};
  const bool is_same_pass = restored.epoch == state_.epoch && restored.num_samples == state_.num_samples;
  if (is_same_pass) {
    state_ = restored;
  } else {
    start_epoch(restored);
  }
}

MixedSampler::MixedSampler(std::vector<Sampler> samplers, std::vector<double> weights)
    : samplers_(std::move(samplers)), weights_(std::move(weights)) {
  TORCH_CHECK_VALUE(!samplers_.empty(), "a mix needs at least one data set");
  TORCH_CHECK_VALUE(samplers_.size() == weights_.size(), samplers_.size(), " data sets with ", weights_.size(),
                    " weights");
  double sum = 0.0;
  for (const double weight : weights_) {
    TORCH_CHECK_VALUE(std::isfinite(weight) && weight >= 0.0, "data set weight ", weight, " is negative or not finite");
    sum += weight;
  }
  TORCH_CHECK_VALUE(std::isfinite(sum) && sum > 0.0, "the weights of ", weights_.size(), " data sets sum to ", sum);
  for (double& weight : weights_) weight /= sum;
  credits_.assign(weights_.size(), 0.0);
}

MixedSampler::Draw MixedSampler::next() {
  for (size_t i = 0; i < credits_.size(); ++i) credits_[i] += weights_[i];
  const auto largest = std::max_element(credits_.begin(), credits_.end());
  *largest -= 1.0;
  const auto chosen = static_cast<size_t>(largest - credits_.begin());
  return {static_cast<int64_t>(chosen), samplers_[chosen].next()};
}

std::vector<MixedSampler::State> MixedSampler::state() const {
  std::vector<State> states;
  for (size_t i = 0; i < samplers_.size(); ++i) states.push_back({samplers_[i].state(), credits_[i]});
  return states;
}

void MixedSampler::restore(const std::vector<State>& states) {
  TORCH_CHECK_VALUE(states.size() == samplers_.size(), states.size(), " sampler states for ", samplers_.size(),
                    " data sets");
  for (size_t i = 0; i < states.size(); ++i) {
    TORCH_CHECK_VALUE(std::isfinite(states[i].credit), "a data set's credit is ", states[i].credit);
    samplers_[i].restore(states[i].sampler);
    credits_[i] = states[i].credit;
  }
}

}  // namespace megatron_cpp
