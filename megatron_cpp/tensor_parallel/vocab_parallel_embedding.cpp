#include "megatron_cpp/tensor_parallel/vocab_parallel_embedding.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <utility>

#include "megatron_cpp/tensor_parallel/embedding_look_up.h"
#include "parallel/shard.h"

namespace megatron_cpp {
namespace {

int64_t frozen_row(const ParallelEmbeddingOptions& options, parallel::Range own) {
  return own.contains(options.padding_idx()) ? options.padding_idx() - own.begin : -1;
}

/// Looks up every row but those left out, and masks rows of other ranks' ids, so that no id is copied to the host.
at::Tensor masked_look_up(const at::Tensor& weight, const at::Tensor& input_ids, const at::Tensor& rows_left_out,
                          const ParallelEmbeddingOptions& options, parallel::Range own) {
  auto look_up = internal::plan_look_up_on_device(input_ids, rows_left_out, options.vocabulary_size(), own);
  look_up.frozen_row = frozen_row(options, own);
  const auto ids = input_ids.t();  // [S, B]
  const auto other = ids.lt(own.begin).logical_or(ids.ge(own.end));
  return internal::look_up_rows(weight, look_up, ids.size(0), ids.size(1), /*zero_others=*/true,
                                options.accumulate_into_grad())
      .masked_fill(other.unsqueeze(-1), 0);
}

}  // namespace

int64_t padded_vocabulary_size(int64_t vocabulary_size, int t, int64_t divisible_by) {
  const int64_t multiple = t * divisible_by;
  return (vocabulary_size + multiple - 1) / multiple * multiple;
}

VocabParallelEmbeddingImpl::VocabParallelEmbeddingImpl(ParallelEmbeddingOptions options, parallel::GroupPtr tp)
    : ParallelEmbedding(std::move(options), std::move(tp)) {
  const int t = this->tp()->getSize();
  const int64_t rows = padded_vocabulary_size(this->options().vocabulary_size(), t) / t;
  vocabulary_begin_ = rows * this->tp()->getRank();
  weight = register_parameter("weight", at::zeros({rows, hidden_size()}));
}

at::Tensor VocabParallelEmbeddingImpl::partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out) {
  internal::check_ids(input_ids);
  const parallel::Range own{vocabulary_begin_, vocabulary_begin_ + weight.size(0)};
  if (!input_ids.is_cpu()) return masked_look_up(weight, input_ids, rows_left_out, options(), own);
  auto look_up = internal::plan_look_up(input_ids, rows_left_out, options().vocabulary_size(), own, weight.device());
  look_up.frozen_row = frozen_row(options(), own);
  return internal::look_up_rows(weight, look_up, input_ids.size(1), input_ids.size(0), /*zero_others=*/true,
                                options().accumulate_into_grad());
}

std::vector<int64_t> VocabParallelEmbeddingImpl::holders(const at::Tensor& input_ids) const {
  internal::check_ids(input_ids);
  TORCH_CHECK_VALUE(input_ids.is_cpu(), "holders of ids on ", input_ids.device(), ": they must be on the CPU");
  const auto by_row = input_ids.t().contiguous();  // [S, B]
  const auto* id = by_row.const_data_ptr<int64_t>();
  std::vector<int64_t> ranks(static_cast<size_t>(by_row.numel()));
  for (size_t row = 0; row < ranks.size(); ++row) ranks[row] = id[row] / weight.size(0);
  return ranks;
}

std::vector<ParameterShard> VocabParallelEmbeddingImpl::own_parameters() const {
  const int64_t V = options().vocabulary_size();
  auto shard = sharded_parameter("weight", weight, {V, options().hidden_size()}, 0, vocabulary_begin_,
                                 InitialValue::normal(options().init_std()), true);
  const int64_t rows = std::clamp<int64_t>(V - vocabulary_begin_, 0, weight.size(0));
  auto& box = shard.segments.front().box;
  box.begin[0] = rows > 0 ? vocabulary_begin_ : 0;
  box.length[0] = rows;
  return {std::move(shard)};
}

}  // namespace megatron_cpp
