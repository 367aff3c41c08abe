#include "benchmarks/gpu_check/check.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <thread>
#include <utility>

#include "benchmarks/support.h"

namespace megatron_cpp::gpu_check {
namespace {

using benchmarks::Clock;
using benchmarks::milliseconds_since;

/// From one point of the device's stream to a later one.
class Stopwatch {
 public:
  explicit Stopwatch(c10::Device device) : device_(device), begin_(Clock::now()) {
    if (!device_.is_cuda()) return;
    begin_event_ = mark();
  }
  void stop() {
    if (device_.is_cuda()) {
      end_event_ = mark();
    } else {
      milliseconds_ = milliseconds_since(begin_);
    }
  }
  /// After the device has come to the end.
  double milliseconds() const { return device_.is_cuda() ? begin_event_->elapsedTime(*end_event_) : milliseconds_; }

 private:
  std::unique_ptr<c10::Event> mark() const {
    // The only flag with which CUDA's events carry times.
    auto event = std::make_unique<c10::Event>(device_.type(), c10::EventFlag::BACKEND_DEFAULT);
    event->record(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
    return event;
  }

  c10::Device device_;
  Clock::time_point begin_;
  std::unique_ptr<c10::Event> begin_event_;
  std::unique_ptr<c10::Event> end_event_;
  double milliseconds_ = 0.0;
};

/// The product that everything is compared with.
class PlainProduct {
 public:
  explicit PlainProduct(const Target& target)
      : size_(target.pick<int64_t>(8192, 512)),
        a_(random_values(target, {size_, size_}, at::kBFloat16, 1.0)),
        b_(random_values(target, {size_, size_}, at::kBFloat16, 1.0)),
        c_(at::empty_like(a_)) {}

  void run() { at::mm_out(c_, a_, b_); }
  double operations() const { return 2.0 * static_cast<double>(size_ * size_ * size_); }

 private:
  int64_t size_;
  at::Tensor a_;
  at::Tensor b_;
  at::Tensor c_;
};

Time summary(const std::vector<double>& times) {
  return {benchmarks::median(times), *std::min_element(times.begin(), times.end()), static_cast<int64_t>(times.size())};
}

}  // namespace

Target::Target() : device_(c10::kCPU) {
  if (at::globalContext().hasCUDA()) device_ = c10::Device(c10::kCUDA, 0);
}

void Target::synchronize() const {
  if (is_gpu()) c10::impl::VirtualGuardImpl(device_.type()).synchronizeDevice(device_.index());
}

int64_t Target::peak_bytes() const {
  if (!is_gpu()) return 0;
  const auto stats = at::getDeviceAllocator(device_.type())->getDeviceStats(device_.index());
  return stats.allocated_bytes[0].peak;  // entry 0 counts all pools together
}

void Target::reset_peak() const {
  if (is_gpu()) at::getDeviceAllocator(device_.type())->resetPeakStats(device_.index());
}

void Target::free_cache() const {
  if (is_gpu()) at::getDeviceAllocator(device_.type())->emptyCache();
}

Report::Report(const std::filesystem::path& file) {
  if (file.empty()) return;
  file_.open(file, std::ios::app);
  TORCH_CHECK_VALUE(file_.is_open(), "cannot write ", file.string());
}

void Report::row(const nlohmann::ordered_json& row) {
  const auto line = row.dump();
  if (file_.is_open()) file_ << line << std::endl;  // at once
  std::printf("%s\n", line.c_str());
  std::fflush(stdout);
}

void Report::verdict(nlohmann::ordered_json row, bool right) {
  row["right"] = right;
  if (!right) any_wrong_ = true;
  this->row(row);
}

void Report::no_gpu(const std::string& what) { row({{"what", what}, {"no_gpu", true}}); }

Times take_turns(const Target& target, const std::vector<Operation>& operations, double seconds) {
  const int64_t warm_up = target.pick<int64_t>(10, 1);
  const int64_t rounds = target.pick<int64_t>(50, 5);
  PlainProduct product(target);
  std::vector<std::vector<double>> milliseconds(operations.size());
  std::vector<double> product_milliseconds;
  const auto round = [&](bool timed) {
    std::vector<std::pair<Stopwatch, Stopwatch>> watches;  // product, operation
    for (const auto& operation : operations) {
      if (operation.before) operation.before();
      Stopwatch of_product(target.device());
      product.run();
      of_product.stop();
      Stopwatch of_operation(target.device());
      operation.run();
      of_operation.stop();
      watches.emplace_back(std::move(of_product), std::move(of_operation));
    }
    target.synchronize();
    if (!timed) return;
    for (size_t i = 0; i < watches.size(); ++i) {
      product_milliseconds.push_back(watches[i].first.milliseconds());
      milliseconds[i].push_back(watches[i].second.milliseconds());
    }
  };
  const auto start = Clock::now();
  const auto is_late = [&](double share) { return milliseconds_since(start) > 1000.0 * seconds * share; };
  for (int64_t i = 0; i < warm_up && (i < 1 || !is_late(1.0 / 6)); ++i) round(/*timed=*/false);
  for (int64_t i = 0; i < rounds && (i < 3 || !is_late(1.0)); ++i) round(/*timed=*/true);
  Times times;
  for (const auto& of_operation : milliseconds) times.operations.push_back(summary(of_operation));
  times.product = summary(product_milliseconds);
  times.product_operations = product.operations();
  return times;
}

nlohmann::ordered_json to_row(const std::string& name, const Time& time, const Times& times) {
  return {{"what", name},
          {"ms", time.median},
          {"least_ms", time.least},
          {"rounds", time.rounds},
          {"plain_products", time.median / times.product.median}};
}

nlohmann::ordered_json product_row(const Times& times) {
  return {{"what", "plain product in turns"}, {"ms", times.product.median}, {"TFLOP/s", times.product_teraflops()}};
}

double relative_difference(const at::Tensor& actual, const at::Tensor& expected) {
  const auto want = expected.detach().to(at::kDouble).cpu();
  const auto got = actual.detach().to(at::kDouble).cpu();
  return (got - want).abs().max().item<double>() / std::max(1e-30, want.abs().max().item<double>());
}

at::Tensor random_values(const Target& target, at::IntArrayRef shape, at::ScalarType dtype, double scale) {
  return at::randn(shape, at::TensorOptions(dtype).device(target.device())).mul_(scale);
}

void check_machine(const Target& target, Report& report) {
  nlohmann::ordered_json row = {{"what", "machine"},
                                {"device", target.is_gpu() ? "cuda" : "cpu"},
                                {"cpu", benchmarks::cpu_model()},
                                {"cores", std::thread::hardware_concurrency()},
                                {"threads", at::get_num_threads()}};
  row.update(cuda_facts());
  report.row(row);
}

}  // namespace megatron_cpp::gpu_check
