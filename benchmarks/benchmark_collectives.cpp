// How long the collectives of the MPI backend take, beside a memcpy of the same bytes on all ranks at once.
//
//   mpirun -np 2 build/bin/benchmark_collectives [--messages] [--repetitions 30] [--bytes 33554432 ...]
//
// Prints a JSON object a line: first the machine, then one per operation, dtype and size. gloo_collectives.py prints
// the same for Gloo.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "parallel/mpi_backend.h"
#include "parallel/runtime.h"

namespace {

using parallel::MpiBackend;

struct Arguments {
  std::vector<int64_t> bytes = {1 << 12, 1 << 18, 1 << 22, 1 << 25};
  int64_t repetitions = 30;
  bool messages = false;
};

struct Operation {
  std::string name;
  std::function<void()> run;
};

std::string cpu_model() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

/// All operations on `bytes` of each rank: what it passes in, or, of an all-gather, what it gets.
std::vector<Operation> operations(MpiBackend& backend, at::ScalarType dtype, int64_t bytes) {
  const int64_t t = backend.getSize();
  const int64_t share = bytes / static_cast<int64_t>(at::elementSize(dtype)) / t;
  // Written to, so that no first touch of a page is timed.
  auto full = at::ones({t * share}, dtype);
  auto other = at::ones({t * share}, dtype);
  auto part = at::ones({share}, dtype);
  std::vector<int64_t> equal_splits;
  return {
      {"memcpy", [=] { std::memcpy(other.mutable_data_ptr(), full.const_data_ptr(), full.nbytes()); }},
      {"reduce_scatter", [=, &backend]() mutable { backend.reduce_scatter_single(part, full, {}); }},
      {"all_reduce",
       [=, &backend] {
         std::vector<at::Tensor> tensors{other};
         backend.allreduce(tensors, {});
       }},
      {"all_gather", [=, &backend]() mutable { backend.all_gather_single(other, part, {}); }},
      {"all_to_all",
       [=, &backend]() mutable { backend.all_to_all_single(other, full, equal_splits, equal_splits, {}); }},
      {"broadcast",
       [=, &backend] {
         std::vector<at::Tensor> tensors{other};
         backend.broadcast(tensors, {});
       }},
  };
}

/// Milliseconds of the slowest rank, [operations, repetitions]. The operations take turns, so that what else the
/// machine does meets all of them.
at::Tensor measure(MpiBackend& backend, const std::vector<Operation>& operations, int64_t repetitions) {
  constexpr int64_t kWarmUp = 3;
  auto times = at::zeros({static_cast<int64_t>(operations.size()), repetitions}, at::kDouble);
  for (int64_t repetition = -kWarmUp; repetition < repetitions; ++repetition) {
    for (size_t i = 0; i < operations.size(); ++i) {
      backend.barrier({});
      const auto start = std::chrono::steady_clock::now();
      operations[i].run();
      const std::chrono::duration<double, std::milli> elapsed = std::chrono::steady_clock::now() - start;
      if (repetition >= 0) times[static_cast<int64_t>(i)][repetition] = elapsed.count();
    }
  }
  std::vector<at::Tensor> tensors{times};
  c10d::AllreduceOptions options;
  options.reduceOp = c10d::ReduceOp::MAX;
  backend.allreduce(tensors, options);
  return times;
}

void print(const std::vector<Operation>& operations, const at::Tensor& times, at::ScalarType dtype, int64_t bytes) {
  const auto median = std::get<0>(times.median(1));
  const auto smallest = times.amin(1);
  for (size_t i = 0; i < operations.size(); ++i) {
    const auto row = static_cast<int64_t>(i);
    const nlohmann::ordered_json line = {
        {"operation", operations[i].name},
        {"dtype", dtype == at::kFloat ? "float32" : "bfloat16"},
        {"bytes", bytes},
        {"milliseconds", {{"min", smallest[row].item<double>()}, {"median", median[row].item<double>()}}},
        {"ratio_to_memcpy", (median[row] / median[0]).item<double>()}};
    std::printf("%s\n", line.dump().c_str());
  }
  std::fflush(stdout);
}

int benchmark(parallel::Runtime& runtime, const Arguments& arguments) {
  at::set_num_threads(1);
  parallel::MpiBackendOptions options{.timeout = std::chrono::minutes(1)};
  if (arguments.messages) options.shared_memory_limit = 0;
  const auto backend = c10::make_intrusive<MpiBackend>(runtime.world().split(0), "benchmark", options);
  if (runtime.rank() == 0) {
    const nlohmann::ordered_json machine = {
        {"cpu", cpu_model()}, {"ranks", runtime.size()}, {"threads", at::get_num_threads()}};
    std::printf("%s\n", machine.dump().c_str());
  }
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    for (const int64_t bytes : arguments.bytes) {
      const auto all = operations(*backend, dtype, bytes);
      const auto times = measure(*backend, all, arguments.repetitions);
      if (runtime.rank() == 0) print(all, times, dtype, bytes);
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return parallel::Runtime::run([&](parallel::Runtime& runtime) {
    CLI::App app("Times the collectives of the MPI backend. Start with mpirun -np N.", "benchmark_collectives");
    Arguments arguments;
    app.add_option("--bytes", arguments.bytes, "Sizes, in bytes per rank")->check(CLI::PositiveNumber);
    app.add_option("--repetitions", arguments.repetitions, "Timed runs of each operation")
        ->capture_default_str()
        ->check(CLI::PositiveNumber);
    app.add_flag("--messages", arguments.messages, "Without shared memory: reductions by MPI's messages");
    try {
      app.parse(argc, argv);
    } catch (const CLI::ParseError& error) {
      if (runtime.rank() == 0) return app.exit(error);
      return error.get_exit_code();
    }
    return benchmark(runtime, arguments);
  });
}
