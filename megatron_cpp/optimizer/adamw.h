// AdamW over a model's parameters.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "parallel/shard.h"

namespace megatron_cpp {

/// Factors by prefix of a parameter's name: "decoder.layers.1" matches this name and names that continue it after a
/// dot, such as "decoder.layers.1.mlp.weight". The longest matching prefix counts; without one the factor is 1.
using ParameterScales = std::map<std::string, double>;

/// AdamW's constants; the defaults are usual for pretraining decoders.
struct AdamWOptions {
  double beta1 = 0.9;                         ///< decay of the first moment (exp_avg), in [0, 1)
  double beta2 = 0.95;                        ///< decay of the second moment (exp_avg_sq), in [0, 1)
  double eps = 1e-8;                          ///< added to the root of the second moment, above 0
  double weight_decay = 0.1;                  ///< not applied where ParameterShard::weight_decay is false
  at::ScalarType exp_avg = at::kFloat;        ///< dtype of the first moment, float32 or bfloat16
  at::ScalarType exp_avg_sq = at::kFloat;     ///< dtype of the second moment, likewise
  ParameterScales learning_rate_scales = {};  ///< each at least 0; also scale weight decay, as in PyTorch
  ParameterScales weight_decay_scales = {};   ///< each at least 0; scale weight decay only

  /// @throws c10::ValueError naming the value that is out of range.
  void validate() const;
  /// Refuses a prefix that matches no parameter, most likely a typing error. AdamW doesn't call it, since it knows only
  /// the parameters of its rank.
  /// @param names  of all parameters of the model, on all ranks; at least one.
  /// @throws c10::ValueError naming the prefix and some of `names`.
  void check_prefixes(const std::vector<std::string>& names) const;
};

/// Elements of a parameter that this rank's optimizer updates, and their moments.
struct ParameterSlice {
  ParameterShard shard;      ///< the parameter
  parallel::Range elements;  ///< which elements of the rank's tensor, numbered row-major
  at::Tensor main;           ///< [elements], the updated values: a view of the parameter, or a float32 copy
  at::Tensor exp_avg;        ///< [elements], decaying mean of the gradient
  at::Tensor exp_avg_sq;     ///< [elements], decaying mean of its square
  /// Whether the other ranks of the group that the gradient is summed over update the other elements. Otherwise each of
  /// them updates these ones, too.
  bool is_divided = false;

  /// [elements], a view of the parameter's .grad.
  /// @throws c10::ValueError naming the parameter if it has none.
  at::Tensor gradient() const;
  /// Whether `main` is a copy, which the parameter is rounded from after each update.
  bool has_copy() const { return main.scalar_type() != shard.parameter.scalar_type(); }
};

/// Elements of a parameter with its moments. Of a parameter of a lower precision than float32 they get a float32 copy
/// (main parameters, as in Megatron-Core); others are updated in place. The moments start at 0; they have the dtypes of
/// the options, or that of a parameter that is wider than float32.
ParameterSlice parameter_slice(const ParameterShard& shard, parallel::Range elements, const AdamWOptions& options);

/// One slice per parameter that needs a gradient: all its elements.
std::vector<ParameterSlice> whole_slices(const std::vector<ParameterShard>& parameters, const AdamWOptions& options);

/// Decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), by LibTorch's fused kernel. Each rank updates its
/// own slices from their gradients; equal replicas stay equal because their gradients are equal. Gradients and moments
/// of another dtype than `main` are converted for an update and the moments rounded after it, a few million elements at
/// a time.
class AdamW {
 public:
  /// @param slices  on one device, gradients included; `main` of one dtype.
  /// @throws c10::ValueError as AdamWOptions::validate does.
  AdamW(std::vector<ParameterSlice> slices, const AdamWOptions& options);
  /// Updates whole_slices(parameters, options).
  AdamW(const std::vector<ParameterShard>& parameters, const AdamWOptions& options);

  /// One update, also of the parameters whose `main` is a copy. Not collective.
  /// @throws c10::ValueError, before anything is changed, naming a parameter that has no .grad.
  void step(double learning_rate);

  /// Gives parameters their initial values: calls `fill` with each of them, one after the other; with a float32 tensor
  /// in place of one that has a copy in `main`, which then gets the values before they are rounded, so that it doesn't
  /// depend on the precision or on which elements this rank updates. Not collective.
  /// @param parameters  all of them, with all their elements, as this rank's module has them.
  void fill_parameters(const std::vector<ParameterShard>& parameters,
                       const std::function<void(const ParameterShard&)>& fill);
  /// Rounds the elements of `slices()` from the copies in `main`, if there are some: after a checkpoint was loaded into
  /// these. Not collective.
  void write_parameters();

  /// As given to the constructor.
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
