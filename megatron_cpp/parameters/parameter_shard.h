// What a rank knows of each of its parameters: which part of which global tensor it is, how its gradient is completed,
// and its initial value. Gradient reduction, gradient norm, optimizer, initialisation and checkpoints read this list
// and nothing else.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "megatron_cpp/parameters/box.h"

/// Namespace of the whole project. Directly in it: tensor-parallel layers, decoder, optimizer, checkpoints and data
/// packing, with Megatron-Core's names.
namespace megatron_cpp {

/// How a parameter and its gradient are distributed over the ranks. Both members name a group of parallel::kGroupKinds;
/// gradient reduction and norm use them.
struct GradientDomain {
  /// The ranks of this group hold different parts of the parameter. Empty: every rank holds the whole parameter.
  std::string_view sharded_over;
  /// The gradient is the sum over this group of what backward leaves on each rank.
  std::string_view summed_over = "dp";
  /// Same groups.
  bool operator==(const GradientDomain&) const = default;

  /// Each tensor-parallel rank holds a part of the parameter, and backward leaves the whole gradient of that part.
  static const GradientDomain kSharded;
  /// Every tensor-parallel rank holds the parameter, and backward leaves the same, whole gradient on each.
  static const GradientDomain kReplicated;
  /// Every tensor-parallel rank holds the parameter, and backward leaves a summand of its gradient: norm weights under
  /// sequence parallelism, q/k norms (heads are split), a projector or tower that sees this rank's images only.
  static const GradientDomain kReplicatedPartial;
  /// Each rank of an expert's grid holds a part of the experts, and backward leaves the gradient from all tokens of its
  /// copy of the experts.
  static const GradientDomain kExpert;

  /// The group of the ranks that hold the same part of the parameter.
  /// @throws c10::ValueError naming sharded_over if it isn't empty, "tp" or "etp_ep".
  std::string_view replicated_over() const;
};
inline constexpr GradientDomain GradientDomain::kSharded{"tp", "dp"};
inline constexpr GradientDomain GradientDomain::kReplicated{"", "dp"};
inline constexpr GradientDomain GradientDomain::kReplicatedPartial{"", "tp_dp"};
inline constexpr GradientDomain GradientDomain::kExpert{"etp_ep", "edp"};

/// Initial values of a parameter: every element `value`, or normal around 0 with standard deviation `value`.
struct InitialValue {
  /// The two distributions.
  enum class Kind { kConstant, kNormal };
  Kind kind = Kind::kConstant;  ///< which of the two
  double value = 0.0;           ///< the constant, or the standard deviation

  /// Every element `value`.
  static InitialValue constant(double value) { return {Kind::kConstant, value}; }
  /// Normally distributed around 0.
  static InitialValue normal(double standard_deviation) { return {Kind::kNormal, standard_deviation}; }
};

/// A box of a global tensor, and where it lies in the rank's tensor, with the same shape.
struct ParameterSegment {
  std::string name;                   ///< dotted; in ParallelModule::own_parameters relative to the module
  std::vector<int64_t> global_shape;  ///< without vocabulary padding, which is in no checkpoint
  Box box;                            ///< the elements; a length of 0 if a vocabulary shard is all padding
  std::vector<int64_t> local_begin;   ///< index in the rank's tensor of the first of them

  /// Rows [global_begin, global_begin + length) of dimension `dim`, which are rows [local_begin, local_begin + length)
  /// of the rank's tensor; the other dimensions are whole in both.
  static ParameterSegment rows(std::string name, std::vector<int64_t> global_shape, int64_t dim, int64_t global_begin,
                               int64_t local_begin, int64_t length);

  /// The elements in the rank's tensor, or in one laid out like it. A view.
  at::Tensor in_local(const at::Tensor& local) const;
  /// The elements in the global tensor. A view.
  at::Tensor in_global(const at::Tensor& global) const;
};

/// What a module does before it reads its parameters. Empty: nothing.
using BeforeUse = std::function<void()>;

/// One parameter of this rank. A fused parameter (q, k and v in one matrix) has several segments; elements that belong
/// to no segment are padding and stay 0.
struct ParameterShard {
  std::string name;                        ///< dotted; in ParallelModule::own_parameters relative to the module
  at::Tensor parameter;                    ///< the module's own tensor, not a copy; gradients are read from its .grad
  GradientDomain domain;                   ///< how it is distributed, and how its gradient is completed
  std::vector<ParameterSegment> segments;  ///< at least one
  InitialValue initial_value;              ///< of the elements in segments
  bool weight_decay = true;                ///< false for norms and biases
  /// Of the module that reads the parameter (ParallelModule::use_parameters); null: of none.
  std::shared_ptr<BeforeUse> before_use = nullptr;
};

/// A replicated parameter: one segment, the whole of it.
ParameterShard replicated_parameter(std::string name, const at::Tensor& parameter, GradientDomain domain,
                                    InitialValue initial_value, bool weight_decay);

/// A parameter whose dimension `dim` is split evenly over tp: this rank holds rows [begin, begin + local size).
ParameterShard sharded_parameter(std::string name, const at::Tensor& parameter, std::vector<int64_t> global_shape,
                                 int64_t dim, int64_t begin, InitialValue initial_value, bool weight_decay);

/// A module that can say how its parameters are sharded.
class ParallelModule : public torch::nn::Module {
 public:
  /// This module's parameters, and those of descendants that are no ParallelModule themselves; names relative to this
  /// module. Not collective.
  virtual std::vector<ParameterShard> own_parameters() const = 0;

  /// Returns when the parameters may be read: GradientBuffer::gather_parameters may have left them incomplete. Each
  /// forward() calls it first; so does other code that reads the parameters' values between the steps of a training
  /// loop. Not collective.
  void use_parameters() const {
    if (*before_use_) (*before_use_)();
  }

  /// What use_parameters() calls, for ParameterShard.
  const std::shared_ptr<BeforeUse>& before_use() const { return before_use_; }

 private:
  std::shared_ptr<BeforeUse> before_use_ = std::make_shared<BeforeUse>();
};

/// All parameters below `root`, in the order of the module tree, with full names and `before_use`.
/// @throws c10::ValueError naming a parameter that no ParallelModule lists, or two do. Not collective.
std::vector<ParameterShard> parameter_shards(const torch::nn::Module& root);

/// Gives every parameter its initial value. An element depends on `seed`, its segment's name and its global index only
/// (Philox 4x32-10, Salmon et al., SC 2011; Box-Muller), so every rank fills its own part, and runs with different
/// group sizes start with the same values. In place, without gradient; not collective.
void initialize_parameters(const std::vector<ParameterShard>& parameters, uint64_t seed);

}  // namespace megatron_cpp
