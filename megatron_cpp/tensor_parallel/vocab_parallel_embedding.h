// An embedding whose vocabulary is split over the tensor-parallel group.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <vector>

#include "megatron_cpp/tensor_parallel/parallel_embedding.h"
#include "parallel/group.h"

namespace megatron {

/// `vocabulary_size` rounded up to a multiple of t * divisible_by: what t ranks hold together. The only place where a
/// vocabulary is padded.
int64_t padded_vocabulary_size(int64_t vocabulary_size, int t, int64_t divisible_by = 1);

struct VocabParallelEmbeddingOptions {
  VocabParallelEmbeddingOptions(int64_t vocabulary_size, int64_t hidden_size)
      : vocabulary_size_(vocabulary_size), hidden_size_(hidden_size) {}

  TORCH_ARG(int64_t, vocabulary_size);
  TORCH_ARG(int64_t, hidden_size);
  /// The result is this rank's rows of the sequence.
  TORCH_ARG(bool, sequence_parallel) = false;
  /// Backward adds into the weight's existing gradient, touching the looked-up rows only, and gives autograd none.
  TORCH_ARG(bool, accumulate_into_grad) = false;
  TORCH_ARG(double, init_std) = 0.02;
};

/// Rank r of t holds rows [r·V'/t, (r+1)·V'/t) of the table, V' = padded_vocabulary_size(V, t). Rows of the padding are
/// zero and are never looked up. A partial is a summand [S, B, H]: rows of the rank's own ids filled, all others zero.
class VocabParallelEmbeddingImpl : public ParallelEmbedding {
 public:
  VocabParallelEmbeddingImpl(VocabParallelEmbeddingOptions options, parallel::GroupPtr tp);

  at::Tensor partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out = {}) override;

  /// The sum over the ranks.
  /// Comm: 1 all-reduce of S·B·H elements, backward none; sequence_parallel: 1 reduce-scatter, backward 1 all-gather.
  at::Tensor reduce(const at::Tensor& partial) override;

  PartialLayout layout() const override { return PartialLayout::kSummand; }
  std::vector<int64_t> finders(const at::Tensor& input_ids) const override;
  const parallel::GroupPtr& tp() const override { return tp_; }
  bool sequence_parallel() const override { return options_.sequence_parallel(); }
  int64_t hidden_size() const override { return options_.hidden_size(); }

  std::vector<ParameterShard> own_parameters() const override;

  const VocabParallelEmbeddingOptions& options() const { return options_; }

 private:
  VocabParallelEmbeddingOptions options_;
  parallel::GroupPtr tp_;
  int64_t vocabulary_begin_ = 0;
};
TORCH_MODULE(VocabParallelEmbedding);

}  // namespace megatron
