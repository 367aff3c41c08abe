// How long the collectives of the MPI backend take, beside a memcpy of the same bytes on all ranks at once.
//
//   mpirun -np 2 build/bin/benchmark_collectives [--messages] [--repetitions 30] [--bytes 33554432 ...]
//
// Prints a JSON object a line: first the machine, then one per operation, dtype and size. gloo_collectives.py prints
// the same for Gloo.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "benchmarks/support.h"
#include "parallel/mpi/mpi_backend.h"
#include "parallel/runtime.h"

namespace megatron_cpp {
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
      {"reduce_scatter", [=, &backend]() mutable { backend._reduce_scatter_base(part, full, {}); }},
      {"all_reduce",
       [=, &backend] {
         std::vector<at::Tensor> tensors{other};
         backend.allreduce(tensors, {});
       }},
      {"all_gather", [=, &backend]() mutable { backend._allgather_base(other, part, {}); }},
      {"all_to_all", [=, &backend]() mutable { backend.alltoall_base(other, full, equal_splits, equal_splits, {}); }},
      {"broadcast",
       [=, &backend] {
         std::vector<at::Tensor> tensors{other};
         backend.broadcast(tensors, {});
       }},
  };
}

void print(const std::vector<Operation>& operations, const std::vector<std::vector<double>>& times,
           at::ScalarType dtype, int64_t bytes, int rank) {
  const double memcpy_ms = benchmarks::median(times.front());
  for (size_t i = 0; i < operations.size(); ++i) {
    benchmarks::print({{"operation", operations[i].name},
                       {"dtype", benchmarks::name_of(dtype)},
                       {"bytes", bytes},
                       {"milliseconds", benchmarks::min_and_median(times[i])},
                       {"ratio_to_memcpy", benchmarks::median(times[i]) / memcpy_ms}},
                      rank);
  }
}

int benchmark(parallel::Runtime& runtime, const Arguments& arguments) {
  at::set_num_threads(1);
  parallel::MpiBackendOptions options{.timeout = std::chrono::minutes(1)};
  if (arguments.messages) options.shared_memory_limit = 0;
  const auto backend = c10::make_intrusive<MpiBackend>(runtime.world().split(0), "benchmark", options);
  const auto group = c10::make_intrusive<c10d::ProcessGroup>(runtime.rank(), runtime.size());
  group->setGroupName("benchmark");
  group->setBackend(at::kCPU, c10d::ProcessGroup::CUSTOM, backend);
  benchmarks::print({{"cpu", benchmarks::cpu_model()}, {"ranks", runtime.size()}, {"threads", at::get_num_threads()}},
                    runtime.rank());
  const benchmarks::Rounds rounds{.warm_up = 3, .min = arguments.repetitions, .max = arguments.repetitions};
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    for (const int64_t bytes : arguments.bytes) {
      const auto all = operations(*backend, dtype, bytes);
      std::vector<std::function<void()>> runs;
      for (const auto& operation : all) runs.push_back(operation.run);
      print(all, benchmarks::measure(runs, rounds, group), dtype, bytes, runtime.rank());
    }
  }
  return 0;
}

}  // namespace
}  // namespace megatron_cpp

int main(int argc, char** argv) {
  using namespace megatron_cpp;
  CLI::App app("Times the collectives of the MPI backend. Start with mpirun -np N.", "benchmark_collectives");
  Arguments arguments;
  app.add_option("--bytes", arguments.bytes, "Sizes, in bytes per rank")->check(CLI::PositiveNumber);
  benchmarks::add_size_option(app, "--repetitions", arguments.repetitions, "Timed runs of each operation");
  app.add_flag("--messages", arguments.messages, "Without shared memory: reductions by MPI's messages");
  return benchmarks::run_on_ranks(app, argc, argv,
                                  [&](parallel::Runtime& runtime) { return benchmark(runtime, arguments); });
}
