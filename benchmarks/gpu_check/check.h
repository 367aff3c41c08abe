// Shared by the parts of gpu_check: the device to measure, the timing of operations, and the report.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace megatron_cpp::gpu_check {

/// The first GPU if LibTorch finds one, else the CPU, on which parts use small sizes.
class Target {
 public:
  Target();

  bool is_gpu() const { return device_.is_cuda(); }
  c10::Device device() const { return device_; }
  /// `on_gpu` with a GPU, else `on_cpu`.
  template <class Value>
  Value pick(Value on_gpu, Value on_cpu) const {
    return is_gpu() ? on_gpu : on_cpu;
  }
  /// Waits until the device is idle.
  void synchronize() const;
  /// Peak memory of tensors on the GPU since the last call of reset_peak, in bytes; 0 on the CPU.
  int64_t peak_bytes() const;
  void reset_peak() const;
  /// Frees the cached blocks of the allocator, after a failed allocation.
  void free_cache() const;

 private:
  c10::Device device_;
};

/// Writes the results of a part, one row at a time, so that a killed part leaves its rows, and notes wrong results.
class Report {
 public:
  /// @throws c10::ValueError if the file can't be opened. An empty path: rows are printed.
  explicit Report(const std::filesystem::path& file);

  /// One measurement or comparison: "what" and its values.
  void row(const nlohmann::ordered_json& row);
  /// A row with a verdict: if `right` is false, the part has failed.
  void verdict(nlohmann::ordered_json row, bool right);
  /// A row that says that a part, or a piece of it, needs a GPU.
  void no_gpu(const std::string& what);
  bool any_wrong() const { return any_wrong_; }

 private:
  std::ofstream file_;
  bool any_wrong_ = false;
};

/// An operation to time. `before` runs before `run` and isn't timed.
struct Operation {
  std::string name;
  std::function<void()> run;
  std::function<void()> before = nullptr;
};

/// Time of one operation in milliseconds: median and minimum of `rounds`.
struct Time {
  double median = 0.0;
  double least = 0.0;
  int64_t rounds = 0;
};

/// Times of the operations, and of the plain matrix product before each of them.
struct Times {
  std::vector<Time> operations;
  Time product;
  double product_operations = 0.0;  ///< floating-point operations of one product

  /// TFLOP/s of the plain product.
  double product_teraflops() const { return product_operations / product.median / 1e9; }
};

/// Runs all operations in turn: 10 rounds of warm-up and 50 timed ones on a GPU, by CUDA events; 1 and 5 on the CPU, by
/// its clock. A plain product (8192-cubed in bfloat16, 512-cubed on the CPU) comes before each operation: the device is
/// busy while the host issues the operation, and both run at the same clock rate and temperature. Warm-up ends after a
/// sixth of `seconds`, timing after `seconds`, but not before one round of warm-up and three timed ones.
Times take_turns(const Target& target, const std::vector<Operation>& operations, double seconds);

/// A row for an operation: what, ms, least_ms, rounds, and its time in plain products.
nlohmann::ordered_json to_row(const std::string& name, const Time& time, const Times& times);

/// A row for the plain product between the operations.
nlohmann::ordered_json product_row(const Times& times);

/// max |actual - expected| / max |expected|, in double, on the host.
double relative_difference(const at::Tensor& actual, const at::Tensor& expected);

/// Normally distributed values on the target's device.
at::Tensor random_values(const Target& target, at::IntArrayRef shape, at::ScalarType dtype, double scale);

/// A part: fills the report.
using Part = std::function<void(const Target&, Report&)>;

void check_machine(const Target& target, Report& report);      ///< GPU, versions, processor
void check_product(const Target& target, Report& report);      ///< (a)
void check_collectives(const Target& target, Report& report);  ///< (b) ProcessGroupNCCL of one rank, called directly
void check_tower(const Target& target, Report& report);        ///< (c)
void check_layers(const Target& target, Report& report);       ///< (d)
void check_attention(const Target& target, Report& report);    ///< (e)
void check_insert(const Target& target, Report& report);       ///< (f)
void check_adamw(const Target& target, Report& report);        ///< (g)

/// (h) Trains with `config` and `overrides` under LibTorch's profiler and examines one step. Writes the trace of all
/// steps to `trace`, for a viewer.
struct TraceArguments {
  std::filesystem::path config;
  std::vector<std::string> overrides;
  std::filesystem::path trace;
};
void check_trace(const Target& target, Report& report, const TraceArguments& arguments);

/// GPU and versions of driver, CUDA and NCCL; empty if this build has no CUDA or the machine no GPU.
nlohmann::ordered_json cuda_facts();

}  // namespace megatron_cpp::gpu_check
