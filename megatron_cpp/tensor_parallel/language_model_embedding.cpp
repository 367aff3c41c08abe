#include "megatron_cpp/tensor_parallel/language_model_embedding.h"

#include <utility>

#include "megatron_cpp/tensor_parallel/hidden_parallel_embedding.h"
#include "megatron_cpp/tensor_parallel/vocab_parallel_embedding.h"

namespace megatron_cpp {
namespace {

std::shared_ptr<ParallelEmbedding> make_word_embeddings(const ParallelEmbeddingOptions& options,
                                                        const parallel::GroupPtr& tp, EmbeddingSharding sharding) {
  if (sharding == EmbeddingSharding::kHidden) return std::make_shared<HiddenParallelEmbeddingImpl>(options, tp);
  return std::make_shared<VocabParallelEmbeddingImpl>(options, tp);
}

}  // namespace

LanguageModelEmbeddingImpl::LanguageModelEmbeddingImpl(std::shared_ptr<ParallelEmbedding> embedding)
    : word_embeddings(register_module("word_embeddings", std::move(embedding))) {}

LanguageModelEmbeddingImpl::LanguageModelEmbeddingImpl(const ParallelEmbeddingOptions& options,
                                                       const parallel::GroupPtr& tp, EmbeddingSharding sharding)
    : LanguageModelEmbeddingImpl(make_word_embeddings(options, tp, sharding)) {}

at::Tensor LanguageModelEmbeddingImpl::partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out) {
  word_embeddings->use_parameters();
  return word_embeddings->partial(input_ids, rows_left_out);
}

at::Tensor LanguageModelEmbeddingImpl::reduce(const at::Tensor& partial) { return word_embeddings->reduce(partial); }

at::Tensor LanguageModelEmbeddingImpl::finish(const at::Tensor& embeddings, const at::Tensor& /*position_ids*/) {
  return embeddings;
}

at::Tensor LanguageModelEmbeddingImpl::forward(const at::Tensor& input_ids, const at::Tensor& position_ids) {
  return finish(reduce(partial(input_ids)), position_ids);
}

}  // namespace megatron_cpp
