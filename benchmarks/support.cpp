#include "benchmarks/support.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/detail/CUDAHooksInterface.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <utility>

#include "megatron_cpp/training/product_rate.h"

namespace megatron_cpp::benchmarks {

int run_on_ranks(CLI::App& app, int argc, char** argv, const std::function<int(parallel::Runtime&)>& body) {
  return parallel::Runtime::run([&](parallel::Runtime& runtime) {
    try {
      app.parse(argc, argv);
    } catch (const CLI::ParseError& error) {
      return runtime.rank() == 0 ? app.exit(error) : error.get_exit_code();
    }
    return body(runtime);
  });
}

void add_size_option(CLI::App& app, const std::string& option, int64_t& value, const std::string& what) {
  app.add_option(option, value, what)->check(CLI::PositiveNumber)->capture_default_str();
}

void add_device_option(CLI::App& app, std::string& device) {
  app.add_option("--device", device, "cpu, or cuda: a GPU each, or a share of one")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
}

c10::Device choose_device(parallel::Runtime& runtime, const std::string& device) {
  runtime.choose_device({.device = device, .share_devices = true});
  return runtime.device();
}

void wait_for(const c10::Device& device) {
  if (device.is_cuda()) at::detail::getCUDAHooks().deviceSynchronize(device.index());
}

double milliseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

double over_ranks(double value, parallel::Reduction reduction, const parallel::GroupPtr& group) {
  return parallel::all_reduce(at::full({1}, value, at::kDouble), group, reduction).item<double>();
}

void take_turns(size_t count, const Rounds& rounds, const parallel::GroupPtr& group,
                const std::function<void(size_t, bool)>& action) {
  for (int64_t round = 0; round < rounds.warm_up; ++round) {
    for (size_t i = 0; i < count; ++i) action(i, false);
  }
  const auto start = Clock::now();
  for (int64_t round = 0; round < rounds.max; ++round) {
    for (size_t step = 0; step < count; ++step) action(round % 2 == 0 ? step : count - 1 - step, true);
    const double spent = over_ranks(milliseconds_since(start), parallel::Reduction::kMax, group) / 1000.0;
    if (round + 1 >= rounds.min && spent > rounds.seconds) break;
  }
}

std::vector<std::vector<double>> measure(const std::vector<std::function<void()>>& operations, const Rounds& rounds,
                                         const parallel::GroupPtr& group, const c10::Device& device) {
  std::vector<std::vector<double>> times(operations.size());
  take_turns(operations.size(), rounds, group, [&](size_t i, bool timed) {
    wait_for(device);
    parallel::barrier(group);
    const auto start = Clock::now();
    operations[i]();
    wait_for(device);
    const double elapsed = milliseconds_since(start);
    if (timed) times[i].push_back(over_ranks(elapsed, parallel::Reduction::kMax, group));
  });
  return times;
}

double median(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  return times.at(times.size() / 2);
}

nlohmann::ordered_json min_and_median(const std::vector<double>& times) {
  return {{"min", *std::min_element(times.begin(), times.end())}, {"median", median(times)}};
}

std::string cpu_model() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

nlohmann::ordered_json machine(int ranks, const c10::Device& device) {
  return {{"cpu", cpu_model()},
          {"instruction_set", at::get_cpu_capability()},
          {"ranks", ranks},
          {"threads_per_rank", at::get_num_threads()},
          {"device", c10::DeviceTypeName(device.type(), /*lower_case=*/true)}};
}

double gemm_gigaflops(at::ScalarType dtype, const parallel::GroupPtr& group, const c10::Device& device) {
  return product_rate(dtype, {.rows = 512, .columns = 1024, .inner = 4096}, group, device) / 1e9;
}

std::string name_of(at::ScalarType dtype) { return dtype == at::kFloat ? "float32" : "bfloat16"; }

at::ScalarType dtype_of(const std::string& name) { return name == "float32" ? at::kFloat : at::kBFloat16; }

void print(const nlohmann::ordered_json& object, int rank) {
  if (rank != 0) return;
  std::printf("%s\n", object.dump().c_str());
  std::fflush(stdout);
}

}  // namespace megatron_cpp::benchmarks
