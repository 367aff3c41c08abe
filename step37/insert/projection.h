// The projector of the image insert: features [n, C] to what a rank makes of embedding rows [n, H].
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "megatron_cpp/tensor_parallel/parallel_embedding.h"
#include "parallel/group.h"
#include "step37/insert/options.h"

namespace megatron_cpp::step37 {

/// What a rank makes of a projected row, under each sharding: columns, a summand, or the whole row.
Part projected_part(ProjectorSharding sharding);

/// align_projector, in whichever sharding; its parameters are "weight" and "bias" as in torch::nn::Linear.
class AlignProjector : public ParallelModule {
 public:
  /// The projector that the options ask for. Parameters start at 0; initialize_parameters gives them Kaiming's normal
  /// distribution (fan in, gain sqrt(2)). Not collective.
  /// @throws c10::ValueError if H (column) or C (row) isn't divisible by t, or C isn't H where there is no projector.
  static std::shared_ptr<AlignProjector> make(const ImageInsertEmbeddingOptions& options, parallel::GroupPtr tp);

  /// @param rows          [n, C], or in the row sharding this rank's channels [n, C/t]; dtype and device of the weight.
  /// @param were_gathered  the rows were brought from single ranks, and their gradients are summed on the way back.
  /// @return  [n, H/t] of the column sharding, else [n, H].
  /// Comm: forward none; backward of the column sharding 1 all-reduce of the rows' gradient, unless they were gathered
  /// or need none. Collective over tp.
  virtual at::Tensor forward(const at::Tensor& rows, bool were_gathered) = 0;

  at::Tensor weight;  ///< [H/t, C], [H, C/t] or [H, C]; undefined without projector
  at::Tensor bias;    ///< [H/t] or [H]; undefined without bias
};

}  // namespace megatron_cpp::step37
