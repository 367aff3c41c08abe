// What embedding text with images costs: our ways beside the published one, beside text alone and beside the matrix
// products that nobody can do without.
//
//   mpirun -np 2 --bind-to none build/bin/benchmark_image_insert [--full]
//   build/bin/benchmark_image_insert --rehearse
//
// On the CPU: on a GPU the products' share of a step can't be told by the host's clock.
//
// All ranks are one tensor-parallel group under sequence parallelism, one thread each unless OMP_NUM_THREADS says
// otherwise. Prints one JSON object a line: the machine first, then plans and volumes at scale, then one per way.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/record_function.h>

#include <CLI/CLI.hpp>
#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "benchmarks/image_insert/scale.h"
#include "benchmarks/image_insert/ways.h"
#include "benchmarks/support.h"
#include "parallel/collectives.h"
#include "parallel/host_memory.h"
#include "parallel/process_groups.h"
#include "parallel/recording_backend.h"
#include "parallel/runtime.h"
#include "step37/program/full_buffer_watch.h"

namespace megatron_cpp::benchmark_image_insert {
namespace {

using benchmarks::Clock;
using benchmarks::milliseconds_since;
using benchmarks::min_and_median;
using benchmarks::over_ranks;
using benchmarks::print;
using nlohmann::ordered_json;

/// The time that this thread's matrix products take, while it lives.
class GemmClock {
 public:
  GemmClock() {
    current = this;
    handle_ = at::addThreadLocalCallback(
        at::RecordFunctionCallback(
            [](const at::RecordFunction& function) -> std::unique_ptr<at::ObserverContext> {
              if (current != nullptr && is_product(function.name()) && current->depth_++ == 0)
                current->start_ = Clock::now();
              return nullptr;
            },
            [](const at::RecordFunction& function, at::ObserverContext* /*context*/) {
              if (current != nullptr && is_product(function.name()) && --current->depth_ == 0) {
                current->milliseconds_ += milliseconds_since(current->start_);
              }
            })
            .scopes({at::RecordScope::FUNCTION}));
  }
  ~GemmClock() {
    at::removeCallback(handle_);
    current = nullptr;
  }
  GemmClock(const GemmClock&) = delete;
  GemmClock& operator=(const GemmClock&) = delete;
  double milliseconds() const { return milliseconds_; }

 private:
  static bool is_product(std::string_view name) { return name == "megatron_cpp::matrix_product"; }
  static thread_local GemmClock* current;
  at::CallbackHandle handle_ = 0;
  int depth_ = 0;
  double milliseconds_ = 0.0;
  Clock::time_point start_;
};
thread_local GemmClock* GemmClock::current = nullptr;

struct Measured {
  std::vector<double> step_ms;
  std::vector<double> non_gemm_ms;
  parallel::CommunicationCount sent;
  int64_t peak_bytes = 0;
};

/// What doesn't change from step to step, and a first touch of all memory.
void warm_up(const Way& way, Measured& measured, const Sizes& sizes, at::ScalarType dtype,
             const parallel::RecordedGroup& tp) {
  const auto before = *tp.count;
  {
    const step37::FullBufferWatch watch(sizes.sequence, 1, sizes.hidden, dtype);
    way.step();
    measured.peak_bytes = watch.peak_bytes();
  }
  measured.sent = *tp.count - before;
}

/// A step leaves features' gradients to whoever made them: it doesn't add into those of the step before.
void forget_feature_gradients(const Way& way) {
  for (const auto& features : way.features) features.mutable_grad().reset();
}

void time_step(const Way& way, Measured& measured, const parallel::GroupPtr& plain) {
  forget_feature_gradients(way);
  parallel::barrier(plain);
  const GemmClock gemms;
  const auto start = Clock::now();
  way.step();
  const double step = milliseconds_since(start);
  // The step is as slow as its slowest rank. A rank that finished its products early waits for the others in the
  // collective: what isn't products is read off the rank that waited least.
  measured.step_ms.push_back(over_ranks(step, parallel::Reduction::kMax, plain));
  measured.non_gemm_ms.push_back(over_ranks(step - gemms.milliseconds(), parallel::Reduction::kMin, plain));
}

ordered_json to_json(const Way& way, const Measured& measured, const Sizes& sizes, at::ScalarType dtype,
                     const parallel::GroupPtr& plain) {
  auto collectives = ordered_json::object();
  for (int kind = 0; kind < parallel::kNumCollectiveKinds; ++kind) {
    const auto collective = static_cast<parallel::CollectiveKind>(kind);
    if (measured.sent.of(collective) > 0) {
      collectives[std::string(collective_name(collective))] = measured.sent.of(collective);
    }
  }
  const auto largest = [&](int64_t value) {
    return static_cast<int64_t>(over_ranks(static_cast<double>(value), parallel::Reduction::kMax, plain));
  };
  ordered_json line = {{"way", way.name},
                       {"dtype", benchmarks::name_of(dtype)},
                       {"tp", plain->getSize()},
                       {"sequence", sizes.sequence},
                       {"projector_sharding", way.projector_sharding},
                       {"features", way.features_trained ? "trained" : "frozen"},
                       {"step_ms", min_and_median(measured.step_ms)},
                       {"non_gemm_ms", min_and_median(measured.non_gemm_ms)},
                       {"bytes_per_rank", largest(measured.sent.bytes_sent)},
                       {"collectives", std::move(collectives)},
                       {"peak_full_buffer_bytes", largest(measured.peak_bytes)},
                       {"rounds", measured.step_ms.size()}};
  if (sizes.scale > 1) line["scale"] = sizes.scale;
  return line;
}

/// The ways take turns.
void measure(const std::vector<Way>& ways, const Sizes& sizes, at::ScalarType dtype, double seconds,
             const parallel::RecordedGroup& tp, const parallel::GroupPtr& plain) {
  std::vector<Measured> measured(ways.size());
  for (size_t i = 0; i < ways.size(); ++i) warm_up(ways[i], measured[i], sizes, dtype, tp);
  benchmarks::take_turns(ways.size(), {.warm_up = 0, .min = 3, .max = 15, .seconds = seconds}, plain,
                         [&](size_t i, bool) { time_step(ways[i], measured[i], plain); });
  for (size_t i = 0; i < ways.size(); ++i) {
    print(to_json(ways[i], measured[i], sizes, dtype, plain), plain->getRank());
  }
}

struct Arguments {
  bool full = false;
  bool rehearse = false;
  std::vector<std::string> dtypes = {"float32", "bfloat16"};
  std::vector<int64_t> sequences;
  int64_t scale = 1;
  double seconds = 0.0;
};

int run(parallel::Runtime& runtime, const Arguments& arguments) {
  const bool full = arguments.full;
  if (std::getenv("OMP_NUM_THREADS") == nullptr) at::set_num_threads(1);
  const auto groups = parallel::make_process_groups(runtime, {.tp = runtime.size()});
  const auto tp = parallel::record(groups.tp);
  auto machine = benchmarks::machine(runtime.size());
  machine["gemm_gigaflops_per_rank"] = {{"float32", benchmarks::gemm_gigaflops(at::kFloat, groups.tp)},
                                        {"bfloat16", benchmarks::gemm_gigaflops(at::kBFloat16, groups.tp)}};
  print(machine, runtime.rank());
  if (runtime.rank() == 0) {
    for (const auto& plan : rehearse_plans()) print(plan, 0);
    if (full || arguments.rehearse) {
      for (const auto& volume : rehearse_volumes()) print(volume, 0);
    }
  }
  if (arguments.rehearse) return 0;
  parallel::barrier(groups.tp);
  for (const int64_t sequence : arguments.sequences) {
    for (const auto& name : arguments.dtypes) {
      const auto dtype = benchmarks::dtype_of(name);
      Sizes sizes;
      sizes.sequence = sequence;
      sizes.hidden /= arguments.scale;
      sizes.channels /= arguments.scale;
      sizes.scale = arguments.scale;
      const auto batch = make_batch(sizes, dtype);
      const double seconds = arguments.seconds > 0.0 ? arguments.seconds : (full ? 300.0 : 120.0);
      // One embedding table with its gradient at a time.
      measure(vocab_ways(sizes, batch, full, tp.group), sizes, dtype, seconds, tp, groups.tp);
      measure(hidden_ways(sizes, batch, full, tp.group), sizes, dtype, seconds / 4, tp, groups.tp);
    }
  }
  return 0;
}

}  // namespace
}  // namespace megatron_cpp::benchmark_image_insert

int main(int argc, char** argv) {
  megatron_cpp::parallel::keep_freed_host_memory();  // as the step37 program does
  CLI::App app("Times the image insert beside the published way, text alone and the matrix products alone.");
  megatron_cpp::benchmark_image_insert::Arguments arguments;
  app.add_flag("--full", arguments.full,
               "all shardings, sequences of 2048 and 8192, and volumes on up to 64 x 4096 ranks");
  app.add_flag("--rehearse", arguments.rehearse, "plans and volumes only; one process will do");
  app.add_option("--dtype", arguments.dtypes, "float32, bfloat16 or both")
      ->check(CLI::IsMember({"float32", "bfloat16"}))
      ->capture_default_str();
  app.add_option("--sequence", arguments.sequences,
                 "sequence lengths, multiples of 2048; without it 2048, or as --full says")
      ->check(CLI::PositiveNumber)
      ->check([](const std::string& length) {
        return std::stoll(length) % 2048 == 0 ? "" : length + " is no multiple of 2048, for which there are images";
      });
  app.add_option("--scale", arguments.scale, "H = 4096 and C = 6144 over this, for less memory and smaller products")
      ->check(CLI::IsMember({1, 2, 4, 8}))
      ->capture_default_str();
  app.add_option("--seconds", arguments.seconds, "rounds of a setting go on for this long, three at least");
  return megatron_cpp::benchmarks::run_on_ranks(app, argc, argv, [&](megatron_cpp::parallel::Runtime& runtime) {
    if (arguments.sequences.empty()) {
      arguments.sequences = arguments.full ? std::vector<int64_t>{2048, 8192} : std::vector<int64_t>{2048};
    }
    return megatron_cpp::benchmark_image_insert::run(runtime, arguments);
  });
}
