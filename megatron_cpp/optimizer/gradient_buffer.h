// Keeps the gradients of all parameters in a few flat buffers, with one all-reduce per buffer.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string_view>
#include <vector>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "parallel/process_groups.h"

namespace megatron_cpp {

/// Which dtype gradients are added up and reduced in.
struct GradientBufferOptions {
  /// Of the gradients of parameters of a lower precision than float32; the others have their parameter's dtype.
  at::ScalarType low_precision_gradients = at::kFloat;
};

/// Owns a flat tensor, a bucket, for each dtype and group that gradients are summed over (GradientDomain), and makes
/// every trainable parameter's .grad a view of its bucket, so that backward (with or without accumulate_into_grad) adds
/// into it, micro-batch after micro-batch: also a float32 gradient of a bfloat16 parameter (Tensor::set_grad_dtype).
/// Parameters that need no gradient take no space.
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
  /// Sums, no averages: the loss is divided by the tokens of the global batch before backward.
  /// Comm: 1 all-reduce per bucket, of its gradients and the padding between them. Collective over these groups.
  void reduce();

  /// The L2 norm of the whole model's gradient, every parameter counted once however it is sharded or replicated.
  /// Squares are summed in double over blocks of kNormBlock elements of a rank's parameter, and the sums of the blocks
  /// are added in their order: the result doesn't depend on which rank sums which blocks.
  /// Comm: 1 all-reduce of one element over tp, and one over each other group that parameters are sharded over
  /// (experts: etp_ep). Collective over these groups. Call it after reduce(). Waits for the device.
  double norm() const;

  /// The square of norm(), [1] float64 on the parameters' device, without waiting for it: a training step reads it
  /// together with its loss. Comm: as norm().
  at::Tensor squared_norm() const;

  /// Multiplies all gradients by `factor`. Not collective.
  void scale(double factor);

  /// Scales the gradients so that their norm() is `max_norm` at most, as torch.nn.utils.clip_grad_norm_ does.
  /// @return  the norm before. Comm: as norm().
  double clip_grad_norm(double max_norm);

  /// The trainable parameters, bucket by bucket, in their order within a bucket.
  const std::vector<ParameterShard>& parameters() const { return parameters_; }

 private:
  struct Bucket {
    at::ScalarType dtype;
    parallel::GroupPtr group;  ///< that its gradients are summed over
    at::Tensor gradients;      ///< flat, with padding, which is always 0
    int64_t numel = 0;         ///< of `gradients`
  };
  Bucket& bucket_of(const ParameterShard& shard, at::ScalarType dtype);
  /// [1] float64: the squares of this rank's gradients of parameters sharded over that group, and of replicated ones.
  at::Tensor own_squares(std::string_view sharded_over, bool with_replicated) const;

  std::vector<ParameterShard> parameters_;
  std::vector<at::Tensor> views_;  ///< of the buckets, one per parameter
  std::vector<Bucket> buckets_;
  parallel::ProcessGroups groups_;
};

/// Elements per block of the gradient norm: squares are summed within a block, then the sums of the blocks are added. A
/// slice of a parameter that begins at a multiple of this has whole blocks.
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
