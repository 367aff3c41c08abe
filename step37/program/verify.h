// Does a configuration compute the same in every layout of the ranks at hand?
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "megatron_cpp/training/trainer.h"
#include "parallel/process_groups.h"
#include "step37/step37_model.h"

namespace megatron_cpp::parallel {
class Runtime;
}

namespace megatron_cpp::step37 {

/// The options of `step37 verify`.
struct VerifyArguments {
  std::filesystem::path config;
  std::vector<std::string> overrides = {};
  std::optional<int64_t> layers = std::nullopt;    ///< only the decoder's first layers, without multi-token prediction
  std::string dtype = "float64";                   ///< float64 or float32
  std::optional<double> tolerance = std::nullopt;  ///< else 1e-10 in float64, 1e-4 in float32
  std::filesystem::path against = {};              ///< gradients from elsewhere; empty: none
};

/// What the layouts are computed with. Tests put faulty parts in their place; the reference doesn't use them.
struct VerifyParts {
  /// The groups that a layout's model, losses and gradients use.
  std::function<parallel::ProcessGroups(const parallel::ProcessGroups&)> groups = [](const auto& made) { return made; };
  /// The model's parameters, after it has its weights.
  std::function<std::vector<ParameterShard>(Step37Model&)> parameters = [](Step37Model& model) {
    return parameter_shards(*model);
  };
  /// Called with the batch of a micro-batch, before the model takes it.
  std::function<void(Step37Batch&)> change_batch = [](Step37Batch&) {};
  /// The losses of a micro-batch, whose gradients will be loss_gradient.
  std::function<LossSum(Step37Model&, const Step37Batch&, double loss_gradient)> loss_sum =
      [](Step37Model& model, const Step37Batch& batch, double loss_gradient) {
        return model->loss_sum(batch, /*expert_balance=*/nullptr, loss_gradient);
      };
  /// Called on rank 0 with each line of the result; else it goes to the standard output.
  std::function<void(const std::string&)> print = {};
};

/// Computes losses and gradients of the first global batch of the configuration's training, with the weights that
/// training starts from: first without parallelism, each rank for itself; then in one layout after the other, and
/// compares every parameter's gradient. Layouts: the configured one; then, one change at a time, each tp that divides
/// the ranks, each ep and etp of a model with experts, with dp for the rest; then, at the configured tp or, if that is
/// 1, at the largest possible one, sequence_parallel on and off, each sharding of projector and embedding, and both
/// ways to share out the vision tower. Layouts that the sizes forbid are listed with the reason.
///
/// With `against`, a safetensors file of gradients by published name, with or without "grad." before it, the gradients
/// without parallelism are compared with these first. The file may also hold the batch that they were computed on, as
/// `step37 forward` reads it (input_ids, labels, ..): it is used in place of the configuration's then.
///
/// Writes no file. A tokenizer is taken from run.directory if there is one, as training would.
/// @return  0 if all agree; the last line is "verify: N layouts agree". 1 if not; the last line is
///          "verify: LAYOUT differs: NAME by X" then: of the first such layout, its worst parameter, and the largest
///          difference relative to the parameter's largest element.
/// @throws c10::ValueError or parallel::AgreedError on every rank, naming what is wrong. Collective over all ranks.
int verify(parallel::Runtime& runtime, const VerifyArguments& arguments, const VerifyParts& parts = {});

/// What the relation between two gradients of a parameter suggests.
struct GradientRelation {
  double ratio = 0.0;   ///< <g, r> / <r, r>: how often the reference r is in the gradient g
  double cosine = 0.0;  ///< of the angle between them; 1 or -1: g is a multiple of r

  /// A sentence about the likely cause, for a layout of `tp` and `dp` ranks. Pure.
  std::string likely_cause(int tp, int dp) const;
};

}  // namespace megatron_cpp::step37
