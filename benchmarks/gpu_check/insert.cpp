// (f) The fused image insert beside what nobody can do without: the text embedding and the projector's products.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "benchmarks/gpu_check/check.h"
#include "benchmarks/image_insert/ways.h"
#include "parallel/rehearsal_backend.h"

namespace megatron_cpp::gpu_check {
namespace {

using benchmark_image_insert::Way;

void compare(const Target& target, Report& report, const benchmark_image_insert::Sizes& sizes, int tensor_parallel) {
  const auto tp = parallel::make_rehearsal_group(0, tensor_parallel, {.device = target.device()});
  const auto batch = benchmark_image_insert::make_batch(sizes, at::kBFloat16, target.device());
  const auto ways = benchmark_image_insert::vocab_ways(sizes, batch, /*all_shardings=*/false, tp);
  const auto find = [&](const std::string& name) -> const Way& {
    for (const auto& way : ways) {
      if (way.name == name && !way.features_trained && way.projector_sharding != "replicated") return way;
    }
    TORCH_CHECK(false, "no way ", name);
  };
  const std::vector<Operation> operations = {{"text_only", find("text_only").step},
                                             {"projector_gemm", find("projector_gemm").step},
                                             {"fused_vocab", find("fused_vocab").step}};
  const auto times = take_turns(target, operations, /*seconds=*/3.0);
  const auto& text = times.operations[0];
  const auto& products = times.operations[1];
  const auto& fused = times.operations[2];
  auto row = to_row("fused insert, forward and backward", fused, times);
  row["sequence"] = sizes.sequence;
  row["tensor_parallel"] = tensor_parallel;
  row["text_ms"] = text.median;
  row["products_ms"] = products.median;
  row["ratio"] = fused.median / (text.median + products.median);
  report.row(std::move(row));
}

}  // namespace

void check_insert(const Target& target, Report& report) {
  for (const int64_t sequence : target.pick<std::vector<int64_t>>({2048, 8192}, {2048})) {
    for (const int tensor_parallel : {1, 8}) {
      benchmark_image_insert::Sizes sizes;
      sizes.sequence = sequence;
      sizes.scale = target.pick<int64_t>(1, 8);
      sizes.hidden /= sizes.scale;
      sizes.channels /= sizes.scale;
      compare(target, report, sizes, tensor_parallel);
    }
  }
}

}  // namespace megatron_cpp::gpu_check
