// A test's folder with the configuration of a run so small that it trains in seconds.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "parallel/collectives.h"
#include "step37/program/training_run.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::small_run {

using Overrides = std::vector<std::string>;

/// `more` behind `overrides`, which it wins over.
inline Overrides with(Overrides overrides, const Overrides& more) {
  overrides.insert(overrides.end(), more.begin(), more.end());
  return overrides;
}

// eps is far above rounding: gradients that are 0 but for rounding (of key biases) must not become steps.
inline constexpr std::string_view kConfig = R"(data:
  held_out: 0.3
  vocabulary_size: 300
  crops: true
  crop_side: 28
model:
  hidden_size: 32
  num_layers: 2
  head_dim: 8
  num_attention_heads: 4
  num_sliding_attention_heads: 4
  num_query_groups: 4
  ffn_hidden_size: 64
  sliding_window: 16
  full_attention_interval: 2
  projector_bias: true
vision:
  image_size: 56
  width: 16
  layers: 1
  heads: 2
  mlp_width: 32
training:
  steps: 3
  global_batch_size: 4
  sequence_length: 128
  learning_rate: 1e-2
  warmup_steps: 1
  eps: 1e-4
checkpoint:
  keep: 9
report:
  pictures: 0
  max_new_tokens: 4
)";

/// The configuration of a run on the test's device.
inline std::string config() {
  const std::string device = test_support::runtime().device().is_cuda() ? "cuda" : "cpu";
  return "run:\n  device: " + device + "\n  share_gpus: true\n  timeout_seconds: 60\n" + std::string(kConfig);
}

/// Each test has a folder of its own, with a configuration.
class SmallRun : public testing::Test {
 protected:
  void SetUp() override {
    on_main([&] { test_support::write_file(config_file(), config()); });
  }

  /// On rank 0, between two barriers: nobody reads what it changes.
  static void on_main(const std::function<void()>& action) {
    parallel::barrier(test_support::world_tp());
    if (test_support::runtime().rank() == 0) action();
    parallel::barrier(test_support::world_tp());
  }

  std::filesystem::path config_file() const { return folder_.path() / "config.yaml"; }
  std::filesystem::path pictures() const { return folder_.path() / "pictures"; }
  step37::RunFiles files(const std::string& run) const { return {folder_.path() / run}; }

  Overrides overrides_of(const std::string& run, int tp, const Overrides& more) const {
    return with({"run.directory=" + files(run).directory.string(), "data.directory=" + pictures().string(),
                 "parallel.tp=" + std::to_string(tp)},
                more);
  }

  test_support::SharedFolder folder_;
};

}  // namespace megatron_cpp::small_run
