// Where the time of a training step goes: forward, backward, gradient reduction, norm and clipping, optimizer, of a
// small Step3.7 whose ranks are one tensor-parallel group under sequence parallelism, or several with --data.
//
//   mpirun -np 2 --bind-to none build/bin/benchmark_training_step [--dtype float32] [--data 2] [--sequence 1024]
//     [--device cuda]
//
// Prints a JSON object a line: first the machine, then, for each dtype, the step and its parts.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "benchmarks/small_step37.h"
#include "benchmarks/support.h"
#include "megatron_cpp/optimizer/adamw.h"
#include "megatron_cpp/optimizer/gradient_buffer.h"
#include "parallel/host_memory.h"
#include "parallel/process_groups.h"
#include "parallel/runtime.h"
#include "step37/step37_model.h"

namespace megatron_cpp {
namespace {

constexpr int64_t kPictures = 4;

struct Arguments {
  std::vector<std::string> dtypes = {"float32", "bfloat16"};
  benchmarks::SmallStep37 model;
  int data = 1;
  std::string device = "cpu";
  double seconds = 8.0;
};

step37::Step37Batch make_batch(const Arguments& arguments, const step37::Step37Config& config,
                               const c10::Device& device) {
  const int64_t S = arguments.model.sequence;
  auto batch = arguments.model.text_batch();
  for (int64_t i = 0; i < kPictures; ++i) batch.input_ids[0][i * S / kPictures] = benchmarks::kImageStart;
  step37::ImageForInsert images;
  images.insert_start_token = benchmarks::kImageStart;
  images.images = at::ones({kPictures, 3, config.vision.image_size, config.vision.image_size}, device);
  batch.images.push_back(std::move(images));
  return batch;
}

/// In the order of the step.
enum Part : size_t { kForward, kBackward, kReduction, kNormAndClipping, kOptimizer, kNumParts };
constexpr std::array<const char*, kNumParts> kPartNames = {"forward", "backward", "gradient_reduction",
                                                           "norm_and_clipping", "optimizer"};

/// The blocks of Trainer::step, with a look at the clock after each.
class TimedStep {
 public:
  TimedStep(const Arguments& arguments, at::ScalarType dtype, const c10::Device& device,
            const parallel::ProcessGroups& groups)
      : groups_(groups),
        device_(device),
        config_(arguments.model.config()),
        model_(config_, groups.tp),
        batch_(make_batch(arguments, config_, device)),
        num_loss_tokens_(static_cast<double>(arguments.model.sequence * groups.grid.dp)),
        parameters_(prepare(*model_, dtype, device)),
        gradients_(parameters_, groups),
        optimizer_(gradients_.parameters(), {}) {}

  /// Milliseconds of each part on this rank. Ranks begin together; nothing else but the parts' own collectives makes
  /// them wait for each other, and what a rank waits counts to the part that it waits in.
  std::array<double, kNumParts> run() {
    std::array<double, kNumParts> times{};
    benchmarks::wait_for(device_);
    parallel::barrier(groups_.world);
    auto last = benchmarks::Clock::now();
    const auto lap = [&](Part part) {
      benchmarks::wait_for(device_);
      times[part] = benchmarks::milliseconds_since(last);
      last = benchmarks::Clock::now();
    };
    auto loss = model_->loss_sum(batch_, nullptr, 1.0 / num_loss_tokens_).tokens / num_loss_tokens_;
    lap(kForward);
    loss.backward();
    lap(kBackward);
    gradients_.reduce();
    const double global_loss = parallel::all_reduce(loss.detach().reshape({1}), groups_.dp).item<double>();
    lap(kReduction);
    const double norm = gradients_.norm();
    TORCH_CHECK(std::isfinite(global_loss) && std::isfinite(norm), "loss ", global_loss, ", gradient norm ", norm);
    gradients_.scale(std::min(1.0, 1.0 / norm));
    lap(kNormAndClipping);
    optimizer_.step(1e-4);
    gradients_.zero();  // for the next step
    lap(kOptimizer);
    return times;
  }

  /// Operations of the decoder's and the output layer's matrices in forward and backward, of one rank: two for every
  /// element and token, three times. Attention, embedding and tower come on top.
  double product_operations() const {
    double elements = 0.0;
    for (const auto& shard : parameters_) {
      const bool in_products =
          shard.name.find("decoder") != std::string::npos || shard.name.find("output_layer") != std::string::npos;
      if (in_products && shard.parameter.dim() == 2) elements += static_cast<double>(shard.parameter.numel());
    }
    return 6.0 * elements * static_cast<double>(batch_.input_ids.numel());
  }

 private:
  static std::vector<ParameterShard> prepare(torch::nn::Module& model, at::ScalarType dtype,
                                             const c10::Device& device) {
    initialize_parameters(parameter_shards(model), 1);
    model.to(device, dtype);
    return parameter_shards(model);
  }

  parallel::ProcessGroups groups_;
  c10::Device device_;
  step37::Step37Config config_;
  step37::Step37Model model_;
  step37::Step37Batch batch_;
  double num_loss_tokens_;
  std::vector<ParameterShard> parameters_;
  GradientBuffer gradients_;
  AdamW optimizer_;
};

void benchmark(const Arguments& arguments, at::ScalarType dtype, const c10::Device& device,
               const parallel::ProcessGroups& groups) {
  TimedStep step(arguments, dtype, device, groups);
  double gigaflops = 0.0;
  std::array<std::vector<double>, kNumParts> parts;
  std::vector<double> whole;
  const benchmarks::Rounds rounds{.warm_up = 2, .min = 3, .max = 30, .seconds = arguments.seconds};
  benchmarks::take_turns(1, rounds, groups.world, [&](size_t, bool timed) {
    const auto times = step.run();
    // Between the steps, so that both meet the machine at its best at some time.
    gigaflops = std::max(gigaflops, benchmarks::gemm_gigaflops(dtype, groups.world, device));
    if (!timed) return;
    // The mean over the ranks, so that the parts are together as long as the step.
    for (size_t part = 0; part < kNumParts; ++part) {
      parts[part].push_back(benchmarks::over_ranks(times[part], parallel::Reduction::kSum, groups.world) /
                            groups.world->getSize());
    }
    const double sum = std::accumulate(times.begin(), times.end(), 0.0);
    whole.push_back(benchmarks::over_ranks(sum, parallel::Reduction::kMax, groups.world));
  });

  const int rank = groups.world->getRank();
  const int64_t tokens = arguments.model.sequence * groups.grid.dp;
  const double products_ms = step.product_operations() / gigaflops / 1e6;
  const double least_ms = *std::min_element(whole.begin(), whole.end());
  benchmarks::print({{"part", "step"},
                     {"dtype", benchmarks::name_of(dtype)},
                     {"tp", groups.grid.tp},
                     {"dp", groups.grid.dp},
                     {"tokens", tokens},
                     {"steps", whole.size()},
                     {"ms", benchmarks::min_and_median(whole)},
                     {"tokens_per_second", static_cast<double>(tokens) / benchmarks::median(whole) * 1000.0},
                     {"products_ms", products_ms},
                     {"ratio_to_products", least_ms / products_ms}},
                    rank);
  double sum = 0.0;
  for (const auto& times : parts) sum += benchmarks::median(times);
  for (size_t part = 0; part < kNumParts; ++part) {
    benchmarks::print({{"part", kPartNames[part]},
                       {"dtype", benchmarks::name_of(dtype)},
                       {"tp", groups.grid.tp},
                       {"dp", groups.grid.dp},
                       {"ms", benchmarks::min_and_median(parts[part])},
                       {"share", benchmarks::median(parts[part]) / sum}},
                      rank);
  }
}

int run(parallel::Runtime& runtime, const Arguments& arguments) {
  if (std::getenv("OMP_NUM_THREADS") == nullptr) at::set_num_threads(1);
  const auto device = benchmarks::choose_device(runtime, arguments.device);
  const int tp = runtime.size() / arguments.data;
  const auto groups = parallel::make_process_groups(runtime, {.tp = tp, .dp = arguments.data});
  benchmarks::print(benchmarks::machine(runtime.size(), device), runtime.rank());
  for (const auto& dtype : arguments.dtypes) benchmark(arguments, benchmarks::dtype_of(dtype), device, groups);
  return 0;
}

}  // namespace
}  // namespace megatron_cpp

int main(int argc, char** argv) {
  using namespace megatron_cpp;
  parallel::keep_freed_host_memory();  // as a training program does
  CLI::App app("Times the parts of a training step. Start with mpirun -np N.", "benchmark_training_step");
  Arguments arguments;
  app.add_option("--dtype", arguments.dtypes, "float32, bfloat16 or both")
      ->check(CLI::IsMember({"float32", "bfloat16"}))
      ->capture_default_str();
  app.add_option("--data", arguments.data, "copies of the model; the other ranks share one")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  arguments.model.add_options(app);
  benchmarks::add_device_option(app, arguments.device);
  app.add_option("--seconds", arguments.seconds, "steps of a dtype go on for this long, three at least")
      ->capture_default_str();
  return benchmarks::run_on_ranks(app, argc, argv, [&](parallel::Runtime& runtime) { return run(runtime, arguments); });
}
