// Traces of training steps: which steps and ranges they have, and files that can't be written.
#include "megatron_cpp/training/step_profile.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "megatron_cpp/checkpoint/complete_file.h"
#include "megatron_cpp/training/training_loop.h"
#include "parallel/collectives.h"
#include "parallel/named_range.h"
#include "tests/support/errors.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/test_world.h"

namespace megatron_cpp {
namespace {

namespace fs = std::filesystem;

int64_t count(const std::vector<ProfiledEvent>& events, const std::string& name) {
  return std::ranges::count(events, name, &ProfiledEvent::name);
}

/// A loop of a few steps, in each of which every rank sums a number over all.
std::shared_ptr<StepProfile> profile_of(StepRange steps, const fs::path& file, int64_t stop_after = -1) {
  const auto& groups = test_support::groups(test_support::runtime().size());
  auto w = test_support::on_device(at::zeros({1})).requires_grad_();
  Trainer trainer({replicated_parameter("w", w, GradientDomain::kReplicated, InitialValue::constant(0.0), true)},
                  groups, {.adamw = {}, .learning_rate = {.peak = 0.1, .floor = 0.1, .total_steps = 9}});
  auto profile = std::make_shared<StepProfile>(steps, file, w.device());
  int64_t step = 0;
  run_training_loop(trainer, {.steps = 5, .profile = profile},
                    {.next_batch =
                         [&] {
                           const parallel::NamedRange range(step < 4 ? "an early step" : "the last step");
                           ++step;
                           return StepBatch{
                               .num_micro_batches = 1, .num_loss_tokens = 1, .loss_sum = [&](int64_t /*micro_batch*/) {
                                 parallel::all_reduce(at::ones({3}), groups.world);
                                 return (w - 3.0).square().sum();
                               }};
                         },
                     .stops = [&] { return step == stop_after; }});
  return profile;
}

}  // namespace

TEST(StepProfile, HasTheStepsOfItsRange) {
  const test_support::TemporaryFolder folder;
  const auto file = folder.path() / "made" / "trace.json";
  const auto profile = profile_of({2, 3}, file);
  const auto& events = profile->events();
  for (const auto* name : {"data", "an early step", "forward", "backward", "gradient reduction", "optimizer"}) {
    EXPECT_EQ(count(events, name), 2) << name;
    const auto event = std::ranges::find(events, std::string(name), &ProfiledEvent::name);
    ASSERT_NE(event, events.end());
    EXPECT_TRUE(event->is_range);
    EXPECT_GT(event->nanoseconds, 0);
  }
  const bool sends = test_support::runtime().size() > 1;  // a group of one sends nothing
  EXPECT_EQ(count(events, "all_reduce over world, 3 elements"), sends ? 2 : 0);
  EXPECT_EQ(count(events, "the last step"), 0);
  const auto square = std::ranges::find(events, std::string("aten::square"), &ProfiledEvent::name);
  ASSERT_NE(square, events.end());
  EXPECT_FALSE(square->is_range);
  EXPECT_TRUE(std::ranges::is_sorted(events, {}, &ProfiledEvent::begin));

  const auto trace = nlohmann::json::parse(test_support::read_file(file));
  const auto& written = trace.at("traceEvents");
  EXPECT_EQ(std::ranges::count_if(written, [](const auto& event) { return event.value("name", "") == "optimizer"; }),
            2);
  EXPECT_FALSE(fs::exists(file.string() + ".partial"));
}

TEST(StepProfile, EndsWithARunThatStops) {
  const auto profile = profile_of({4, 5}, {}, /*stop_after=*/4);
  EXPECT_EQ(count(profile->events(), "optimizer"), 1);
  EXPECT_TRUE(profile_of({4, 5}, {}, /*stop_after=*/3)->events().empty());
}

TEST(StepProfile, SaysThatAFileCannotBeWritten) {
  const test_support::TemporaryFolder folder;
  StepProfile profile({1, 1}, "/dev/null/trace.json", c10::Device(c10::kCPU));
  profile.begin_step(1);
  const auto error = test_support::error_of<WriteError>([&] { profile.end_step(1); });
  EXPECT_NE(error.find("/dev/null/trace.json"), std::string::npos) << error;
  EXPECT_THROW(StepProfile({3, 2}, {}, c10::Device(c10::kCPU)), c10::ValueError);
}

}  // namespace megatron_cpp
