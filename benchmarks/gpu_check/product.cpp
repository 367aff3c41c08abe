// (a) What the device can do at best: a large bfloat16 product, and a copy within its memory.
#include <ATen/ATen.h>

#include "benchmarks/gpu_check/check.h"

namespace megatron_cpp::gpu_check {

void check_product(const Target& target, Report& report) {
  const auto bytes = target.pick<int64_t>(int64_t{1} << 30, int64_t{1} << 26);
  const auto from = at::ones({bytes}, at::TensorOptions(at::kByte).device(target.device()));
  auto to = at::empty_like(from);
  const auto times = take_turns(target, {{"copy", [&] { to.copy_(from); }}}, /*seconds=*/8.0);
  auto row = product_row(times);
  row["what"] = target.pick("product 8192 x 8192 x 8192, bfloat16", "product 512 x 512 x 512, bfloat16");
  report.row(row);
  row = to_row("copy within the device's memory", times.operations[0], times);
  row["MiB"] = bytes >> 20;
  // Each byte is read and written.
  row["GB/s"] = 2.0 * static_cast<double>(bytes) / times.operations[0].median / 1e6;
  report.verdict(row, at::equal(from, to));
}

}  // namespace megatron_cpp::gpu_check
