// Saves while training goes on: what is written, when it is there, and what becomes of saves that fail.
#include "megatron_cpp/checkpoint/checkpoint_saver.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <future>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "megatron_cpp/checkpoint/save_points.h"
#include "megatron_cpp/checkpoint/sharded_checkpoint.h"
#include "parallel/agree.h"
#include "parallel/collectives.h"
#include "parallel/recording_backend.h"
#include "tests/support/errors.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/test_world.h"

namespace megatron_cpp {
namespace {

namespace fs = std::filesystem;
using test_support::groups;

using Names = std::vector<std::string>;

int world_rank() { return test_support::runtime().rank(); }
int world_size() { return test_support::runtime().size(); }

/// A hook for save points, as long as it lives.
class SavePointHook {
 public:
  explicit SavePointHook(std::function<void(std::string_view)> hook) { internal::set_save_point_hook(std::move(hook)); }
  ~SavePointHook() { internal::set_save_point_hook({}); }
  SavePointHook(const SavePointHook&) = delete;
  SavePointHook& operator=(const SavePointHook&) = delete;
};

/// Holds the writer of a rank at a save point until it is released.
class HeldWriter {
 public:
  explicit HeldWriter(std::string_view point, int rank = world_size() - 1)
      : hook_([this, point, rank](std::string_view name) {
          if (name == point && world_rank() == rank) released_.wait();
        }) {}
  ~HeldWriter() { release(); }
  HeldWriter(const HeldWriter&) = delete;
  HeldWriter& operator=(const HeldWriter&) = delete;
  void release() {
    if (!std::exchange(is_released_, true)) release_.set_value();
  }

 private:
  bool is_released_ = false;
  std::promise<void> release_;
  std::shared_future<void> released_ = release_.get_future().share();
  SavePointHook hook_;
};

/// The names in `folder`, equal on every rank.
Names names_in(const fs::path& folder) {
  Names names;
  parallel::barrier(groups(1).world);
  for (const auto& entry : fs::directory_iterator(folder)) names.push_back(entry.path().filename().string());
  parallel::barrier(groups(1).world);
  std::sort(names.begin(), names.end());
  return names;
}

class Saver : public testing::Test {
 protected:
  static constexpr int64_t kRows = 8;  // divisible by the ranks

  fs::path directory() const { return folder_.path() / "checkpoints"; }
  static const parallel::GroupPtr& world() { return groups(1).world; }

  /// Rows split over the world, and a matrix that rank 0 writes, not contiguous. The values depend on `step`.
  static CheckpointContents contents(int64_t step) {
    const int64_t rows = kRows / world_size();
    const int64_t begin = rows * world_rank();
    const auto value = static_cast<double>(step);
    auto split = at::arange(begin, begin + rows, test_support::device()).view({rows, 1}).to(at::kFloat).add(value);
    auto turned = at::full({3, 5}, value, at::TensorOptions(at::kBFloat16).device(test_support::device())).t();
    return {.step = step,
            .state = "{}",
            .tensors = {{{"split"}, split, {kRows, 1}, {Box::rows({kRows, 1}, 0, {begin, begin + rows})}},
                        {{"turned"}, turned, {5, 3}, {Box::whole({5, 3})}, world_rank() == 0}}};
  }

  /// Whether the checkpoint holds contents(step).
  testing::AssertionResult holds(const fs::path& folder, int64_t step) const {
    const auto expected = contents(step);
    auto loaded = contents(-1);
    verify_checkpoint(folder, world());
    const CheckpointReader reader(folder);
    reader.load(loaded.tensors);
    if (reader.step() != step) return testing::AssertionFailure() << "step " << reader.step();
    for (size_t i = 0; i < loaded.tensors.size(); ++i) {
      const auto same = test_support::equal(loaded.tensors[i].local, expected.tensors[i].local);
      if (!same) return same;
    }
    return testing::AssertionSuccess();
  }

  /// The error that all ranks throw, equal on all.
  template <class Action>
  std::string agreed_error(const Action& action) const {
    const auto text = test_support::error_of<parallel::AgreedError>(action);
    EXPECT_EQ(text, parallel::broadcast_text(text, 0, world()));
    return text;
  }

  static fs::path step_in(const fs::path& directory, int64_t step) {
    return directory / fmt::format("step-{:08}", step);
  }
  fs::path step(int64_t number) const { return step_in(directory(), number); }

 private:
  test_support::SharedFolder folder_;
};

}  // namespace

TEST_F(Saver, WritesTheValuesOfTheStep) {
  CheckpointSaver saver(directory(), world());
  for (const int64_t step : {1, 2}) {  // the second into the same memory
    auto now = contents(step);
    {
      HeldWriter writer("file_open");
      saver.start(now);
      for (const auto& tensor : now.tensors) tensor.local.fill_(-5);
      writer.release();
      saver.finish();
    }
    EXPECT_TRUE(holds(this->step(step), step));
  }
  EXPECT_EQ(names_in(directory()), (Names{"latest", "step-00000001", "step-00000002"}));
}

TEST_F(Saver, CopiesInTheBackgroundUntilTheValuesAreToChange) {
  CheckpointSaver saver(directory(), world());
  saver.synchronize_staging();
  for (const int64_t step : {1, 2}) {
    auto now = contents(step);
    HeldWriter writer("copied");
    saver.start(now, Staging::kInBackground);
    auto synchronized = std::async(std::launch::async, [&] { saver.synchronize_staging(); });
    if (world_rank() == world_size() - 1) {
      EXPECT_FALSE(saver.is_ready());
      EXPECT_EQ(synchronized.wait_for(std::chrono::seconds(0)), std::future_status::timeout);
    }
    writer.release();
    synchronized.get();
    for (const auto& tensor : now.tensors) tensor.local.fill_(-5);
    saver.finish();
    EXPECT_TRUE(saver.is_ready());
    EXPECT_TRUE(holds(this->step(step), step));
  }
}

TEST_F(Saver, ACopyThatFailsIsAnErrorOfAll) {
  CheckpointSaver saver(directory(), world());
  const SavePointHook hook([&](std::string_view name) {
    TORCH_CHECK(name != "copied" || world_rank() < world_size() - 1, "no memory left");
  });
  saver.start(contents(1), Staging::kInBackground);
  saver.synchronize_staging();
  EXPECT_NE(agreed_error([&] { saver.finish(); }).find("no memory left"), std::string::npos);
  EXPECT_FALSE(saver.is_pending());
  EXPECT_TRUE(names_in(directory()).empty());
}

TEST_F(Saver, WritesTheBytesOfASynchronousSave) {
  CheckpointSaver saver(directory(), world());
  saver.start(contents(3));
  saver.finish();
  const auto other = directory().parent_path() / "other";
  const auto synchronous = save_checkpoint(other, contents(3), world());
  EXPECT_EQ(synchronous, step_in(other, 3));
  const auto names = names_in(synchronous);
  EXPECT_EQ(names_in(step(3)), names);
  for (const auto& name : names) {
    EXPECT_EQ(test_support::read_file(step(3) / name), test_support::read_file(synchronous / name)) << name;
  }
}

TEST_F(Saver, AStepIsThereWhenEveryRankHasWritten) {
  CheckpointSaver saver(directory(), world());
  save_checkpoint(directory(), contents(1), world());
  int64_t number = 1;
  for (const std::string_view point :
       {"file_open", "half_written", "written", "file_renamed", "files_written", "manifest_written"}) {
    SCOPED_TRACE(point);
    const bool is_of_first = point == "files_written" || point == "manifest_written";
    HeldWriter writer(point, is_of_first ? 0 : world_size() - 1);
    saver.start(contents(++number));
    for (int i = 0; i < 3; ++i) EXPECT_TRUE(saver.poll());
    EXPECT_FALSE(fs::exists(step(number)));
    EXPECT_EQ(fs::canonical(directory() / "latest"), fs::canonical(step(number - 1)));
    parallel::barrier(world());
    writer.release();
    while (saver.poll()) {
    }
    EXPECT_FALSE(saver.is_pending());
    EXPECT_EQ(fs::canonical(directory() / "latest"), fs::canonical(step(number)));
    EXPECT_TRUE(holds(step(number), number));
  }
  for (const auto& name : names_in(directory())) EXPECT_FALSE(name.ends_with(".partial")) << name;
}

TEST_F(Saver, PollingSendsANumberWhileASaveIsPending) {
  const auto recorded = parallel::record(world());
  CheckpointSaver saver(directory(), recorded.group);
  const auto sent_by = [&](const auto& action) {
    const auto before = *recorded.count;
    action();
    return *recorded.count - before;
  };
  EXPECT_EQ(sent_by([&] { EXPECT_FALSE(saver.poll()); }), parallel::CommunicationCount{});
  HeldWriter writer("written");
  saver.start(contents(1));
  if (world_size() > 1) {  // a group of one sends nothing
    const auto sent = sent_by([&] { EXPECT_TRUE(saver.poll()); });
    parallel::CommunicationCount expected;
    expected.collectives[static_cast<size_t>(parallel::CollectiveKind::kAllReduce)] = 1;
    expected.bytes_sent = 2 * (world_size() - 1) * 4 / world_size();
    EXPECT_EQ(sent, expected);
  }
  writer.release();
  saver.finish();
  EXPECT_EQ(sent_by([&] {
              EXPECT_FALSE(saver.poll());
              saver.finish();
            }),
            parallel::CommunicationCount{});
}

TEST_F(Saver, AWriterThatFailsIsAnErrorOfAllAndLeavesTheLatest) {
  CheckpointSaver saver(directory(), world(), {.keep_last = 1});
  saver.start(contents(1));
  saver.finish();
  constexpr int64_t number = 2;
  for (const std::string_view point : {"file_open", "half_written", "written", "files_written", "manifest_written"}) {
    for (const bool polls : {false, true}) {
      SCOPED_TRACE(testing::Message() << point << (polls ? ", polled" : ""));
      const bool is_published = point == "files_written" || point == "manifest_written";
      const int failing = is_published ? 0 : world_size() - 1;
      {
        const SavePointHook hook(
            [&](std::string_view name) { TORCH_CHECK(name != point || world_rank() != failing, "no space left"); });
        saver.start(contents(number));
        const auto error = agreed_error([&] {
          while (polls && saver.poll()) {
          }
          saver.finish();
        });
        EXPECT_NE(error.find("no space left"), std::string::npos) << error;
      }
      EXPECT_FALSE(saver.is_pending());
      EXPECT_FALSE(saver.poll());
      EXPECT_EQ(names_in(directory()), (Names{"latest", "step-00000001"}));
      EXPECT_TRUE(holds(directory() / "latest", 1));
    }
  }
  saver.start(contents(number));
  saver.finish();
  EXPECT_EQ(names_in(directory()), (Names{"latest", "step-00000002"}));
}

TEST_F(Saver, StartRefusesWhatASaveRefuses) {
  auto fault = contents(1);
  fault.tensors.front().global_shape.front() += 1;
  CheckpointSaver saver(directory(), world());
  const auto error = agreed_error([&] { saver.start(fault); });
  EXPECT_NE(error.find("is in no piece"), std::string::npos) << error;
  EXPECT_FALSE(saver.is_pending());
  const auto file = directory().parent_path() / "a_file";
  if (world_rank() == 0) test_support::write_file(file, "");
  parallel::barrier(world());
  CheckpointSaver elsewhere(file, world());
  EXPECT_NE(agreed_error([&] { elsewhere.start(contents(1)); }).find("a_file"), std::string::npos);
  EXPECT_FALSE(elsewhere.is_pending());
}

// The second start() comes while the first save is held; its first collective releases it.
TEST_F(Saver, AStartWaitsForTheSaveBeforeAndSaysSoOnce) {
  if (world_size() == 1) GTEST_SKIP() << "a group of one rank sends nothing";
  std::optional<HeldWriter> writer;
  bool releases = false;
  const auto watched = parallel::observe(world(), [&](parallel::CollectiveKind, int64_t) {
    if (releases) writer->release();
  });
  CheckpointSaver saver(directory(), watched);
  test_support::Warnings warnings;
  for (const int64_t first : {1, 3}) {
    writer.emplace("written");
    releases = false;
    saver.start(contents(first));
    EXPECT_TRUE(saver.poll());
    releases = true;
    saver.start(contents(first + 1));
    saver.finish();
    writer.reset();
  }
  ASSERT_EQ(warnings.texts.size(), world_rank() == 0 ? 1 : 0);
  for (const auto& text : warnings.texts) {
    EXPECT_TRUE(test_support::contains(
        text, "the checkpoint of step 1 was still being written when that of step 2 was due: training waited "));
  }
  EXPECT_EQ(names_in(directory()),
            (Names{"latest", "step-00000001", "step-00000002", "step-00000003", "step-00000004"}));
  for (int64_t number = 1; number <= 4; ++number) EXPECT_TRUE(holds(step(number), number));
}

TEST_F(Saver, AnExceptionAbandonsTheSave) {
  save_checkpoint(directory(), contents(1), world());
  HeldWriter writer("file_open");
  const auto failing_step = [&] {
    CheckpointSaver saver(directory(), world());
    saver.start(contents(2));
    EXPECT_TRUE(saver.poll());
    writer.release();
    throw std::runtime_error("a step failed");
  };
  EXPECT_THROW(failing_step(), std::runtime_error);
  EXPECT_EQ(names_in(directory()), (Names{"latest", "step-00000001", "step-00000002.partial"}));
  CheckpointSaver saver(directory(), world());
  saver.start(contents(3));
  saver.finish();
  EXPECT_EQ(names_in(directory()), (Names{"latest", "step-00000001", "step-00000003"}));
  EXPECT_TRUE(holds(directory() / "latest", 3));
}

TEST_F(Saver, KeepsTheLastOnes) {
  CheckpointSaver saver(directory(), world(), {.keep_last = 2});
  for (int64_t number = 1; number <= 4; ++number) {
    saver.start(contents(number));
    saver.poll();
  }
  saver.finish();
  EXPECT_EQ(names_in(directory()), (Names{"latest", "step-00000003", "step-00000004"}));
}

}  // namespace megatron_cpp
