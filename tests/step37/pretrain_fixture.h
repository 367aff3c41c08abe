// Small runs of `step37 pretrain` in a test, and what they leave.
#pragma once

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "megatron_cpp/checkpoint/sharded_checkpoint.h"
#include "parallel/agree.h"
#include "parallel/collectives.h"
#include "parallel/runtime.h"
#include "step37/program/pretrain.h"
#include "step37/program/training_run.h"
#include "tests/step37/small_pictures.h"
#include "tests/step37/small_run.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::small_run {

/// A small run with pictures.
class Pretrain : public SmallRun {
 protected:
  void SetUp() override {
    SmallRun::SetUp();
    on_main([&] { write_pictures(pictures()); });
  }

  /// Trains; a failure if that doesn't end well.
  void pretrain(const std::string& run, int tp, const Overrides& more = {}) const {
    EXPECT_EQ(run_pretrain(run, tp, more), 0);
    parallel::barrier(test_support::world_tp());
  }

  /// What all ranks throw; a failure if they differ.
  static std::string agreed_error(const std::function<void()>& action) {
    std::string mine = "nothing thrown";
    try {
      action();
    } catch (const std::exception& error) {
      mine = parallel::error_text(error);
    }
    EXPECT_EQ(mine, parallel::broadcast_text(mine, 0, test_support::world_tp()));
    return mine;
  }
  std::string pretrain_error(const std::string& run, int tp, const Overrides& more = {}) const {
    return agreed_error([&] { run_pretrain(run, tp, more); });
  }

  /// On a runtime of its own: a program chooses its device, and the tests keep theirs.
  int run_pretrain(const std::string& run, int tp, const Overrides& more) const {
    parallel::Runtime own;
    return step37::pretrain(own, {config_file(), overrides_of(run, tp, more)});
  }

  /// Makes run `to` what run `from` would be if it had been killed after its checkpoint of step `step`, while it wrote
  /// a line of metrics: later checkpoints are gone, later lines are there.
  void copy_state(const std::string& from, const std::string& to, int64_t step) const {
    on_main([&] {
      const auto old_files = files(from);
      const auto new_files = files(to);
      const auto name = step_name(step);
      std::filesystem::create_directories(new_files.checkpoints());
      std::filesystem::copy(old_files.checkpoints() / name, new_files.checkpoints() / name,
                            std::filesystem::copy_options::recursive);
      std::filesystem::create_directory_symlink(name, new_files.checkpoints() / "latest");
      std::filesystem::copy(old_files.tokenizer(), new_files.tokenizer());
      test_support::write_file(new_files.metrics(), test_support::read_file(old_files.metrics()) + "{\"step\":5,\"lo");
    });
  }

  static std::string step_name(int64_t step) { return fmt::format("step-{:08}", step); }
};

/// The lines of a run's metrics, without what depends on the clock or the layout.
inline std::vector<nlohmann::json> metrics_of(const step37::RunFiles& files) {
  std::ifstream stream(files.metrics());
  std::vector<nlohmann::json> lines;
  for (std::string line; std::getline(stream, line);) {
    auto parsed = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    EXPECT_TRUE(parsed.is_object()) << line;
    if (!parsed.is_object()) continue;
    for (const char* name : {"step_seconds", "tokens_per_second", "data_seconds", "tflops_per_rank", "peak_share",
                             "peak_memory_bytes", "wait_share"}) {
      parsed.erase(name);
    }
    lines.push_back(std::move(parsed));
  }
  return lines;
}

/// All tensors of a checkpoint, whole, by the text of their id.
inline std::map<std::string, at::Tensor> tensors_of(const std::filesystem::path& checkpoint) {
  const CheckpointReader reader(checkpoint);
  std::map<std::string, at::Tensor> tensors;
  std::vector<ShardedTensor> wanted;
  for (const auto& id : reader.tensors()) {
    const auto& shape = reader.global_shape(id);
    tensors[id.text()] = at::zeros(shape);
    wanted.push_back({id, tensors[id.text()], shape, {Box::whole(shape)}});
  }
  reader.load(wanted);
  return tensors;
}

/// By how much two runs of the same commands may differ: not at all on the CPU. On a GPU some gradients are added up in
/// any order.
inline double rounding() { return test_support::runtime().device().is_cpu() ? 0.0 : 1e-4; }

/// On rank 0: the same metrics and the same last checkpoint, to a relative tolerance, bit for bit if it is 0.
inline void expect_same_run(const step37::RunFiles& actual, const step37::RunFiles& expected, double tolerance) {
  if (test_support::runtime().rank() != 0) return;
  const auto lines = metrics_of(actual);
  const auto expected_lines = metrics_of(expected);
  EXPECT_EQ(lines.size(), expected_lines.size());
  for (size_t i = 0; i < std::min(lines.size(), expected_lines.size()); ++i) {
    EXPECT_EQ(lines[i].size(), expected_lines[i].size()) << lines[i];
    for (const auto& [key, value] : expected_lines[i].items()) {
      const double want = value.get<double>();
      EXPECT_NEAR(lines[i].value(key, -1.0), want, tolerance * std::abs(want)) << key << " of line " << i + 1;
    }
  }
  const auto tensors = tensors_of(actual.checkpoints() / "latest");
  const auto expected_tensors = tensors_of(expected.checkpoints() / "latest");
  EXPECT_EQ(tensors.size(), expected_tensors.size());
  for (const auto& [name, tensor] : expected_tensors) {
    const auto found = tensors.find(name);
    EXPECT_NE(found, tensors.end()) << name;
    if (found == tensors.end()) continue;
    if (tolerance == 0) {
      EXPECT_TRUE(test_support::equal(found->second, tensor)) << name;
    } else if (!name.starts_with("optimizer.")) {
      EXPECT_TRUE(test_support::near(found->second, tensor, tolerance)) << name;
    }
  }
}

}  // namespace megatron_cpp::small_run
