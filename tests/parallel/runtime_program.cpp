// What runtime_test starts: a program on parallel::Runtime::run that ends in the way its argument names.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <signal.h>  // kill
#include <unistd.h>

#include <cstdio>
#include <string>

#include "parallel/collectives.h"
#include "parallel/errors.h"
#include "parallel/process_groups.h"
#include "parallel/runtime.h"

namespace megatron_cpp {
namespace {

int body(parallel::Runtime& runtime, const std::string& mode) {
  const auto groups = parallel::make_process_groups(runtime, {.tp = runtime.size()});
  const auto sum = [&] { return parallel::all_reduce(at::ones({3}), groups.tp).sum().item<double>(); };
  sum();  // all ranks are there
  const bool is_last = runtime.rank() == runtime.size() - 1;
  if (mode == "all_throw") {
    TORCH_CHECK_VALUE(false, "the same on every rank");
  } else if (mode == "all_throw_a_status") {
    throw parallel::AgreedError("the same status on every rank", 71);
  } else if (mode == "one_throws_a_status") {
    if (is_last) throw parallel::ExitError("a status here only", 74);
  } else if (mode == "one_throws") {
    TORCH_CHECK_VALUE(!is_last, "only here");
  } else if (mode == "each_throws_its_own") {
    TORCH_CHECK_VALUE(false, "this is number ", runtime.rank());
  } else if (mode == "one_is_killed") {
    if (is_last) kill(getpid(), SIGKILL);
  } else if (mode == "status") {
    return 3;
  } else if (mode != "fine") {
    TORCH_CHECK_VALUE(false, "unknown mode ", mode);
  }
  std::printf("rank %d: the sum is %g\n", runtime.rank(), sum());
  return 0;
}

}  // namespace
}  // namespace megatron_cpp

/// Further arguments are ignored: a test finds its processes by them.
int main(int argc, char** argv) {
  using namespace megatron_cpp;
  const std::string mode = argc > 1 ? argv[1] : "";
  return parallel::Runtime::run([&](parallel::Runtime& runtime) { return body(runtime, mode); });
}
