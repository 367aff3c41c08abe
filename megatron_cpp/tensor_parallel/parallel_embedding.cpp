#include "megatron_cpp/tensor_parallel/parallel_embedding.h"

#include <utility>

#include "parallel/mappings.h"
#include "parallel/shard.h"

namespace megatron {

ParallelEmbedding::ParallelEmbedding(ParallelEmbeddingOptions options, parallel::GroupPtr tp)
    : options_(std::move(options)), tp_(std::move(tp)) {}

std::vector<int64_t> ParallelEmbedding::finders(const at::Tensor& /*input_ids*/) const { return {}; }

at::Tensor ParallelEmbedding::reduce(const at::Tensor& partial) const {
  const bool summand = layout() == Part::kSummand;
  if (sequence_parallel()) {
    parallel::even_shard_size(partial.size(0), tp_->getSize(), "sequence length");
    return summand ? parallel::reduce_scatter_to_sequence_parallel_region(partial, tp_)
                   : parallel::all_to_all_hidden_to_sequence_parallel(partial, tp_);
  }
  return summand ? parallel::reduce_from_tensor_model_parallel_region(partial, tp_)
                 : parallel::gather_from_tensor_model_parallel_region(partial, tp_);
}

}  // namespace megatron
