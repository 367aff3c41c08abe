// (c) The vision tower of the released model on pictures of 728 x 728, forward and backward, in bfloat16.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "benchmarks/gpu_check/check.h"
#include "step37/vision/vision_tower.h"

namespace megatron_cpp::gpu_check {
namespace {

step37::VisionConfig tower_config(const Target& target) {
  if (target.is_gpu()) return {};
  return {.image_size = 112, .patch_size = 14, .width = 64, .layers = 2, .heads = 4, .mlp_width = 256};
}

/// Operations of one picture's forward and backward passes: matrices and attention of the blocks, three times forward.
double operations_of_picture(const step37::VisionConfig& config) {
  const auto side = static_cast<double>(config.image_size) / static_cast<double>(config.patch_size);
  const double patches = side * side;
  const auto width = static_cast<double>(config.width);
  const double matrices = 2.0 * patches * (4.0 * width * width + 2.0 * width * static_cast<double>(config.mlp_width));
  const double attention = 4.0 * patches * patches * width;
  return 3.0 * static_cast<double>(config.layers) * (matrices + attention);
}

}  // namespace

void check_tower(const Target& target, Report& report) {
  const auto config = tower_config(target);
  step37::VisionTower tower(config, GradientDomain::kReplicated);
  tower->to(target.device());
  tower->to(at::kBFloat16);
  {
    const at::NoGradGuard no_grad;
    for (auto& parameter : tower->parameters()) {
      parameter.normal_(0.0, 0.02);
      parameter.mutable_grad() = at::zeros_like(parameter);
    }
  }
  const int64_t rows = config.feature_rows(config.image_size, config.image_size);
  for (const int64_t pictures : {1, 4, 8}) {
    // Pictures that don't fit at once go through in two or more passes, as micro-batches do.
    for (int64_t passes = 1; passes <= pictures; passes *= 2) {
      const int64_t share = pictures / passes;
      const auto pixels = random_values(target, {share, 3, config.image_size, config.image_size}, at::kBFloat16, 1.0);
      const auto gradient = random_values(target, {share, rows, config.output_dim()}, at::kBFloat16, 1e-3);
      std::optional<Times> times;
      bool is_finite = true;
      target.reset_peak();
      try {
        at::Tensor features;
        times = take_turns(target,
                           {{"tower",
                             [&] {
                               for (int64_t pass = 0; pass < passes; ++pass) {
                                 features = tower->forward(pixels);
                                 features.backward(gradient);
                               }
                             }}},
                           /*seconds=*/target.pick(2.2 * static_cast<double>(pictures), 3.0));
        is_finite = features.isfinite().all().item<bool>();
      } catch (const c10::OutOfMemoryError&) {
        target.free_cache();
        continue;
      }
      auto row = to_row("tower, forward and backward", times->operations[0], *times);
      row["pictures"] = pictures;
      row["passes"] = passes;
      row["side"] = config.image_size;
      row["TFLOP/s"] =
          operations_of_picture(config) * static_cast<double>(pictures) / times->operations[0].median / 1e9;
      row["share_of_plain_product"] = row["TFLOP/s"].get<double>() / times->product_teraflops();
      if (target.is_gpu()) row["peak_GiB"] = static_cast<double>(target.peak_bytes()) / (1 << 30);
      report.verdict(std::move(row), is_finite);
      break;
    }
  }
}

}  // namespace megatron_cpp::gpu_check
