// What the parts of gpu_check share: the device they measure, how operations are timed, and where results go.
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

/// The first GPU if this LibTorch sees one, else the CPU, on which parts take small sizes.
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
  /// Waits until everything that was issued on the device is done.
  void synchronize() const;
  /// Largest bytes of tensors that were alive on the GPU since the last call of reset_peak; 0 on the CPU.
  int64_t peak_bytes() const;
  void reset_peak() const;
  /// Gives cached blocks back, after an allocation that failed.
  void free_cache() const;

 private:
  c10::Device device_;
};

/// Collects a part's rows, each at once in a file (a part that is killed leaves those it had), and what was wrong.
class Report {
 public:
  /// @throws c10::ValueError if the file can't be opened. An empty path: rows are printed.
  explicit Report(const std::filesystem::path& file);

  /// One thing that was measured or compared: "what" and its values.
  void row(const nlohmann::ordered_json& row);
  /// A row with a verdict: where `right` is false, the part is wrong.
  void verdict(nlohmann::ordered_json row, bool right);
  /// A row that says that a part, or a piece of it, needs a GPU.
  void no_gpu(const std::string& what);
  bool any_wrong() const { return any_wrong_; }

 private:
  std::ofstream file_;
  bool any_wrong_ = false;
};

/// What is timed. `before` runs in front of `run` and isn't timed.
struct Operation {
  std::string name;
  std::function<void()> run;
  std::function<void()> before = nullptr;
};

/// Milliseconds of one operation, median and least of `rounds`.
struct Time {
  double median = 0.0;
  double least = 0.0;
  int64_t rounds = 0;
};

/// Times of operations that took turns, and of the plain product between them.
struct Times {
  std::vector<Time> operations;
  Time product;
  double product_operations = 0.0;  ///< floating-point operations of one product

  /// Trillions of operations a second in the plain product.
  double product_teraflops() const { return product_operations / product.median / 1e9; }
};

/// Runs all operations in turns: 10 rounds of warm-up and 50 timed ones on a GPU, by CUDA events; 1 and 5 on the CPU,
/// by its clock. In front of each operation comes a plain product, 8192-cubed in bfloat16 (512-cubed on the CPU), so
/// that the device is busy while the host issues the operation, and its clock and temperature are those of the
/// operation. No round of warm-up or timing begins `seconds` after the first, beyond one and three.
Times take_turns(const Target& target, const std::vector<Operation>& operations, double seconds);

/// A row for `operation`: what, ms, least_ms, rounds, and its length in plain products.
nlohmann::ordered_json to_row(const std::string& name, const Time& time, const Times& times);

/// A row for the plain product between the operations.
nlohmann::ordered_json product_row(const Times& times);

/// |actual - expected| at its largest, over the largest |expected|. In double, on the host.
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

/// (h) Trains by `config` with `overrides` under LibTorch's profiler and looks at one step. The trace of all steps is
/// left in `trace` for a viewer.
struct TraceArguments {
  std::filesystem::path config;
  std::vector<std::string> overrides;
  std::filesystem::path trace;
};
void check_trace(const Target& target, Report& report, const TraceArguments& arguments);

/// Names of GPU, driver, CUDA and NCCL; empty where this build has no CUDA or the machine no GPU.
nlohmann::ordered_json cuda_facts();

}  // namespace megatron_cpp::gpu_check
