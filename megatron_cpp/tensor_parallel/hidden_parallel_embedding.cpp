#include "megatron_cpp/tensor_parallel/hidden_parallel_embedding.h"

#include <ATen/ATen.h>

#include <utility>

#include "megatron_cpp/tensor_parallel/embedding_look_up.h"
#include "parallel/shard.h"

namespace megatron_cpp {

HiddenParallelEmbeddingImpl::HiddenParallelEmbeddingImpl(ParallelEmbeddingOptions options, parallel::GroupPtr tp)
    : ParallelEmbedding(std::move(options), std::move(tp)) {
  const int64_t columns = parallel::even_shard_size(hidden_size(), this->tp()->getSize(), "hidden size");
  weight = register_parameter("weight", at::zeros({this->options().vocabulary_size(), columns}));
}

at::Tensor HiddenParallelEmbeddingImpl::partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out) {
  internal::check_ids(input_ids);
  const int64_t V = options().vocabulary_size();
  auto look_up = input_ids.is_cpu() ? internal::plan_look_up(input_ids, rows_left_out, V, {0, V}, weight.device())
                                    : internal::plan_look_up_on_device(input_ids, rows_left_out, V, {0, V});
  look_up.frozen_row = options().padding_idx();
  return internal::look_up_rows(weight, look_up, input_ids.size(1), input_ids.size(0), /*zero_others=*/false,
                                options().accumulate_into_grad());
}

std::vector<ParameterShard> HiddenParallelEmbeddingImpl::own_parameters() const {
  return {sharded_parameter("weight", weight, {options().vocabulary_size(), options().hidden_size()}, 1,
                            weight.size(1) * this->tp()->getRank(), InitialValue::normal(options().init_std()), true)};
}

}  // namespace megatron_cpp
