// (g) AdamW over a billion parameters in float32, gradients in one buffer as in training, against the memory's speed.
#include "megatron_cpp/optimizer/adamw.h"

#include <ATen/ATen.h>

#include <string>
#include <vector>

#include "benchmarks/gpu_check/check.h"
#include "megatron_cpp/optimizer/gradient_buffer.h"
#include "parallel/rehearsal_backend.h"

namespace megatron_cpp::gpu_check {

void check_adamw(const Target& target, Report& report) {
  const auto side = target.pick<int64_t>(4096, 512);
  constexpr int64_t kMatrices = 60;  // 1.007e9 elements on a GPU
  std::vector<ParameterShard> shards;
  double elements = 0.0;
  for (int64_t i = 0; i < kMatrices; ++i) {
    // A norm between the matrices: views of the buffer don't all begin at multiples of the matrices' size.
    for (const auto& shape : {std::vector<int64_t>{side, side}, std::vector<int64_t>{side}}) {
      const auto parameter = random_values(target, shape, at::kFloat, 0.02).requires_grad_();
      elements += static_cast<double>(parameter.numel());
      shards.push_back(replicated_parameter("weight" + std::to_string(shards.size()), parameter,
                                            GradientDomain::kReplicated, InitialValue::constant(0.0),
                                            shape.size() > 1));
    }
  }
  const auto alone = parallel::make_rehearsal_group(0, 1, {.device = target.device()});
  GradientBuffer gradients(shards, {.grid = {}, .world = alone, .tp = alone, .dp = alone, .tp_dp = alone});
  gradients.zero();
  AdamW optimizer(shards, {});
  const auto bytes = target.pick<int64_t>(int64_t{1} << 30, int64_t{1} << 26);
  const auto from = at::ones({bytes}, at::TensorOptions(at::kByte).device(target.device()));
  auto to = at::empty_like(from);
  const auto times = take_turns(target, {{"AdamW", [&] { optimizer.step(1e-4); }}, {"copy", [&] { to.copy_(from); }}},
                                /*seconds=*/8.0);
  const double copy = 2.0 * static_cast<double>(bytes) / times.operations[1].median / 1e6;
  // Parameter, gradient and two moments are read, all but the gradient written: 28 bytes an element.
  const double speed = 28.0 * elements / times.operations[0].median / 1e6;
  auto row = to_row("AdamW, one update", times.operations[0], times);
  row["parameters"] = elements;
  row["GB/s"] = speed;
  row["copy_GB/s"] = copy;
  row["share_of_copy"] = speed / copy;
  const at::NoGradGuard no_grad;
  report.verdict(row, shards.front().parameter.isfinite().all().item<bool>());
}

}  // namespace megatron_cpp::gpu_check
