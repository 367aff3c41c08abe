// An embedding whose vocabulary is split over the tensor-parallel group.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <vector>

#include "megatron_cpp/tensor_parallel/parallel_embedding.h"
#include "parallel/group.h"

namespace megatron_cpp {

/// `vocabulary_size` rounded up to a multiple of t * divisible_by: what t ranks hold together. The only place where a
/// vocabulary is padded.
int64_t padded_vocabulary_size(int64_t vocabulary_size, int t, int64_t divisible_by = 1);

/// Rank r of t holds rows [r·V'/t, (r+1)·V'/t) of the table, V' = padded_vocabulary_size(V, t). Rows of the padding are
/// zero and are never looked up. A partial is a summand [S, B, H]: rows of the rank's own ids filled, all others zero.
class VocabParallelEmbeddingImpl : public ParallelEmbedding {
 public:
  /// Weights start at 0: load them, or call initialize_parameters.
  VocabParallelEmbeddingImpl(ParallelEmbeddingOptions options, parallel::GroupPtr tp);

  at::Tensor partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out = {}) override;

  /// kSummand.
  Part layout() const override { return Part::kSummand; }
  std::vector<int64_t> holders(const at::Tensor& input_ids) const override;

  std::vector<ParameterShard> own_parameters() const override;

 private:
  int64_t vocabulary_begin_ = 0;
};
TORCH_MODULE(VocabParallelEmbedding);

}  // namespace megatron_cpp
