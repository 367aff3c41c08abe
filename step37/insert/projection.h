// The projector of the image insert: features [n, C] to this rank's part of embedding rows [n, H].
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "megatron_cpp/tensor_parallel/parallel_embedding.h"
#include "parallel/group.h"
#include "step37/insert/options.h"

namespace megatron_cpp::step37 {

/// Which part of a projected row a rank computes under each sharding: columns, a partial sum, or the whole row.
Part projected_part(ProjectorSharding sharding);

/// align_projector in any sharding; its parameters are "weight" and "bias" as in torch::nn::Linear.
class AlignProjector : public ParallelModule {
 public:
  /// The projector that the options ask for. Parameters start at 0; initialize_parameters sets the weight to Kaiming's
  /// normal distribution (fan in, gain sqrt(2)). Not collective.
  /// @throws c10::ValueError if H (column) or C (row) isn't divisible by t; without projector, if C != H or a bias is
  ///         asked for.
  static std::shared_ptr<AlignProjector> make(const ImageInsertEmbeddingOptions& options, parallel::GroupPtr tp);

  /// @param rows           [n, C], or [n, C/t], this rank's channels, in the row sharding; dtype and device of
  /// `weight`.
  /// @param were_gathered  LocalFeatures::were_gathered: the backward pass of the gather sums the gradient of `rows`.
  /// @return  [n, H/t] in the column sharding, else [n, H].
  /// Comm: forward none; backward in the column sharding 1 all-reduce of the gradient of `rows`, unless it isn't needed
  /// or they were gathered. Collective over tp.
  virtual at::Tensor forward(const at::Tensor& rows, bool were_gathered) = 0;

  at::Tensor weight;  ///< [H/t, C], [H, C/t] or [H, C]; undefined without projector
  at::Tensor bias;    ///< [H/t] or [H]; undefined without bias
};

}  // namespace megatron_cpp::step37
