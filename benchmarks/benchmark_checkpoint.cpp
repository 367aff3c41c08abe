// What a checkpoint costs a training step: save_checkpoint against the calls of CheckpointSaver, in turns.
//
//   mpirun -np 2 --bind-to none build/bin/benchmark_checkpoint --directory /tmp/checkpoints
//
// Prints a JSON object a line: first the machine, then milliseconds of the slowest rank. A save is synchronous; or it
// goes on beside training steps until it is whole (`until_whole`), which wait for it in start(), before the values
// change (`staging`) and in polls (`polls`, all of a save together). A training step is the products of a dense model
// whose parameters and two moments are the state, forward and backward over --positions of them, then a change of the
// values, and an all-reduce that says how far the ranks are. `ratio` is what the steps wait for of a synchronous save.
// Copying and writing also take memory bandwidth, and cores where all are busy: `slowed` is by how much the steps of a
// save take longer than as many without, waiting left out, again as a part of a synchronous save.
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
  int64_t positions = 256;
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
  std::vector<double> staging;
  std::vector<double> polls;
  std::vector<double> until_whole;
  std::vector<double> waited;  ///< the first three together
  std::vector<double> slowed;
};

/// Products of a rank's share of a training step.
class Products {
 public:
  Products(const Arguments& arguments, const c10::Device& device, int64_t num_ranks)
      : a_(at::randn({kSide, kSide}, at::TensorOptions(at::kFloat).device(device))) {
    constexpr int64_t kBytesOfParameter = 12;  // with two moments
    constexpr int64_t kFlopsOfParameter = 6;   // a position
    const auto parameters = arguments.megabytes * 1'000'000 / kBytesOfParameter / num_ranks;
    number_ = std::max<int64_t>(1, kFlopsOfParameter * parameters * arguments.positions / (2 * kSide * kSide * kSide));
  }

  void compute() const {
    for (int64_t product = 0; product < number_; ++product) at::mm(a_, a_);
    benchmarks::wait_for(a_.device());
  }

 private:
  static constexpr int64_t kSide = 512;
  at::Tensor a_;
  int64_t number_;
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
  const Products products(arguments, device, world->getSize());
  // A step's end, which every run has, with a save or without.
  const auto all_are_ready = [&] {
    const auto own = at::full({1}, saver.is_ready() ? 1 : 0, at::kInt);
    return parallel::all_reduce(own, world, parallel::Reduction::kMin).item<int>() == 1;
  };
  const auto save_asynchronously = [&] {
    ++contents.step;
    double staging = 0.0;
    double polls = 0.0;
    int64_t num_steps = 0;
    parallel::barrier(world);
    const auto begin = Clock::now();
    saver.start(contents, Staging::kInBackground);
    const double start = benchmarks::milliseconds_since(begin);
    for (bool is_pending = true; is_pending; ++num_steps) {
      products.compute();
      const auto copied = Clock::now();
      saver.synchronize_staging();
      staging += benchmarks::milliseconds_since(copied);
      contents.tensors.front().local.add_(1.0);
      const bool ready = all_are_ready();
      const auto poll = Clock::now();
      is_pending = saver.poll(ready);
      polls += benchmarks::milliseconds_since(poll);
    }
    const double until_whole = benchmarks::milliseconds_since(begin);
    parallel::barrier(world);
    const auto without = Clock::now();
    for (int64_t step = 0; step < num_steps; ++step) {
      products.compute();
      contents.tensors.front().local.add_(1.0);
      all_are_ready();
    }
    const double waited = start + staging + polls;
    times.start.push_back(slowest(start));
    times.staging.push_back(slowest(staging));
    times.polls.push_back(slowest(polls));
    times.until_whole.push_back(slowest(until_whole));
    times.waited.push_back(slowest(waited));
    times.slowed.push_back(slowest(until_whole - waited - benchmarks::milliseconds_since(without)));
  };
  save_asynchronously();  // the first takes new memory
  const auto first = times.waited.front();
  times = {};
  for (int64_t round = 0; round < arguments.rounds; ++round) {
    save();
    save_asynchronously();
  }
  const double synchronous_ms = benchmarks::median(synchronous);
  benchmarks::print({{"part", "checkpoint"},
                     {"megabytes", arguments.megabytes},
                     {"tensors", arguments.tensors},
                     {"positions", arguments.positions},
                     {"synchronous_ms", benchmarks::min_and_median(synchronous)},
                     {"first_waited_ms", first},
                     {"start_ms", benchmarks::min_and_median(times.start)},
                     {"staging_ms", benchmarks::min_and_median(times.staging)},
                     {"polls_ms", benchmarks::min_and_median(times.polls)},
                     {"until_whole_ms", benchmarks::min_and_median(times.until_whole)},
                     {"ratio", benchmarks::median(times.waited) / synchronous_ms},
                     {"slowed", benchmarks::median(times.slowed) / synchronous_ms}},
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
  benchmarks::add_size_option(app, "--positions", arguments.positions, "of a training step");
  app.add_option("--directory", arguments.directory, "on the disk to measure")->capture_default_str();
  benchmarks::add_device_option(app, arguments.device);
  return benchmarks::run_on_ranks(app, argc, argv, [&](parallel::Runtime& runtime) { return run(arguments, runtime); });
}
