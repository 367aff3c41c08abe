#include "megatron_cpp/tensor_parallel/hidden_parallel_embedding.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>

#include "megatron_cpp/tensor_parallel/embedding_look_up.h"
#include "parallel/mappings.h"
#include "parallel/shard.h"

namespace megatron {

HiddenParallelEmbeddingImpl::HiddenParallelEmbeddingImpl(HiddenParallelEmbeddingOptions options, parallel::GroupPtr tp)
    : options_(std::move(options)), tp_(std::move(tp)) {
  const int64_t columns = parallel::even_shard_size(options_.hidden_size(), tp_->getSize(), "hidden size");
  weight = register_parameter("weight", at::zeros({options_.vocabulary_size(), columns}));
}

at::Tensor HiddenParallelEmbeddingImpl::partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out) {
  internal::check_ids(input_ids);
  const int64_t B = input_ids.size(0);
  const int64_t S = input_ids.size(1);
  internal::LookUp look_up;
  if (input_ids.is_cpu()) {
    look_up = internal::plan_look_up(input_ids, rows_left_out, options_.vocabulary_size(),
                                     {0, options_.vocabulary_size()}, weight.device());
  } else {
    // Nothing comes back to the host: which rows are looked up doesn't depend on the ids.
    const auto ids = input_ids.t().reshape({-1});
    at::_assert_async(ids.ge(0).logical_and(ids.lt(options_.vocabulary_size())).all());
    look_up.output_rows = internal::remaining_rows(S * B, rows_left_out, ids.device());
    look_up.table_rows = ids.index_select(0, look_up.output_rows);
  }
  return internal::look_up_rows(weight, look_up, S, B, /*zero_others=*/false, options_.accumulate_into_grad());
}

at::Tensor HiddenParallelEmbeddingImpl::reduce(const at::Tensor& partial) {
  if (!options_.sequence_parallel()) return parallel::gather_from_tensor_model_parallel_region(partial, tp_);
  parallel::even_shard_size(partial.size(0), tp_->getSize(), "sequence length");
  return parallel::all_to_all_hidden_to_sequence_parallel(partial, tp_);
}

std::vector<ParameterShard> HiddenParallelEmbeddingImpl::own_parameters() const {
  return {sharded_parameter("weight", weight, {options_.vocabulary_size(), options_.hidden_size()}, 1,
                            weight.size(1) * tp_->getRank(), InitialValue::normal(options_.init_std()), true)};
}

}  // namespace megatron
