// AdamW over a model's parameters.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "parallel/shard.h"

namespace megatron_cpp {

/// Factors by prefix of a parameter's name: "decoder.layers.1" is for all names that are it or go on after a dot, as
/// "decoder.layers.1.mlp.weight" does. Of several the longest counts for a parameter; without any its factor is 1.
using ParameterScales = std::map<std::string, double>;

/// AdamW's constants; the defaults are usual for pretraining decoders.
struct AdamWOptions {
  double beta1 = 0.9;                         ///< decay of the first moment (exp_avg), in [0, 1)
  double beta2 = 0.95;                        ///< decay of the second moment (exp_avg_sq), in [0, 1)
  double eps = 1e-8;                          ///< added to the root of the second moment, above 0
  double weight_decay = 0.1;                  ///< not applied where ParameterShard::weight_decay is false
  ParameterScales learning_rate_scales = {};  ///< each at least 0; of weight decay, too, as PyTorch's groups have it
  ParameterScales weight_decay_scales = {};   ///< each at least 0; on top of that

  /// @throws c10::ValueError naming the value that is out of range.
  void validate() const;
  /// Refuses a prefix that is no parameter's, most likely a typing error. Not called by AdamW, which knows the
  /// parameters of its rank only.
  /// @param names  of all the model's parameters, on whatever rank they are; at least one.
  /// @throws c10::ValueError naming the prefix and some of `names`.
  void check_prefixes(const std::vector<std::string>& names) const;
};

/// Elements of a rank's parameter that its optimizer updates, and what it keeps of them. Float32 main parameters and a
/// distributed optimizer are other ways to make slices; AdamW takes them as they are.
struct ParameterSlice {
  ParameterShard shard;      ///< the parameter
  parallel::Range elements;  ///< of the rank's tensor, numbered row-major
  at::Tensor main;           ///< [elements], what is updated: a view of the parameter, or a copy of its own
  at::Tensor exp_avg;        ///< [elements], decaying mean of the gradient
  at::Tensor exp_avg_sq;     ///< [elements], decaying mean of its square

  /// [elements], a view of the parameter's .grad.
  /// @throws c10::ValueError naming the parameter if it has none.
  at::Tensor gradient() const;
};

/// One slice for each parameter that needs a gradient, all its elements, updated in place; moments of its dtype, 0.
std::vector<ParameterSlice> whole_slices(const std::vector<ParameterShard>& parameters);

/// Decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), by LibTorch's fused kernel. Each rank updates its
/// own slices from their gradients; equal replicas stay equal because their gradients are.
class AdamW {
 public:
  /// @param slices  of one dtype and device, gradients included.
  /// @throws c10::ValueError as AdamWOptions::validate does.
  AdamW(std::vector<ParameterSlice> slices, const AdamWOptions& options);
  /// Of whole_slices(parameters).
  AdamW(const std::vector<ParameterShard>& parameters, const AdamWOptions& options);

  /// One update. Not collective.
  /// @throws c10::ValueError, before anything is changed, naming a parameter that has no .grad.
  void step(double learning_rate);

  /// As given.
  const std::vector<ParameterSlice>& slices() const { return slices_; }
  /// Updates so far.
  int64_t num_steps() const { return num_steps_; }
  /// For resuming: continues as if this many updates had been made. The moments are restored in place.
  void set_num_steps(int64_t num_steps) { num_steps_ = num_steps; }

 private:
  std::vector<ParameterSlice> slices_;
  AdamWOptions options_;
  /// Indices of slices that are not empty, by scale of the learning rate and weight decay.
  std::map<std::pair<double, double>, std::vector<size_t>> parameter_groups_;
  int64_t num_steps_ = 0;
};

}  // namespace megatron_cpp
