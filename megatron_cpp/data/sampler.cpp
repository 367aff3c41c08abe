#include "megatron_cpp/data/sampler.h"

#include <c10/util/Exception.h>

#include <cmath>
#include <numeric>
#include <random>
#include <utility>

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

Sampler::Sampler(int64_t num_samples, SampleOrder order, uint64_t seed)
    : num_samples_(num_samples), order_(order), seed_(seed) {
  TORCH_CHECK_VALUE(num_samples > 0, "a sampler needs at least 1 sample, got ", num_samples);
  start_epoch();
}

void Sampler::start_epoch() {
  if (order_ == SampleOrder::kSequential) return;
  permutation_ = permutation(num_samples_, seed_ + static_cast<uint64_t>(state_.epoch));
}

int64_t Sampler::next() {
  const int64_t position = state_.position++;
  const int64_t index = order_ == SampleOrder::kSequential ? position : permutation_[static_cast<size_t>(position)];
  if (state_.position == num_samples_) {
    state_ = {state_.epoch + 1, 0};
    start_epoch();
  }
  return index;
}

void Sampler::restore(const SamplerState& state) {
  TORCH_CHECK_VALUE(state.epoch >= 0, "sampler epoch ", state.epoch, " is negative");
  TORCH_CHECK_VALUE(state.position >= 0 && state.position < num_samples_, "sampler position ", state.position,
                    " isn't in [0, ", num_samples_, "): was it saved with another data set?");
  const bool is_same_epoch = state.epoch == state_.epoch;
  state_ = state;
  if (!is_same_epoch) start_epoch();
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
}

MixedSampler::Draw MixedSampler::next() {
  int64_t num_draws = 0;
  for (const auto& sampler : samplers_) num_draws += sampler.num_draws();
  const auto behind = [&](size_t i) {
    return weights_[i] * static_cast<double>(num_draws + 1) - static_cast<double>(samplers_[i].num_draws());
  };
  size_t furthest = 0;
  for (size_t i = 1; i < samplers_.size(); ++i) {
    if (behind(i) > behind(furthest)) furthest = i;
  }
  return {static_cast<int64_t>(furthest), samplers_[furthest].next()};
}

std::vector<SamplerState> MixedSampler::state() const {
  std::vector<SamplerState> states;
  for (const auto& sampler : samplers_) states.push_back(sampler.state());
  return states;
}

void MixedSampler::restore(const std::vector<SamplerState>& states) {
  TORCH_CHECK_VALUE(states.size() == samplers_.size(), states.size(), " sampler states for ", samplers_.size(),
                    " data sets");
  for (size_t i = 0; i < states.size(); ++i) samplers_[i].restore(states[i]);
}

}  // namespace megatron_cpp
