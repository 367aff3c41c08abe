// The embedding at the bottom of a language model.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "megatron_cpp/tensor_parallel/parallel_embedding.h"

namespace megatron_cpp {

/// Token ids [B, S] to [S, B, H], or this rank's rows [S/t, B, H] under sequence parallelism, in three steps, so that
/// an insert (image features) can write rows between the first two steps and share the one collective.
class LanguageModelEmbeddingImpl : public ParallelModule {
 public:
  /// A word embedding of this library.
  /// @throws c10::ValueError if `sharding` can't split these sizes over `tp`.
  LanguageModelEmbeddingImpl(const ParallelEmbeddingOptions& options, const parallel::GroupPtr& tp,
                             EmbeddingSharding sharding = EmbeddingSharding::kVocab);
  /// A word embedding of the caller's own.
  explicit LanguageModelEmbeddingImpl(std::shared_ptr<ParallelEmbedding> word_embeddings);

  /// Looks up this rank's part of the table; see ParallelEmbedding::partial.
  at::Tensor partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out = {});
  /// The embeddings that this rank owns; see ParallelEmbedding::reduce. Collective over tp.
  at::Tensor reduce(const at::Tensor& partial);
  /// The place for learned positions and dropout, after the sum. Step3.7 has neither: returns `embeddings`.
  /// @param position_ids  [B, S] int64 or undefined; not read.
  at::Tensor finish(const at::Tensor& embeddings, const at::Tensor& position_ids);

  /// The three steps in a row. Collective over tp.
  at::Tensor forward(const at::Tensor& input_ids, const at::Tensor& position_ids = {});

  std::vector<ParameterShard> own_parameters() const override { return {}; }

  /// The layout of partial().
  Part layout() const { return word_embeddings->layout(); }
  /// The group of the word embedding.
  const parallel::GroupPtr& tp() const { return word_embeddings->tp(); }
  /// Whether reduce() gives a rank its rows of the sequence only.
  bool sequence_parallel() const { return word_embeddings->sequence_parallel(); }
  int64_t hidden_size() const { return word_embeddings->hidden_size(); }  ///< H

  std::shared_ptr<ParallelEmbedding> word_embeddings;  ///< this library's, or the caller's own
};
TORCH_MODULE(LanguageModelEmbedding);

}  // namespace megatron_cpp
