// What the benchmarks have in common: clocks of all ranks together, and lines of JSON.
#pragma once

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

namespace benchmarks {

/// A benchmark's main: reads the command line into `app` and runs `body`, or, where an option is wrong or asks for
/// help, says so on rank 0 alone. Returns the exit status. Collective over the MPI world.
int run_on_ranks(CLI::App& app, int argc, char** argv, const std::function<int(parallel::Runtime&)>& body);

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
/// turns. Collective over `group`.
std::vector<std::vector<double>> measure(const std::vector<std::function<void()>>& operations, const Rounds& rounds,
                                         const parallel::GroupPtr& group);

/// Of an odd number the middle one, else the larger of the two.
double median(std::vector<double> times);

/// {"min": .., "median": ..}
nlohmann::ordered_json min_and_median(const std::vector<double>& times);

/// What this machine's processor calls itself.
std::string cpu_model();

/// cpu, instruction_set, ranks and threads_per_rank.
nlohmann::ordered_json machine(int ranks);

/// Billions of operations a second in a matrix product, of one rank while all compute. Collective over `group`.
double gemm_gigaflops(at::ScalarType dtype, const parallel::GroupPtr& group);

/// "float32" or "bfloat16", and back.
std::string name_of(at::ScalarType dtype);
at::ScalarType dtype_of(const std::string& name);

/// One line on rank 0, at once.
void print(const nlohmann::ordered_json& object, int rank);

}  // namespace benchmarks
