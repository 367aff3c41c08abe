#include "megatron_cpp/tensor_parallel/vocab_parallel_embedding.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <span>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>

#include "megatron_cpp/tensor_parallel/embedding_look_up.h"
#include "megatron_cpp/tensor_parallel/rows.h"
#include "parallel/mappings.h"
#include "parallel/shard.h"

namespace megatron {
namespace {

/// For ids on a GPU: every row is looked up, and those that aren't this rank's are masked, so that nothing has to come
/// back to the host.
at::Tensor masked_look_up(const at::Tensor& weight, const at::Tensor& input_ids, const at::Tensor& rows_left_out,
                          int64_t vocabulary_size, int64_t vocabulary_begin) {
  const auto ids = input_ids.t().contiguous();  // [S, B]
  at::_assert_async(ids.ge(0).logical_and(ids.lt(vocabulary_size)).all());
  const auto local = ids - vocabulary_begin;
  auto other = local.lt(0).logical_or(local.ge(weight.size(0)));
  if (rows_left_out.defined()) {
    const auto rows = rows_left_out.contiguous();
    const std::span<const int64_t> list(rows.const_data_ptr<int64_t>(), static_cast<size_t>(rows.numel()));
    other.view(-1).index_fill_(0, internal::index_tensors({list}, ids.device())[0], true);
  }
  const auto looked_up = at::embedding(weight, local.masked_fill(other, 0));
  return looked_up.masked_fill(other.unsqueeze(-1), 0);
}

}  // namespace

int64_t padded_vocabulary_size(int64_t vocabulary_size, int t, int64_t divisible_by) {
  const int64_t multiple = t * divisible_by;
  return (vocabulary_size + multiple - 1) / multiple * multiple;
}

VocabParallelEmbeddingImpl::VocabParallelEmbeddingImpl(VocabParallelEmbeddingOptions options, parallel::GroupPtr tp)
    : options_(std::move(options)), tp_(std::move(tp)) {
  const int t = tp_->getSize();
  const int64_t rows = padded_vocabulary_size(options_.vocabulary_size(), t) / t;
  vocabulary_begin_ = rows * tp_->getRank();
  weight = register_parameter("weight", at::zeros({rows, options_.hidden_size()}));
}

at::Tensor VocabParallelEmbeddingImpl::partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out) {
  internal::check_ids(input_ids);
  if (!input_ids.is_cpu()) {
    return masked_look_up(weight, input_ids, rows_left_out, options_.vocabulary_size(), vocabulary_begin_);
  }
  const auto look_up = internal::plan_look_up(input_ids, rows_left_out, options_.vocabulary_size(),
                                              {vocabulary_begin_, vocabulary_begin_ + weight.size(0)}, weight.device());
  return internal::look_up_rows(weight, look_up, input_ids.size(1), input_ids.size(0), /*zero_others=*/true,
                                options_.accumulate_into_grad());
}

at::Tensor VocabParallelEmbeddingImpl::reduce(const at::Tensor& partial) {
  if (!options_.sequence_parallel()) return parallel::reduce_from_tensor_model_parallel_region(partial, tp_);
  parallel::even_shard_size(partial.size(0), tp_->getSize(), "sequence length");
  return parallel::reduce_scatter_to_sequence_parallel_region(partial, tp_);
}

std::vector<int64_t> VocabParallelEmbeddingImpl::finders(const at::Tensor& input_ids) const {
  internal::check_ids(input_ids);
  TORCH_CHECK_VALUE(input_ids.is_cpu(), "finders of ids on ", input_ids.device(), ": they must be on the CPU");
  const auto by_row = input_ids.t().contiguous();  // [S, B]
  const auto* id = by_row.const_data_ptr<int64_t>();
  std::vector<int64_t> ranks(static_cast<size_t>(by_row.numel()));
  for (size_t row = 0; row < ranks.size(); ++row) ranks[row] = id[row] / weight.size(0);
  return ranks;
}

std::vector<ParameterShard> VocabParallelEmbeddingImpl::own_parameters() const {
  const int64_t V = options_.vocabulary_size();
  auto shard = sharded_parameter("weight", weight, {V, options_.hidden_size()}, 0, vocabulary_begin_,
                                 InitialValue::normal(options_.init_std()), true);
  auto& segment = shard.segments.front();
  segment.global_begin = std::min(vocabulary_begin_, V);
  segment.length = std::clamp<int64_t>(V - vocabulary_begin_, 0, weight.size(0));
  return {std::move(shard)};
}

}  // namespace megatron
