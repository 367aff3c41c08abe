// Processes that are killed at each moment of a save: a whole checkpoint is there, and the next start goes on from it.
#include "megatron_cpp/checkpoint/save_points.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <stdlib.h>  // setenv
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "megatron_cpp/checkpoint/checkpoint_saver.h"
#include "megatron_cpp/checkpoint/sharded_checkpoint.h"
#include "parallel/environment_groups.h"
#include "parallel/errors.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp {
namespace {

namespace fs = std::filesystem;

struct Job {
  int ranks = 1;
  bool asynchronous = false;
  fs::path folder;
  fs::path checkpoints() const { return folder / "checkpoints"; }
};

/// A port of this host that nobody listens at.
int free_port() {
  const int descriptor = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  auto* any = reinterpret_cast<sockaddr*>(&address);
  EXPECT_EQ(bind(descriptor, any, size), 0);
  EXPECT_EQ(getsockname(descriptor, any, &size), 0);
  close(descriptor);
  return ntohs(address.sin_port);
}

/// The world of `job.ranks` processes of this host, as torchrun starts them.
parallel::GroupPtr connect(const Job& job, int port, int rank) {
  const auto set = [](const char* name, const std::string& value) { setenv(name, value.c_str(), /*overwrite=*/1); };
  set("RANK", fmt::to_string(rank));
  set("WORLD_SIZE", fmt::to_string(job.ranks));
  set("MASTER_ADDR", "127.0.0.1");
  set("MASTER_PORT", fmt::to_string(port));
  const parallel::ProcessGroupsOptions options{.timeout = std::chrono::seconds(60)};
  return parallel::process_groups_from_environment({.dp = job.ranks}, options).world;
}

/// What a rank trains: rows of a matrix, which are `step` after step `step`.
std::vector<ShardedTensor> tensors(int ranks, int rank, int64_t step) {
  constexpr int64_t kRows = 4;
  const int64_t rows = kRows / ranks;
  std::vector<ShardedTensor> result;
  for (const std::string name : {"a", "b", "c"}) {
    result.push_back({{name},
                      at::full({rows, 8}, static_cast<double>(step)),
                      {kRows, 8},
                      {Box::rows({kRows, 8}, 0, {rows * rank, rows * (rank + 1)})}});
  }
  return result;
}

/// A start of a training program: goes on from the checkpoint that is whole, which must be that of step
/// `expected_step`, up to step `last_step`.
void train(const Job& job, int port, int rank, int64_t expected_step, int64_t last_step) {
  const auto world = connect(job, port, rank);
  const auto whole = find_whole_checkpoint(job.checkpoints(), world).whole;
  int64_t step = 0;
  if (whole) {
    const CheckpointReader reader(*whole);
    step = reader.step();
    const auto loaded = tensors(job.ranks, rank, -1);
    reader.load(loaded);
    for (const auto& tensor : loaded) {
      TORCH_CHECK(tensor.local.eq(static_cast<double>(step)).all().item<bool>(), "not the values of step ", step);
    }
  }
  TORCH_CHECK(step == expected_step, "goes on from step ", step, ", expected ", expected_step);
  const SaveCheckpointOptions options{.keep_last = 1};
  CheckpointSaver saver(job.checkpoints(), world, options);
  while (step < last_step) {
    saver.poll();
    ++step;
    const CheckpointContents contents{.step = step, .state = "{}", .tensors = tensors(job.ranks, rank, step)};
    if (job.asynchronous) {
      saver.start(contents);
    } else {
      save_checkpoint(job.checkpoints(), contents, world, options);
    }
  }
  saver.finish();
}

/// A process that does this; its exit status is 1 if it throws.
pid_t fork_to(const std::function<void()>& action) {
  const pid_t child = fork();
  if (child != 0) return child;
  int status = 0;
  try {
    action();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", parallel::error_text(error).c_str());
    status = 1;
  }
  std::_Exit(status);
}

int status_of(pid_t process) {
  int status = 0;
  EXPECT_EQ(waitpid(process, &status, 0), process);
  return status;
}

/// Starts the ranks; `prepare` is called in each before it begins.
std::vector<pid_t> start(const Job& job, int64_t expected_step, int64_t last_step,
                         const std::function<void(int)>& prepare) {
  const int port = free_port();
  std::vector<pid_t> ranks;
  for (int rank = 0; rank < job.ranks; ++rank) {
    ranks.push_back(fork_to([&] {
      prepare(rank);
      train(job, port, rank, expected_step, last_step);
    }));
  }
  return ranks;
}

void kill_at(const Job& job, std::string_view point, int victim) {
  SCOPED_TRACE(testing::Message() << point << " of rank " << victim << " of " << job.ranks
                                  << (job.asynchronous ? ", asynchronous" : ""));
  const auto ranks = start(job, 0, 3, [&](int rank) {
    const auto second_time = std::string(point) + ":2";
    if (rank == victim) setenv("MCPP_KILL_AT_SAVE_POINT", second_time.c_str(), /*overwrite=*/1);
  });
  const int status = status_of(ranks[static_cast<size_t>(victim)]);
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << "status " << status;
  for (int rank = 0; rank < job.ranks; ++rank) {  // as mpirun does
    if (rank == victim) continue;
    kill(ranks[static_cast<size_t>(rank)], SIGKILL);
    status_of(ranks[static_cast<size_t>(rank)]);
  }

  const auto* const begin = internal::kSavePoints.begin();
  const bool is_published = std::find(begin, internal::kSavePoints.end(), point) >=
                            std::find(begin, internal::kSavePoints.end(), "folder_renamed");
  // The first old one is removed in the second save.
  const int64_t expected = !is_published ? 1 : point == "old_removing" ? 3 : 2;
  for (const pid_t rank : start(job, expected, 4, [](int) {})) EXPECT_EQ(status_of(rank), 0);
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(job.checkpoints())) names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  EXPECT_EQ(names, (std::vector<std::string>{"latest", "step-00000004"}));
  EXPECT_EQ(fs::read_symlink(job.checkpoints() / "latest"), "step-00000004");
}

}  // namespace

TEST(SavePoints, AKilledProcessLeavesAWholeCheckpoint) {
  int jobs = 0;
  for (const auto& [ranks, victim] : {std::pair{1, 0}, {2, 0}, {2, 1}}) {
    for (const bool asynchronous : {false, true}) {
      for (const auto point : internal::kSavePoints) {
        if (victim != 0 && point == "files_written") break;  // from there on rank 0 is alone
        const test_support::TemporaryFolder folder;
        kill_at({.ranks = ranks, .asynchronous = asynchronous, .folder = folder.path()}, point, victim);
        ++jobs;
      }
    }
  }
  std::printf("killed %d times\n", jobs);
}

TEST(SavePoints, AnUnknownNameIsAnError) {
  for (const char* text : {"nowhere", "written:", "written:0", "written:2x"}) {
    const pid_t child = fork_to([&] {
      setenv("MCPP_KILL_AT_SAVE_POINT", text, /*overwrite=*/1);
      internal::save_point("written");
    });
    const int status = status_of(child);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 1) << text;
  }
}

}  // namespace megatron_cpp
