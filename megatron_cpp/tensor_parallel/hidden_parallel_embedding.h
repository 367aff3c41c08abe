// An embedding whose hidden dimension is split over the tensor-parallel group.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <vector>

#include "megatron_cpp/tensor_parallel/parallel_embedding.h"
#include "parallel/group.h"

namespace megatron {

struct HiddenParallelEmbeddingOptions {
  HiddenParallelEmbeddingOptions(int64_t vocabulary_size, int64_t hidden_size)
      : vocabulary_size_(vocabulary_size), hidden_size_(hidden_size) {}

  TORCH_ARG(int64_t, vocabulary_size);
  TORCH_ARG(int64_t, hidden_size);
  /// The result is this rank's rows of the sequence.
  TORCH_ARG(bool, sequence_parallel) = false;
  /// Backward adds into the weight's existing gradient, touching the looked-up rows only, and gives autograd none.
  TORCH_ARG(bool, accumulate_into_grad) = false;
  TORCH_ARG(double, init_std) = 0.02;
};

/// Rank r of t holds columns [r·H/t, (r+1)·H/t) of the table, for every id; the vocabulary is not padded. A partial is
/// these columns of the embedding, [S, B, H/t]. Under sequence parallelism no rank ever has [S, B, H], and what is sent
/// is 1/t of the vocabulary-parallel embedding's. For models whose output layer has a weight of its own.
class HiddenParallelEmbeddingImpl : public ParallelEmbedding {
 public:
  /// @throws c10::ValueError if H is not divisible by t.
  HiddenParallelEmbeddingImpl(HiddenParallelEmbeddingOptions options, parallel::GroupPtr tp);

  at::Tensor partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out = {}) override;

  /// The ranks' columns side by side.
  /// Comm: 1 all-gather of S·B·H elements, backward none; sequence_parallel: 1 all-to-all of S·B·H/t elements a rank,
  /// and backward the same.
  at::Tensor reduce(const at::Tensor& partial) override;

  PartialLayout layout() const override { return PartialLayout::kColumns; }
  std::vector<int64_t> finders(const at::Tensor& /*input_ids*/) const override { return {}; }
  const parallel::GroupPtr& tp() const override { return tp_; }
  bool sequence_parallel() const override { return options_.sequence_parallel(); }
  int64_t hidden_size() const override { return options_.hidden_size(); }

  std::vector<ParameterShard> own_parameters() const override;

  const HiddenParallelEmbeddingOptions& options() const { return options_; }

 private:
  HiddenParallelEmbeddingOptions options_;
  parallel::GroupPtr tp_;
};
TORCH_MODULE(HiddenParallelEmbedding);

}  // namespace megatron
