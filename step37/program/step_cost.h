// What one optimizer step sends, computes and keeps in memory on a rank, by formulas.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "parallel/rank_grid.h"
#include "parallel/recording_backend.h"
#include "step37/data/picture_pack.h"
#include "step37/program/model_size.h"
#include "step37/step37_model.h"

namespace megatron_cpp::step37 {

/// Bytes of an element, by what it is for: 4 in float32, 2 in bfloat16.
struct ElementBytes {
  int64_t parameter = 4;   ///< of parameters, of activations, and of what is sent of them
  int64_t gradient = 4;    ///< of trained parameters' gradients
  int64_t main = 0;        ///< of the float32 copies of trained parameters; 0: there are none
  int64_t exp_avg = 4;     ///< of AdamW's first moment
  int64_t exp_avg_sq = 4;  ///< of its second moment
};

/// A step: every pack is one sub-sequence of `sequence_length` positions with `images_per_pack` pictures of the tower's
/// image_size, spread evenly over the tensor-parallel ranks (with MmEncoderTpMode::kData the tower's work, too).
struct StepShape {
  int64_t sequence_length = 0;
  int64_t micro_batch_size = 1;   ///< packs, one behind the other in one sequence
  int64_t global_batch_size = 1;  ///< packs of all replicas, divisible by micro_batch_size * dp
  int64_t images_per_pack = 0;
  bool runs_tower = true;  ///< false: the pictures' features are given (data.features)
  ElementBytes element_bytes = {};
  bool distributed_optimizer = false;  ///< GradientBufferOptions::distributed_optimizer
  int64_t bucket_elements = 0;         ///< GradientBufferOptions::bucket_elements
};

/// Collectives of one kind over the groups of one kind.
struct Traffic {
  parallel::CollectiveKind kind = parallel::CollectiveKind::kAllReduce;
  std::string_view group;   ///< tp, dp, tp_dp, and of experts ep, etp, etp_ep (both together), edp
  int64_t bytes = 0;        ///< that a rank sends in a step, by the count of parallel::CollectiveObserver
  bool of_experts = false;  ///< tokens on their way to experts and back
};

/// Ranks of a group of the kind `group`, and how many consecutive ranks it lies in.
struct GroupExtent {
  int64_t size = 1;
  int64_t span = 1;
};
GroupExtent extent_of(std::string_view group, const parallel::RankGrid& grid);

/// All that Trainer::step sends, without checked mode and without the loader. Exact for models without
/// experts whose ranks hold as many image rows each, in their part of the sequence as well as from the tower, unless
/// the word embedding is trained and neither projector nor tower: gradients then go to the ranks that have the ids,
/// which is taken to be even. Routing to experts is taken to be uniform.
std::vector<Traffic> step_traffic(const Step37Config& config, const parallel::RankGrid& grid, const StepShape& shape,
                                  const std::vector<TensorGroup>& tensors);

/// Floating-point operations of a step, of all ranks: matrix products and attention, an addition and a multiplication
/// counted as two. Backward costs twice as much as forward, less what frozen parts spare. Causal attention over S
/// positions counts S/2 keys a query, a window of W (below S/2) W keys. With MmEncoderTpMode::kWeights what isn't split
/// of the tower counts once for each tensor-parallel rank.
int64_t step_flops(const Step37Config& config, const parallel::RankGrid& grid, const StepShape& shape);

/// The same of a pack with its own sub-sequences (the padding is one, and computed as the others are) and pictures.
/// @param runs_tower  as StepShape's
int64_t pack_flops(const Step37Config& config, const parallel::RankGrid& grid, const PicturePack& pack,
                   const CropOptions& crops, bool runs_tower = true);

/// Bytes on a rank at the peak of a step.
struct MemoryBytes {
  int64_t weights = 0;
  int64_t gradients = 0;
  int64_t optimizer = 0;    ///< AdamW's two moments, and the float32 copies of bfloat16 parameters
  int64_t activations = 0;  ///< what a micro-batch's forward pass keeps for its backward pass
  int64_t buffers = 0;      ///< on top of that at the peak: the batch, and the largest temporary tensors of backward
  int64_t total() const { return weights + gradients + optimizer + activations + buffers; }
};
/// The activations of experts are estimates for uniform routing.
MemoryBytes step_memory(const Step37Config& config, const parallel::RankGrid& grid, const StepShape& shape,
                        const std::vector<TensorGroup>& tensors);

}  // namespace megatron_cpp::step37
