// An embedding whose hidden dimension is split over the tensor-parallel group.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <vector>

#include "megatron_cpp/tensor_parallel/parallel_embedding.h"
#include "parallel/group.h"

namespace megatron_cpp {

/// Rank r of t holds columns [r·H/t, (r+1)·H/t) of the table, for every id; the vocabulary is not padded. A partial is
/// these columns of the embedding, [S, B, H/t]. Under sequence parallelism no rank ever has [S, B, H], and a rank sends
/// 1/t of what it sends with the vocabulary-parallel embedding. For models whose output layer doesn't share the
/// embedding's weight.
class HiddenParallelEmbeddingImpl : public ParallelEmbedding {
 public:
  /// @throws c10::ValueError if H is not divisible by t.
  HiddenParallelEmbeddingImpl(ParallelEmbeddingOptions options, parallel::GroupPtr tp);

  at::Tensor partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out = {}) override;

  /// kColumns.
  Part layout() const override { return Part::kColumns; }

  std::vector<ParameterShard> own_parameters() const override;
};
TORCH_MODULE(HiddenParallelEmbedding);

}  // namespace megatron_cpp
