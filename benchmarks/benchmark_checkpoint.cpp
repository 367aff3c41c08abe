// What a checkpoint costs a training step: save_checkpoint against the calls of CheckpointSaver, in turns.
//
//   mpirun -np 2 --bind-to none build/bin/benchmark_checkpoint --directory /tmp/checkpoints
//
// Prints a JSON object a line: first the machine, then milliseconds of the slowest rank. A save is synchronous; or
// start() copies the values (`start`), and polls come between products of matrices (`polls`, all of a save together)
// until it is whole (`until_whole`).
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "benchmarks/support.h"
#include "megatron_cpp/checkpoint/checkpoint_saver.h"
#include "megatron_cpp/checkpoint/sharded_checkpoint.h"
#include "parallel/agree.h"
#include "parallel/collectives.h"
#include "parallel/host_memory.h"
#include "parallel/process_groups.h"
#include "parallel/runtime.h"

namespace megatron_cpp {
namespace {

struct Arguments {
  int64_t megabytes = 384;
  int64_t tensors = 192;
  int64_t rounds = 5;
  std::filesystem::path directory = std::filesystem::temp_directory_path() / "benchmark_checkpoint";
  std::string device = "cpu";
};

/// A rank's rows of float32 matrices.
std::vector<ShardedTensor> state(const Arguments& arguments, const c10::Device& device,
                                 const parallel::GroupPtr& world) {
  constexpr int64_t kColumns = 1024;
  const int64_t size = world->getSize();
  const int64_t rows =
      std::max<int64_t>(1, arguments.megabytes * 1'000'000 / (4 * kColumns * arguments.tensors * size));
  const int64_t begin = rows * world->getRank();
  std::vector<ShardedTensor> tensors;
  for (int64_t i = 0; i < arguments.tensors; ++i) {
    const std::vector<int64_t> shape{rows * size, kColumns};
    tensors.push_back({{fmt::format("tensor{}", i)},
                       at::randn({rows, kColumns}, at::TensorOptions(at::kFloat).device(device)),
                       shape,
                       {Box::rows(shape, 0, {begin, begin + rows})}});
  }
  return tensors;
}

/// What a save took, each the slowest rank's.
struct Times {
  std::vector<double> start;
  std::vector<double> polls;
  std::vector<double> until_whole;
};

int run(const Arguments& arguments, parallel::Runtime& runtime) {
  using benchmarks::Clock;
  if (std::getenv("OMP_NUM_THREADS") == nullptr) at::set_num_threads(1);
  const auto device = benchmarks::choose_device(runtime, arguments.device);
  const auto world = parallel::make_process_groups(runtime, {.dp = runtime.size()}).world;
  const int rank = world->getRank();
  benchmarks::print(benchmarks::machine(world->getSize(), device), rank);

  CheckpointContents contents{.state = "{}", .tensors = state(arguments, device, world)};
  const SaveCheckpointOptions options{.keep_last = 1};
  const auto slowest = [&](double ms) { return benchmarks::over_ranks(ms, parallel::Reduction::kMax, world); };
  std::vector<double> synchronous;
  const auto save = [&] {
    ++contents.step;
    parallel::barrier(world);
    const auto begin = Clock::now();
    save_checkpoint(arguments.directory, contents, world, options);
    synchronous.push_back(slowest(benchmarks::milliseconds_since(begin)));
  };
  Times times;
  CheckpointSaver saver(arguments.directory, world, options);
  const auto a = at::randn({512, 512}, at::TensorOptions(at::kFloat).device(device));
  const auto save_asynchronously = [&] {
    ++contents.step;
    parallel::barrier(world);
    const auto begin = Clock::now();
    saver.start(contents);
    times.start.push_back(slowest(benchmarks::milliseconds_since(begin)));
    double polls = 0.0;
    for (bool is_pending = true; is_pending;) {
      for (int product = 0; product < 4; ++product) at::mm(a, a);
      benchmarks::wait_for(device);
      parallel::barrier(world);  // a step's end
      const auto poll = Clock::now();
      is_pending = saver.poll();
      polls += benchmarks::milliseconds_since(poll);
    }
    times.polls.push_back(slowest(polls));
    times.until_whole.push_back(slowest(benchmarks::milliseconds_since(begin)));
  };
  save_asynchronously();  // the first takes new memory
  const auto first = times.start.front();
  times = {};
  for (int64_t round = 0; round < arguments.rounds; ++round) {
    save();
    save_asynchronously();
  }
  const auto ratio =
      (benchmarks::median(times.start) + benchmarks::median(times.polls)) / benchmarks::median(synchronous);
  benchmarks::print({{"part", "checkpoint"},
                     {"megabytes", arguments.megabytes},
                     {"tensors", arguments.tensors},
                     {"synchronous_ms", benchmarks::min_and_median(synchronous)},
                     {"first_start_ms", first},
                     {"start_ms", benchmarks::min_and_median(times.start)},
                     {"polls_ms", benchmarks::min_and_median(times.polls)},
                     {"until_whole_ms", benchmarks::min_and_median(times.until_whole)},
                     {"ratio", ratio}},
                    rank);
  parallel::barrier(world);
  if (rank == 0) remove_checkpoints(arguments.directory);
  return 0;
}

}  // namespace
}  // namespace megatron_cpp

int main(int argc, char** argv) {
  using namespace megatron_cpp;
  parallel::keep_freed_host_memory();  // as a training program does
  CLI::App app("Times checkpoints that are saved while training goes on. Start with mpirun -np N.",
               "benchmark_checkpoint");
  Arguments arguments;
  benchmarks::add_size_option(app, "--megabytes", arguments.megabytes, "of all ranks together");
  benchmarks::add_size_option(app, "--tensors", arguments.tensors, "they consist of");
  benchmarks::add_size_option(app, "--rounds", arguments.rounds, "timed saves of each kind");
  app.add_option("--directory", arguments.directory, "on the disk to measure")->capture_default_str();
  benchmarks::add_device_option(app, arguments.device);
  return benchmarks::run_on_ranks(app, argc, argv, [&](parallel::Runtime& runtime) { return run(arguments, runtime); });
}
