// The training loop over a model of one parameter: what is called when, resuming, stopping; and the metrics file.
#include "megatron_cpp/training/training_loop.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "megatron_cpp/training/metrics_file.h"
#include "megatron_cpp/training/schedule.h"
#include "tests/support/errors.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/test_world.h"

namespace megatron_cpp {
namespace {

/// loss = (w - 3)², and a log of what the loop calls.
struct SmallRun {
  at::Tensor w = test_support::on_device(at::zeros({1})).requires_grad_();
  Trainer trainer{{replicated_parameter("w", w, GradientDomain::kReplicated, InitialValue::constant(0.0), true)},
                  test_support::groups(test_support::runtime().size()),
                  {.adamw = {}, .learning_rate = {.peak = 0.1, .floor = 0.1, .total_steps = 9}}};
  std::string log;
  std::vector<double> losses;
  int64_t stop_after = -1;

  int64_t go(const TrainingLoopOptions& options) {
    int64_t last = 0;
    return run_training_loop(
        trainer, options,
        {.next_batch =
             [this] {
               log += "b";
               return StepBatch{.num_micro_batches = 2,
                                .num_loss_tokens = 2,
                                .loss_sum = [this](int64_t /*micro_batch*/) { return (w - 3.0).square().sum(); },
                                .counts = {{"tokens", 10}}};
             },
         .validation_loss =
             [this] {
               log += "v";
               return std::optional<double>(0.5);
             },
         .report =
             [this, &last](const StepMetrics& metrics) {
               log += std::to_string(metrics.step);
               last = metrics.step;
               losses.push_back(metrics.result.loss);
               EXPECT_EQ(metrics.counts.at(0).second, 10);
               EXPECT_GT(metrics.seconds, 0.0);
             },
         .save =
             [this](int64_t step) {
               log += "s";
               log += std::to_string(step);
             },
         .stops = [this, &last] { return last == stop_after; }});
  }
};

}  // namespace

TEST(TrainingLoop, CallsEachInItsTurn) {
  SmallRun run;
  EXPECT_EQ(run.go({.steps = 5, .validation_interval = 2, .checkpoint_interval = 3}), 5);
  EXPECT_EQ(run.log, "b1bv2b3s3bv4bv5s5");
  EXPECT_LT(run.losses.back(), run.losses.front());
  EXPECT_EQ(run.losses.front(), 9.0);
  EXPECT_EQ(run.go({.steps = 5}), 5);  // all done
  EXPECT_EQ(run.log, "b1bv2b3s3bv4bv5s5");
}

TEST(TrainingLoop, SavesWhenItIsToStopAndGoesOnFromThere) {
  SmallRun run;
  run.stop_after = 2;
  EXPECT_EQ(run.go({.steps = 4, .checkpoint_interval = 3}), 2);
  EXPECT_EQ(run.log, "b1b2s2");
  run.stop_after = 3;
  EXPECT_EQ(run.go({.steps = 4, .checkpoint_interval = 3}), 3);
  EXPECT_EQ(run.log, "b1b2s2b3s3");  // not saved twice
  SmallRun whole;
  whole.go({.steps = 3});
  EXPECT_EQ(run.losses, whole.losses);
}

TEST(TrainingLoop, NeedsBatchesAlone) {
  SmallRun run;
  EXPECT_TRUE(test_support::contains(
      test_support::value_error([&] { run_training_loop(run.trainer, {.steps = 1}, {}); }), "next_batch"));
  const auto batch = [&run] {
    return StepBatch{1, 1, [&run](int64_t /*micro_batch*/) { return run.w.square().sum(); }};
  };
  EXPECT_EQ(run_training_loop(run.trainer, {.steps = 2}, {.next_batch = batch}), 2);
}

TEST(Schedule, OneAfterTheOtherKeepsOneAtATime) {
  using Kind = Action::Kind;
  const std::vector<Action> expected{
      {Kind::kForward, 0}, {Kind::kBackward, 0}, {Kind::kForward, 1}, {Kind::kBackward, 1}};
  EXPECT_EQ(one_after_the_other(2), expected);
  EXPECT_TRUE(one_after_the_other(0).empty());
}

TEST(MetricsFile, HasOneLineAStepWhateverWasThere) {
  const test_support::TemporaryFolder folder;
  const auto path = folder.path() / "metrics.jsonl";
  {
    std::ofstream old(path);
    old << R"({"step": 1, "loss": 2.0})"
        << "\n"
        << R"({"step": 2, "loss": 1.0})"
        << "\n"
        << R"({"step": 3, "lo)";
  }
  MetricsFile file(path, 1);
  StepMetrics metrics;
  metrics.step = 2;
  metrics.result = {.loss = 0.5,
                    .grad_norm = 0.25,
                    .learning_rate = 0.125,
                    .auxiliary_losses = {{"z_loss", 0.5}},
                    .metrics = {{"moe_max_load", 1.5}}};
  metrics.counts = {{"tokens", 20}, {"images", 3}};
  metrics.seconds = 2.0;
  file.write(metrics);
  metrics.counts.clear();
  metrics.result.auxiliary_losses.clear();
  metrics.result.metrics.clear();
  metrics.validation_loss = 0.75;
  file.write(metrics);
  std::ifstream written(path);
  std::string line;
  std::vector<std::string> lines;
  while (std::getline(written, line)) lines.push_back(line);
  EXPECT_EQ(lines, (std::vector<std::string>{
                       R"({"step": 1, "loss": 2.0})",
                       R"({"step":2,"loss":0.5,"grad_norm":0.25,"learning_rate":0.125,"z_loss":0.5,"moe_max_load":1.5,)"
                       R"("tokens":20,"images":3,"tokens_per_second":10.0,"step_seconds":2.0})",
                       R"({"step":2,"loss":0.5,"grad_norm":0.25,"learning_rate":0.125,"step_seconds":2.0,)"
                       R"("validation_loss":0.75})"}));
}

TEST(MetricsFile, WritesWholeLinesOnlyAndThoseThatCouldNotBeWrittenLater) {
  const test_support::TemporaryFolder folder;
  const auto path = folder.path() / "metrics.jsonl";
  const auto numbers = [&] {
    std::ifstream written(path);
    std::vector<int64_t> steps;
    for (std::string line; std::getline(written, line);) steps.push_back(nlohmann::json::parse(line).at("step"));
    return steps;
  };
  MetricsFile file(path, 0);
  StepMetrics metrics;
  const auto write = [&](int64_t step) {
    metrics.step = step;
    file.write(metrics);
  };
  write(1);
  // A little of the next line has room.
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit full{std::filesystem::file_size(path) + 10, before.rlim_max};
  auto* const handler = std::signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &full), 0);
  for (const int64_t step : {2, 3}) {
    EXPECT_TRUE(test_support::throws<WriteError>([&] { write(step); }, "cannot write " + path.string()));
    EXPECT_EQ(std::filesystem::file_size(path), full.rlim_cur - 10);
  }
  EXPECT_TRUE(test_support::throws<WriteError>([&] { file.flush(); }, "cannot write "));
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(numbers(), (std::vector<int64_t>{1}));
  write(4);
  EXPECT_EQ(numbers(), (std::vector<int64_t>{1, 2, 3, 4}));
  file.flush();
  EXPECT_EQ(numbers(), (std::vector<int64_t>{1, 2, 3, 4}));
}

}  // namespace megatron_cpp
