#include "megatron_cpp/tensor_parallel/parallel_embedding.h"

#include <utility>

#include "parallel/mappings.h"

namespace megatron_cpp {

ParallelEmbedding::ParallelEmbedding(ParallelEmbeddingOptions options, parallel::GroupPtr tp)
    : options_(std::move(options)), tp_(std::move(tp)) {}

std::vector<int64_t> ParallelEmbedding::holders(const at::Tensor& /*input_ids*/) const { return {}; }

parallel::SequenceLayout ParallelEmbedding::sequence_layout(int64_t sequence_length) const {
  return parallel::SequenceLayout::contiguous(sequence_length, sequence_parallel() ? tp_->getSize() : 1);
}

at::Tensor ParallelEmbedding::reduce(const at::Tensor& partial) const {
  const bool summand = layout() == Part::kSummand;
  if (sequence_parallel()) {
    sequence_layout(partial.size(0));  // checks
    return summand ? parallel::reduce_scatter_to_sequence_parallel_region(partial, tp_)
                   : parallel::all_to_all_hidden_to_sequence_parallel(partial, tp_);
  }
  return summand ? parallel::reduce_from_tensor_model_parallel_region(partial, tp_)
                 : parallel::gather_from_tensor_model_parallel_region(partial, tp_);
}

}  // namespace megatron_cpp
