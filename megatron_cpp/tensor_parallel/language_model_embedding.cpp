#include "megatron_cpp/tensor_parallel/language_model_embedding.h"

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>

namespace megatron {

LanguageModelEmbeddingImpl::LanguageModelEmbeddingImpl(std::shared_ptr<ParallelEmbedding> embedding)
    : word_embeddings(register_module("word_embeddings", std::move(embedding))) {}

LanguageModelEmbeddingImpl::LanguageModelEmbeddingImpl(const VocabParallelEmbeddingOptions& options,
                                                       const parallel::GroupPtr& tp)
    : LanguageModelEmbeddingImpl(std::make_shared<VocabParallelEmbeddingImpl>(options, tp)) {}

LanguageModelEmbeddingImpl::LanguageModelEmbeddingImpl(const HiddenParallelEmbeddingOptions& options,
                                                       const parallel::GroupPtr& tp)
    : LanguageModelEmbeddingImpl(std::make_shared<HiddenParallelEmbeddingImpl>(options, tp)) {}

at::Tensor LanguageModelEmbeddingImpl::partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out) {
  return word_embeddings->partial(input_ids, rows_left_out);
}

at::Tensor LanguageModelEmbeddingImpl::reduce(const at::Tensor& partial) { return word_embeddings->reduce(partial); }

at::Tensor LanguageModelEmbeddingImpl::finish(const at::Tensor& embeddings, const at::Tensor& /*position_ids*/) {
  return embeddings;
}

at::Tensor LanguageModelEmbeddingImpl::forward(const at::Tensor& input_ids, const at::Tensor& position_ids) {
  return finish(reduce(partial(input_ids)), position_ids);
}

}  // namespace megatron
