// What the tests of the decoder share: their fixture, values, and modules that start from values other than zero.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "megatron_cpp/transformer/transformer_config.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::transformer_fixture {

inline constexpr double kTolerance = 2e-5;  // of the largest element; float32 sums in another order

inline constexpr double kExact = 1e-11;  // the same for float64 sums

/// A decoder of these layers; sizes divisible by 1, 2 and 4, the vocabulary by none.
inline TransformerConfig small_decoder(std::vector<LayerConfig> layers) {
  TransformerConfig config;
  config.vocabulary_size = 37;
  config.hidden_size = 24;
  config.head_dim = 8;
  config.num_query_groups = 4;
  config.ffn_hidden_size = 20;
  config.init_std = 0.3;
  config.layers = std::move(layers);
  return config;
}

/// Remembers the largest relative difference of each test, for the test's XML.
class TransformerTest : public testing::Test {
 protected:
  void compare(const at::Tensor& actual, const at::Tensor& expected, const std::string& what,
               double tolerance = kTolerance) {
    EXPECT_TRUE(test_support::near(actual, expected, tolerance)) << what;
    if (!actual.defined() || !expected.defined() || actual.sizes() != expected.sizes() || actual.numel() == 0) return;
    const auto want = expected.detach().to(at::kDouble);
    const auto difference = (actual.detach().to(at::kDouble) - want).abs().max().item<double>();
    largest_ = std::max(largest_, difference / std::max(1e-30, want.abs().max().item<double>()));
  }
  void TearDown() override { RecordProperty("largest_relative_difference", std::to_string(largest_ * 1e6) + "e-6"); }

 private:
  double largest_ = 0.0;
};

inline at::Tensor normal_values(at::IntArrayRef shape, uint64_t seed, at::ScalarType dtype = at::kFloat) {
  return test_support::on_device(at::randn(shape, at::detail::createCPUGenerator(seed), at::TensorOptions(dtype)));
}

inline at::Tensor integers(const std::vector<int64_t>& values) { return at::tensor(values, at::kLong); }

inline at::Tensor leaf(const at::Tensor& tensor) { return tensor.detach().clone().requires_grad_(); }

/// Moves a module to the test's device and starts its parameters, norms too, from values other than zero.
template <class Module>
std::vector<ParameterShard> start(Module& module) {
  module->to(test_support::runtime().device());
  auto shards = parameter_shards(*module);
  for (auto& shard : shards) {
    if (shard.initial_value.kind == InitialValue::Kind::kConstant) shard.initial_value = InitialValue::normal(0.2);
  }
  initialize_parameters(shards, 7);
  return shards;
}

}  // namespace megatron_cpp::transformer_fixture
