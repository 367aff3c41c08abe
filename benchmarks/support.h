// Shared by the benchmarks: timing over all ranks, and JSON output.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "parallel/collectives.h"
#include "parallel/group.h"
#include "parallel/runtime.h"

namespace CLI {
class App;
}

namespace megatron_cpp::benchmarks {

/// The main function of a benchmark: parses the command line into `app` and runs `body`. Errors in options and --help
/// are printed on rank 0 only. Returns the exit status. Collective over the MPI world.
int run_on_ranks(CLI::App& app, int argc, char** argv, const std::function<int(parallel::Runtime&)>& body);

/// Adds an option for a number above 0 to `app`; `what` is its help.
void add_size_option(CLI::App& app, const std::string& option, int64_t& value, const std::string& what);

/// Adds --device, "cpu" or "cuda", to `app`.
void add_device_option(CLI::App& app, std::string& device);

/// Makes `runtime` compute on `device`, and returns the device of this rank. Several ranks may share a GPU. Collective
/// over the MPI world.
c10::Device choose_device(parallel::Runtime& runtime, const std::string& device);

/// Synchronizes the device, before a clock is read; does nothing on the CPU.
void wait_for(const c10::Device& device);

using Clock = std::chrono::steady_clock;
double milliseconds_since(Clock::time_point start);

/// Largest, smallest or sum of `value` over the ranks of `group`. Collective over `group`.
double over_ranks(double value, parallel::Reduction reduction, const parallel::GroupPtr& group);

/// How often operations are timed.
struct Rounds {
  int64_t warm_up = 0;   ///< untimed rounds at the beginning
  int64_t min = 3;       ///< timed rounds at least
  int64_t max = 15;      ///< timed rounds at most
  double seconds = 0.0;  ///< after `min` rounds, no round begins after this time
};

/// Calls action(i, timed) for every i in [0, count) once per round, alternately forwards and backwards, so that a drift
/// of the machine's speed affects all alike. Collective over `group`.
void take_turns(size_t count, const Rounds& rounds, const parallel::GroupPtr& group,
                const std::function<void(size_t, bool)>& action);

/// Times of the slowest rank in milliseconds, [operations][rounds], by take_turns. The ranks begin each operation
/// together; it ends when `device` has finished. Collective over `group`.
std::vector<std::vector<double>> measure(const std::vector<std::function<void()>>& operations, const Rounds& rounds,
                                         const parallel::GroupPtr& group,
                                         const c10::Device& device = c10::Device(c10::kCPU));

/// The median; of an even number of times, the larger of the two in the middle.
double median(std::vector<double> times);

/// {"min": .., "median": ..}
nlohmann::ordered_json min_and_median(const std::vector<double>& times);

/// The model name of the processor.
std::string cpu_model();

/// cpu, instruction_set, ranks, threads_per_rank and device.
nlohmann::ordered_json machine(int ranks, const c10::Device& device = c10::Device(c10::kCPU));

/// GFLOP/s of one rank in a matrix product on `device` while all ranks compute. Collective over `group`.
double gemm_gigaflops(at::ScalarType dtype, const parallel::GroupPtr& group,
                      const c10::Device& device = c10::Device(c10::kCPU));

/// "float32" or "bfloat16", and back.
std::string name_of(at::ScalarType dtype);
at::ScalarType dtype_of(const std::string& name);

/// Prints one line on rank 0, and flushes.
void print(const nlohmann::ordered_json& object, int rank);

}  // namespace megatron_cpp::benchmarks
