// An embedding whose vocabulary is split over the tensor-parallel group.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <vector>

#include "megatron_cpp/tensor_parallel/parameter_shard.h"
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

/// Rank r of t holds rows [r·V'/t, (r+1)·V'/t) of the weight, V' = padded_vocabulary_size(V, t). Rows of the padding
/// are zero and are never looked up.
class VocabParallelEmbeddingImpl : public ParallelModule {
 public:
  VocabParallelEmbeddingImpl(VocabParallelEmbeddingOptions options, parallel::GroupPtr tp);

  /// The first step: this rank's summand of the embedding, rows of its own ids filled and all others zero.
  /// @param input_ids      [B, S] int64, equal on every rank. On the CPU they are checked; on a GPU an id outside [0,
  /// V)
  ///                       trips an asynchronous device assertion.
  /// @param rows_left_out  [n] int64 on the CPU, flat numbers s*B + b of rows that stay zero and get no gradient
  /// (somebody
  ///                       else fills them); undefined: none.
  /// @return               [S, B, H], a tensor of its own that the caller may write to. Its backward ignores the
  ///                       gradient of rows left out.
  /// No communication. Throws c10::ValueError, on every rank alike, naming an id outside [0, V) and its place, or a row
  /// to leave out that isn't there.
  at::Tensor partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out = {});

  /// The second step: the sum over the ranks, [S, B, H]; with sequence_parallel this rank's rows of it, [S/t, B, H].
  /// Comm: 1 all-reduce of S·B·H elements, backward none; sequence_parallel: 1 reduce-scatter, backward 1 all-gather.
  /// Collective over tp. Throws c10::ValueError if S % t != 0 with sequence_parallel.
  at::Tensor reduce(const at::Tensor& partial);

  /// reduce(partial(input_ids)).
  at::Tensor forward(const at::Tensor& input_ids);

  std::vector<ParameterShard> own_parameters() const override;

  const VocabParallelEmbeddingOptions& options() const { return options_; }
  const parallel::GroupPtr& tp() const { return tp_; }

  at::Tensor weight;  ///< [V'/t, H]

 private:
  VocabParallelEmbeddingOptions options_;
  parallel::GroupPtr tp_;
  int64_t vocabulary_begin_ = 0;
};
TORCH_MODULE(VocabParallelEmbedding);

}  // namespace megatron
