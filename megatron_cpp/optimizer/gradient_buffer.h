// Keeps the gradients of all parameters in a few flat buffers, with one collective per buffer.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "megatron_cpp/optimizer/adamw.h"
#include "megatron_cpp/optimizer/flat_layout.h"
#include "megatron_cpp/parameters/parameter_shard.h"
#include "parallel/process_groups.h"

namespace megatron_cpp {

/// Which dtype gradients are added up and reduced in, and who gets the sums.
struct GradientBufferOptions {
  /// Of the gradients of parameters of a lower precision than float32; the others have their parameter's dtype.
  at::ScalarType low_precision_gradients = at::kFloat;
  /// Divides the optimizer's work and memory over the ranks of each bucket's group, its slices (ZeRO-1; Rajbhandari et
  /// al., arXiv 1910.02054): a rank completes the gradients of its slice, updates these parameters and gathers the
  /// others. Without effect in groups of one rank.
  bool distributed_optimizer = false;
};

/// Owns a flat tensor, a bucket, for the gradients of parameters of one dtype, in one dtype, that are summed over one
/// group (GradientDomain), and makes every trainable parameter's .grad a view of its bucket, so that backward (with or
/// without accumulate_into_grad) adds into it, micro-batch after micro-batch: also a float32 gradient of a bfloat16
/// parameter (Tensor::set_grad_dtype). Parameters that need no gradient take no space.
class GradientBuffer {
 public:
  /// @param parameters  all on one device.
  /// @param groups      those that the domains name, and always "tp".
  /// @throws c10::ValueError naming a parameter on another device, or a group that wasn't made or isn't one that
  ///         parameters are sharded over; or if no parameter needs a gradient. Not collective.
  GradientBuffer(const std::vector<ParameterShard>& parameters, const parallel::ProcessGroups& groups,
                 const GradientBufferOptions& options = {});

  /// Sets all gradients to 0 and re-attaches the views. Not collective.
  void zero();

  /// Completes the gradients after the last micro-batch of a step: sums each over the group that its domain names.
  /// Sums, no averages: the loss is divided by the tokens of the global batch before backward. With a distributed
  /// optimizer only the elements of slices() are complete then, the others are undefined.
  /// Comm: 1 all-reduce per bucket, of its gradients and the padding between them; with a distributed optimizer 1
  /// reduce-scatter, of the slices. Collective over these groups.
  void reduce();

  /// The L2 norm of the whole model's gradient, every parameter counted once however it is sharded or replicated.
  /// Squares are summed in double over blocks of kNormBlock elements of what a slice of a bucket (FlatLayout) holds of
  /// a parameter, the sums of the blocks are added in their order, then those of the slices: the result is the same
  /// with a distributed optimizer.
  /// Comm: 1 all-reduce of one element over tp, and one over each other group that parameters are sharded over
  /// (experts: etp_ep); with a distributed optimizer also 1 of three elements per bucket. Collective over these groups.
  /// Call it after reduce(). Waits for the device.
  double norm() const;

  /// The square of norm(), [1] float64 on the parameters' device, without waiting for it: a training step reads it
  /// together with its loss. Comm: as norm().
  at::Tensor squared_norm() const;

  /// Multiplies all complete gradients by `factor`. Not collective.
  void scale(double factor);

  /// Scales the gradients so that their norm() is `max_norm` at most, as torch.nn.utils.clip_grad_norm_ does.
  /// @return  the norm before. Comm: as norm().
  double clip_grad_norm(double max_norm);

  /// What this rank's optimizer updates of each of parameters(), in their order: all its elements; with a distributed
  /// optimizer those in this rank's slice of the bucket, which may be none. Not collective.
  std::vector<ParameterSlice> slices(const AdamWOptions& options) const;

  /// Completes the parameters after the optimizer has updated the elements of slices(), or a checkpoint was loaded into
  /// them: sends these to the ranks of the bucket's group and receives theirs.
  /// Comm: with a distributed optimizer all-gathers of each bucket's slices, in the parameters' dtype; else none.
  /// Collective over these groups.
  void gather_parameters();

  /// The trainable parameters, bucket by bucket, in their order within a bucket.
  const std::vector<ParameterShard>& parameters() const { return parameters_; }

 private:
  struct Bucket {
    at::ScalarType dtype = at::kFloat;            ///< of the gradients
    at::ScalarType parameter_dtype = at::kFloat;  ///< of the parameters
    parallel::GroupPtr group;                     ///< that its gradients are summed over
    std::vector<ParameterShard> members;          ///< in the order of `layout`
    FlatLayout layout{{}, 1};                     ///< of `members`
    bool is_divided = false;                      ///< whether each rank of `group` updates its own slice only
    at::Tensor gradients;                         ///< flat, with padding, which is always 0
    std::vector<at::Tensor> norm;  ///< views of what squared_norm() sums on this rank, without empty ones
    at::Tensor norm_places;        ///< for each of their blocks its index in [slices, classes, norm_columns]
    int64_t norm_columns = 0;      ///< blocks of a slice and class, at most

    int num_norm_slices() const { return is_divided ? 1 : layout.num_slices; }
    /// What is complete after reduce().
    at::Tensor own_gradients() const;
  };
  Bucket& bucket_of(const ParameterShard& shard, at::ScalarType dtype);
  static void prepare_norm(Bucket& bucket);
  /// [3] float64: the squares of a bucket's gradients of parameters that are sharded over tp, over etp_ep, and not.
  static at::Tensor squares_of(const Bucket& bucket);

  std::vector<ParameterShard> parameters_;
  std::vector<at::Tensor> views_;  ///< of the buckets, one per parameter
  std::vector<Bucket> buckets_;
  parallel::ProcessGroups groups_;
};

/// Elements that all ranks together hand in for one all-gather of GradientBuffer::gather_parameters, at most: what it
/// needs memory for, and an own share of that.
inline constexpr int64_t kGatheredAtATime = 1 << 24;

/// Elements per block of the gradient norm: squares are summed within a block, then the sums of the blocks are added.
inline constexpr int64_t kNormBlock = 1 << 16;

/// The sum of the squares of each block of kNormBlock elements, tensor by tensor; the last block of each may be
/// shorter.
/// @param gradients  at least one, contiguous, of any floating dtypes, on one device.
/// @return           [number of blocks] float64 on that device. Not collective.
at::Tensor squares_of_blocks(const std::vector<at::Tensor>& gradients);

namespace internal {

/// The same with LibTorch's operators, for devices other than the CPU.
at::Tensor squares_of_blocks_by_operators(const std::vector<at::Tensor>& gradients);

}  // namespace internal

}  // namespace megatron_cpp
