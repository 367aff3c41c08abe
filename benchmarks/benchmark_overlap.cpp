// Whether gradients are reduced, and parameters gathered, while the passes run: a training step of a small Step3.7 on
// replicas with and without that, in turns.
//
//   mpirun -np 2 --bind-to none build/bin/benchmark_overlap
//   torchrun --no-python --nproc-per-node 2 build/bin/benchmark_overlap --trace overlap.json
//
// Over Gloo with torchrun, over MPI or NCCL with mpirun. Prints a JSON object a line: first the machine, then for each
// optimizer the times of a step, and what a traced step shows of the collectives. --trace also writes rank 0's last
// traced step, for ui.perfetto.dev.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/profiler_kineto.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "benchmarks/small_step37.h"
#include "benchmarks/support.h"
#include "megatron_cpp/training/trainer.h"
#include "parallel/collectives.h"
#include "parallel/environment_groups.h"
#include "parallel/host_memory.h"
#include "parallel/process_groups.h"
#include "parallel/runtime.h"
#include "step37/step37_model.h"

namespace megatron_cpp {
namespace {

namespace profiler = torch::autograd::profiler;

struct Arguments {
  benchmarks::SmallStep37 model{.sequence = 256};
  int64_t bucket_elements = 2'000'000;
  std::string device = "cpu";
  double seconds = 8.0;
  std::string trace;
};

struct Interval {
  int64_t begin = 0;
  int64_t end = 0;
};

/// Nanoseconds that lie in one of `intervals` and in `within`.
int64_t covered(std::vector<Interval> intervals, Interval within) {
  std::sort(intervals.begin(), intervals.end(), [](const auto& a, const auto& b) { return a.begin < b.begin; });
  int64_t sum = 0;
  int64_t reached = within.begin;
  for (const auto& interval : intervals) {
    const int64_t begin = std::max(interval.begin, reached);
    const int64_t end = std::min(interval.end, within.end);
    if (begin >= end) continue;
    sum += end - begin;
    reached = end;
  }
  return sum;
}

/// A model on replicas and its trainer.
class Replica {
 public:
  Replica(const Arguments& arguments, const c10::Device& device, const parallel::ProcessGroups& groups,
          bool distributed_optimizer, bool overlap)
      : model_(config_of(arguments), groups),
        num_tokens_(arguments.model.sequence * groups.dp->getSize()),
        batch_(arguments.model.text_batch()) {
    model_->to(device);
    const auto shards = parameter_shards(*model_);
    initialize_parameters(shards, 1);
    TrainerOptions options;
    options.learning_rate = {.peak = 1e-4, .floor = 1e-4, .warmup_steps = 0, .total_steps = 1'000'000};
    options.gradients = {.distributed_optimizer = distributed_optimizer,
                         .bucket_elements = arguments.bucket_elements,
                         .overlap_reduction = overlap,
                         .overlap_gather = overlap};
    trainer_ = std::make_unique<Trainer>(shards, groups, options);
  }

  void step() {
    trainer_->step([&](int64_t) { return model_->loss_sum(batch_); }, 1, num_tokens_);
  }

 private:
  static step37::Step37Config config_of(const Arguments& arguments) {
    auto config = arguments.model.config();
    config.freeze_vision_model = true;
    config.freeze_projector = true;
    return config;
  }

  step37::Step37Model model_;
  int64_t num_tokens_;
  step37::Step37Batch batch_;
  std::unique_ptr<Trainer> trainer_;
};

/// Whether an event is a collective of gradients or parameters: c10d's name for it.
bool is_collective(const std::string& name) {
  return name.starts_with("gloo:") || name.starts_with("nccl:") || name.starts_with("ncclDevKernel");
}

/// Two steps of `replica` under LibTorch's profiler: how long collectives ran, and how much of that while autograd's
/// functions or the forward pass did. Over MPI the profiler sees no collectives.
void trace(Replica& replica, const Arguments& arguments, const c10::Device& device, nlohmann::ordered_json row,
           int rank) {
  const torch::profiler::impl::ProfilerConfig config(torch::profiler::impl::ProfilerState::KINETO);
  using torch::profiler::impl::ActivityType;
  std::set<ActivityType> activities{ActivityType::CPU};
  if (device.is_cuda()) activities.insert(ActivityType::CUDA);
  profiler::prepareProfiler(config, activities);
  profiler::enableProfiler(
      config, activities,
      {at::RecordScope::FUNCTION, at::RecordScope::BACKWARD_FUNCTION, at::RecordScope::USER_SCOPE});  // of c10d
  replica.step();
  replica.step();
  benchmarks::wait_for(device);
  const auto result = profiler::disableProfiler();
  std::vector<Interval> collectives;
  std::vector<Interval> computation;
  Interval all{std::numeric_limits<int64_t>::max(), 0};
  for (const auto& event : result->events()) {
    const Interval interval{static_cast<int64_t>(event.startNs()), static_cast<int64_t>(event.endNs())};
    all = {std::min(all.begin, interval.begin), std::max(all.end, interval.end)};
    if (is_collective(event.name())) {
      collectives.push_back(interval);
    } else if (event.name() == "aten::mm" || event.name().starts_with("aten::addmm")) {
      computation.push_back(interval);
    }
  }
  int64_t both = 0;
  int64_t of_collectives = covered(collectives, all);
  for (const auto& interval : computation) both += covered(collectives, interval);
  row["collectives"] = collectives.size();
  row["collectives_ms"] = 1e-6 * static_cast<double>(of_collectives);
  row["while_products_run_ms"] = 1e-6 * static_cast<double>(both);
  benchmarks::print(row, rank);
  if (rank == 0 && !arguments.trace.empty()) result->save(arguments.trace);
}

int run(const Arguments& arguments, const c10::Device& device, const parallel::ProcessGroups& groups) {
  if (std::getenv("OMP_NUM_THREADS") == nullptr) at::set_num_threads(1);
  const int rank = groups.world->getRank();
  benchmarks::print(benchmarks::machine(groups.world->getSize(), device), rank);
  const auto backend = groups.dp->getBackend(device.type())->getBackendName();
  for (const bool distributed_optimizer : {false, true}) {
    Replica without(arguments, device, groups, distributed_optimizer, false);
    Replica with(arguments, device, groups, distributed_optimizer, true);
    const benchmarks::Rounds rounds{.warm_up = 2, .min = 5, .max = 40, .seconds = arguments.seconds};
    const auto times =
        benchmarks::measure({[&] { without.step(); }, [&] { with.step(); }}, rounds, groups.world, device);
    const auto least = [](const std::vector<double>& ms) { return *std::min_element(ms.begin(), ms.end()); };
    nlohmann::ordered_json row{
        {"part", "overlap"}, {"backend", backend}, {"distributed_optimizer", distributed_optimizer}};
    auto step = row;
    step["without_ms"] = benchmarks::min_and_median(times[0]);
    step["ms"] = benchmarks::min_and_median(times[1]);
    step["ratio"] = least(times[1]) / least(times[0]);
    benchmarks::print(step, rank);
    trace(with, arguments, device, row, rank);
  }
  return 0;
}

}  // namespace
}  // namespace megatron_cpp

int main(int argc, char** argv) {
  using namespace megatron_cpp;
  parallel::keep_freed_host_memory();  // as a training program does
  CLI::App app("Times a training step with and without overlap. Start with mpirun -np N or torchrun.",
               "benchmark_overlap");
  Arguments arguments;
  arguments.model.add_options(app);
  benchmarks::add_size_option(app, "--bucket-elements", arguments.bucket_elements,
                              "elements that are reduced at a time");
  benchmarks::add_device_option(app, arguments.device);
  app.add_option("--seconds", arguments.seconds, "steps go on for this long, five at least")->capture_default_str();
  app.add_option("--trace", arguments.trace, "file for rank 0's trace");
  if (parallel::ranks_in_environment()) {
    CLI11_PARSE(app, argc, argv);
    const c10::Device device(arguments.device);
    const parallel::RankGrid grid{.dp = parallel::world_size_in_environment()};
    return run(arguments, device, parallel::process_groups_from_environment(grid, {}, device));
  }
  return benchmarks::run_on_ranks(app, argc, argv, [&](parallel::Runtime& runtime) {
    const auto device = benchmarks::choose_device(runtime, arguments.device);
    return run(arguments, device, parallel::make_process_groups(runtime, {.dp = runtime.size()}));
  });
}
