// Keeps the gradients of all parameters in a few flat buffers, with one collective per buffer.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <set>
#include <vector>

#include "megatron_cpp/optimizer/adamw.h"
#include "megatron_cpp/optimizer/flat_layout.h"
#include "megatron_cpp/parameters/parameter_shard.h"
#include "parallel/collectives.h"
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
  /// A bucket is full when it has so many elements or more, at least 1: what is reduced, and gathered, at a time.
  int64_t bucket_elements = 40'000'000;
  /// Whether reduce_in_backward() does anything.
  bool overlap_reduction = true;
  /// Whether gather_parameters() leaves with the parameters still on their way, see there.
  bool overlap_gather = true;

  /// @throws c10::ValueError naming bucket_elements if it is below 1.
  void validate() const;
};

/// Owns flat tensors, buckets, each for the gradients of parameters of one dtype, in one dtype, that are summed over
/// one group (GradientDomain), and makes every trainable parameter's .grad a view of its bucket, so that backward (with
/// or without accumulate_into_grad) adds into it, micro-batch after micro-batch: also a float32 gradient of a bfloat16
/// parameter (Tensor::set_grad_dtype). Parameters that need no gradient take no space. Buckets are filled from the last
/// parameter to the first, since backward completes the gradients in about this order.
///
/// With a distributed optimizer the parameters of a bucket become views of a flat tensor, too, so that they are
/// gathered where they lie; views of a parameter that were made before keep the old memory.
class GradientBuffer {
 public:
  /// @param parameters  all on one device.
  /// @param groups      those that the domains name, and always "tp".
  /// @throws c10::ValueError naming a parameter on another device, or a group that wasn't made or isn't one that
  ///         parameters are sharded over; or if no parameter needs a gradient. Not collective.
  GradientBuffer(const std::vector<ParameterShard>& parameters, const parallel::ProcessGroups& groups,
                 const GradientBufferOptions& options = {});
  /// Waits for what is still on its way.
  ~GradientBuffer();
  GradientBuffer(const GradientBuffer&) = delete;
  GradientBuffer& operator=(const GradientBuffer&) = delete;

  /// Sets all gradients to 0 and re-attaches the views. Not collective.
  void zero();

  /// Call it before the backward pass of a step's last micro-batch, one call of backward(). It then starts to reduce
  /// a bucket as soon as that has completed the gradients of its parameters, and goes on meanwhile; reduce() does the
  /// rest. Buckets of a group are reduced in their order, whichever is complete first, so that ranks whose graphs
  /// differ agree: one whose parameters backward doesn't reach, and those after it, wait for reduce(). Without effect
  /// in groups where nothing goes on meanwhile (parallel::overlaps_computation: over MPI), and in those that are also
  /// one of tp, ep, etp and etp_ep, where the layers' collectives come between. Not collective itself.
  void reduce_in_backward();

  /// Completes the gradients after the last micro-batch of a step: sums each over the group that its domain names.
  /// Sums, no averages: the loss is divided by the tokens of the global batch before backward. With a distributed
  /// optimizer only the elements of slices() are complete then, the others are undefined.
  /// Comm: 1 all-reduce per bucket, of its gradients and the padding between them; with a distributed optimizer 1
  /// reduce-scatter, of the slices; reduce_in_backward() has started some of them. Collective over these groups.
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
  /// @param addend  [1] float64 on that device: added on each rank before the sum over tp. Undefined: nothing.
  at::Tensor squared_norm(const at::Tensor& addend = {}) const;

  /// What this rank's own backward passes left, before the last reduce(): the sum of the squares of each block of
  /// kNormBlock elements of each bucket, [blocks] float64 on the parameters' device. Two equal passes give the same
  /// bits. Those of buckets that are reduced over several ranks are computed just before, by reading the gradients once
  /// (as Megatron-Core's check_for_nan_in_loss_and_grad does). Call it before the gradients are changed. Not
  /// collective.
  at::Tensor squares_before_reduction() const;

  /// Multiplies all complete gradients by `factor`. Not collective.
  void scale(double factor);

  /// Scales the gradients so that their norm() is `max_norm` at most, as torch.nn.utils.clip_grad_norm_ does.
  /// @return  the norm before. Comm: as norm().
  double clip_grad_norm(double max_norm);

  /// What this rank's optimizer updates of each of parameters(), in their order: all its elements; with a distributed
  /// optimizer those in this rank's slice of the bucket, which may be none. Not collective.
  std::vector<ParameterSlice> slices(const AdamWOptions& options) const;

  /// Completes the parameters after the optimizer has updated the elements of slices(), or a checkpoint was loaded into
  /// them: sends these to the ranks of the bucket's group and receives theirs. With overlap_gather it only starts that,
  /// in the order in which a forward pass needs them: each module waits for its own (ParallelModule::use_parameters),
  /// and finish_gather() for all. Until then the parameters must not be read or written in another way; the elements of
  /// slices() may be read. Parameters of no module are complete when it returns. A module that doesn't wait is found by
  /// its backward pass, which throws c10::Error naming the parameter, whatever the backend is.
  /// Comm: with a distributed optimizer 1 all-gather of each bucket's slices, in the parameters' dtype; else none.
  /// Collective over these groups.
  void gather_parameters();

  /// Returns when all parameters are complete. Not collective.
  void finish_gather();

  /// The trainable parameters, bucket by bucket, in their order within a bucket.
  const std::vector<ParameterShard>& parameters() const { return parameters_; }

 private:
  struct Bucket {
    at::ScalarType dtype = at::kFloat;                 ///< of the gradients
    at::ScalarType parameter_dtype = at::kFloat;       ///< of the parameters
    parallel::GroupPtr group;                          ///< that its gradients are summed over
    std::vector<ParameterShard> members;               ///< in the order of `layout`
    FlatLayout layout{{}, 1};                          ///< of `members`
    bool is_divided = false;                           ///< whether each rank of `group` updates its own slice only
    at::Tensor gradients;                              ///< flat, with padding, which is always 0
    at::Tensor parameters;                             ///< if it is divided: flat, laid out in the same way
    bool overlaps = false;                             ///< whether it may be reduced during the backward pass
    std::set<size_t> incomplete;                       ///< members whose gradient backward hasn't completed yet
    std::optional<parallel::PendingTensor> reduction;  ///< on its way
    std::optional<parallel::PendingTensor> gather;     ///< on its way
    at::Tensor own_squares;        ///< of the last reduction: squares_of_blocks before it; undefined in a group of one
    std::vector<at::Tensor> norm;  ///< views of what squared_norm() sums on this rank, without empty ones
    at::Tensor norm_places;        ///< for each of their blocks its index in [slices, classes, norm_columns]
    int64_t norm_columns = 0;      ///< blocks of a slice and class, at most

    int num_norm_slices() const { return is_divided ? 1 : layout.num_slices; }
    /// What is complete after reduce().
    at::Tensor own_gradients() const;
  };
  struct BackwardHooks;

  Bucket& bucket_of(const ParameterShard& shard, at::ScalarType dtype, int64_t full);
  static void place(Bucket& bucket, const GradientBufferOptions& options);
  static void prepare_norm(Bucket& bucket);
  static void start_reduction(Bucket& bucket);
  static void finish(std::optional<parallel::PendingTensor>& pending);
  /// Decides which buckets are reduced during the backward pass, and lets that call completed() where it is needed.
  void choose_overlap(const GradientBufferOptions& options);
  /// Backward has completed the gradient of a bucket's member.
  void completed(Bucket& bucket, size_t member);
  /// Lets each module wait for the buckets that hold its parameters.
  void wait_before_use();
  /// [3] float64: the squares of a bucket's gradients of parameters that are sharded over tp, over etp_ep, and not.
  static at::Tensor squares_of(const Bucket& bucket);

  std::vector<ParameterShard> parameters_;
  std::vector<at::Tensor> views_;  ///< of the buckets, one per parameter
  std::deque<Bucket> buckets_;
  parallel::ProcessGroups groups_;
  bool overlap_gather_;
  bool is_last_backward_ = false;                              ///< since reduce_in_backward()
  std::unique_ptr<BackwardHooks> hooks_;                       ///< null if nothing overlaps
  std::shared_ptr<bool> lifetime_ = std::make_shared<bool>();  ///< of this, for what modules call
};

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
