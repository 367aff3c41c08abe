// What stall_test starts: ranks of which one is stuck while the others wait for it.
//
//   stall_program KIND RANK TIMEOUT_MS [words that mark the process]
//
// KIND says what rank RANK does instead of the all-reduce that the others come to: phase (works on the host for ever),
// stop (is stopped), gather (an all-gather), or size (a larger all-reduce). watched: none comes to a collective after
// that all-reduce, and the program ends when it has seen the report. end: the rank is stopped when all work is done and
// the others end MPI. TEST_BACKEND: the groups' backend, as in tests/support/test_world.h.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <mpi.h>
#include <signal.h>  // raise
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <string>
#include <thread>
#include <vector>

#include "parallel/activity.h"
#include "parallel/collectives.h"
#include "parallel/process_groups.h"
#include "parallel/runtime.h"
#include "tests/support/test_world.h"

namespace megatron_cpp {
namespace {

/// The next text that this process writes to stderr.
std::string next_on_stderr() {
  std::array<int, 2> ends{};
  TORCH_CHECK(pipe(ends.data()) == 0 && dup2(ends[1], STDERR_FILENO) >= 0);
  std::array<char, 4096> text{};
  const auto length = read(ends[0], text.data(), text.size());
  return {text.data(), static_cast<size_t>(length)};
}

[[noreturn]] void work_for_ever() {
  for (;;) std::this_thread::sleep_for(std::chrono::seconds(1));
}

int body(parallel::Runtime& runtime, const std::vector<std::string>& arguments) {
  const auto& kind = arguments.at(1);
  const bool is_stuck = runtime.rank() == std::stoi(arguments.at(2));
  const std::chrono::milliseconds timeout(std::stoll(arguments.at(3)));
  const auto groups = parallel::make_process_groups(runtime, {.tp = runtime.size()}, {.timeout = timeout});
  const auto group = test_support::over_test_backend(groups.tp);
  // Large enough for shared memory, which this first one makes: MPI itself would abort at messages of different sizes.
  constexpr int64_t kElements = 50'000;
  parallel::all_reduce(at::ones({kElements}), group);
  parallel::set_step(118);
  const parallel::Phase phase("training");
  if (is_stuck && kind == "phase") parallel::in_phase("counting sheep", work_for_ever);
  if (is_stuck && kind == "stop") raise(SIGSTOP);
  if (is_stuck && kind == "gather") {
    parallel::all_gather(at::ones({12}), group);
  } else {
    parallel::all_reduce(at::ones({is_stuck && kind == "size" ? 4 * kElements : kElements}), group);
  }
  if (kind == "watched") {
    if (runtime.rank() != 0) parallel::in_phase("counting sheep", work_for_ever);
    std::printf("%s", next_on_stderr().c_str());
    std::fflush(stdout);
    MPI_Abort(MPI_COMM_WORLD, 1);
  }
  parallel::barrier(group);
  if (is_stuck && kind == "end") raise(SIGSTOP);
  return 0;
}

}  // namespace
}  // namespace megatron_cpp

int main(int argc, char** argv) {
  using namespace megatron_cpp;
  const std::vector<std::string> arguments(argv, argv + argc);
  return parallel::Runtime::run([&](parallel::Runtime& runtime) { return body(runtime, arguments); });
}
