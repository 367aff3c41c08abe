// What the tests of the vision tower share.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "step37/vision/vision_tower.h"

namespace megatron_cpp::vision_tower_fixture {

/// A whole tower in double, on the CPU, with every parameter, biases and norms too, away from its constant; the same on
/// every rank.
inline step37::VisionTower tower_of(const step37::VisionConfig& config, GradientDomain domain) {
  step37::VisionTower tower(config, domain);
  initialize_parameters(parameter_shards(*tower), /*seed=*/7);
  tower->to(at::kDouble);
  at::manual_seed(11);
  const at::NoGradGuard no_grad;
  for (auto& item : tower->named_parameters()) item.value().add_(at::randn_like(item.value()), 0.1);
  return tower;
}

}  // namespace megatron_cpp::vision_tower_fixture
