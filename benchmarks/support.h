// What the benchmarks have in common: clocks of all ranks together, and lines of JSON.
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

/// A benchmark's main: reads the command line into `app` and runs `body`, or, where an option is wrong or asks for
/// help, says so on rank 0 alone. Returns the exit status. Collective over the MPI world.
int run_on_ranks(CLI::App& app, int argc, char** argv, const std::function<int(parallel::Runtime&)>& body);

/// Adds --device, "cpu" or "cuda", to `app`.
void add_device_option(CLI::App& app, std::string& device);

/// Makes `runtime` compute on it, and returns this rank's. Several ranks may share a GPU. Collective over the MPI
/// world.
c10::Device choose_device(parallel::Runtime& runtime, const std::string& device);

/// Waits until the device has done what was asked of it; before a clock is read. The CPU always has.
void wait_for(const c10::Device& device);

using Clock = std::chrono::steady_clock;
double milliseconds_since(Clock::time_point start);

/// The value over the ranks of `group`: largest, smallest or sum. Collective over it.
double over_ranks(double value, parallel::Reduction reduction, const parallel::GroupPtr& group);

/// How often operations are timed.
struct Rounds {
  int64_t warm_up = 0;   ///< rounds before, not timed
  int64_t min = 3;       ///< timed ones
  int64_t max = 15;      ///< timed ones
  double seconds = 0.0;  ///< between min and max, no round is begun after so long
};

/// Calls action(i, timed) for every i in [0, count) once a round, to and fro, so that a drift of the machine hits all
/// alike. Collective over `group`.
void take_turns(size_t count, const Rounds& rounds, const parallel::GroupPtr& group,
                const std::function<void(size_t, bool)>& action);

/// Milliseconds of the slowest rank, [operations][rounds]. The ranks begin each together, and the operations take
/// turns; one ends when `device` has done all of it. Collective over `group`.
std::vector<std::vector<double>> measure(const std::vector<std::function<void()>>& operations, const Rounds& rounds,
                                         const parallel::GroupPtr& group,
                                         const c10::Device& device = c10::Device(c10::kCPU));

/// Of an odd number the middle one, else the larger of the two.
double median(std::vector<double> times);

/// {"min": .., "median": ..}
nlohmann::ordered_json min_and_median(const std::vector<double>& times);

/// What this machine's processor calls itself.
std::string cpu_model();

/// cpu, instruction_set, ranks, threads_per_rank and device.
nlohmann::ordered_json machine(int ranks, const c10::Device& device = c10::Device(c10::kCPU));

/// Billions of operations a second in a matrix product on `device`, of one rank while all compute. Collective over
/// `group`.
double gemm_gigaflops(at::ScalarType dtype, const parallel::GroupPtr& group,
                      const c10::Device& device = c10::Device(c10::kCPU));

/// "float32" or "bfloat16", and back.
std::string name_of(at::ScalarType dtype);
at::ScalarType dtype_of(const std::string& name);

/// One line on rank 0, at once.
void print(const nlohmann::ordered_json& object, int rank);

}  // namespace megatron_cpp::benchmarks
