// A word embedding with its own sharding: id v is in row v / t of the table of rank v % t. This spreads frequent ids,
// which tokenizers number first, evenly over the ranks.
#pragma once

#include <ATen/ATen.h>
#include <torch/nn/modules/embedding.h>

#include <cstdint>
#include <vector>

#include "megatron_cpp/tensor_parallel/parallel_embedding.h"

/// Each rank's table is an ordinary torch::nn::Embedding, on any device; ids are on the CPU.
class RoundRobinEmbedding : public megatron_cpp::ParallelEmbedding {
 public:
  RoundRobinEmbedding(const megatron_cpp::ParallelEmbeddingOptions& options,
                      const megatron_cpp::parallel::GroupPtr& group)
      : ParallelEmbedding(options, group), t_(group->getSize()), rank_(group->getRank()) {
    const int64_t rows = (options.vocabulary_size() - rank_ + t_ - 1) / t_;
    table_ = register_module("table", torch::nn::Embedding(rows, options.hidden_size()));
    weight = table_->weight;
  }

  /// Each row of the result comes from the one rank that has its id; the other ranks contribute zeros to the sum.
  megatron_cpp::Part layout() const override { return megatron_cpp::Part::kSummand; }

  at::Tensor partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out = {}) override {
    const auto ids = input_ids.t().reshape({-1});  // [S*B]: the id of flat row s*B + b
    check_range("id", ids, options().vocabulary_size());
    auto own = ids.remainder(t_).eq(rank_);
    if (rows_left_out.defined()) {
      check_range("row to leave out", rows_left_out, ids.numel());
      own.index_fill_(0, rows_left_out, false);
    }
    const auto rows = own.nonzero().squeeze(1);
    const auto found = table_->forward(ids.index_select(0, rows).div(t_, "floor").to(weight.device()));
    return at::zeros({ids.numel(), hidden_size()}, found.options())
        .index_copy(0, rows.to(weight.device()), found)
        .view({input_ids.size(1), input_ids.size(0), hidden_size()});
  }

  std::vector<int64_t> holders(const at::Tensor& input_ids) const override {
    const auto ranks = input_ids.t().remainder(t_).contiguous();
    return {ranks.const_data_ptr<int64_t>(), ranks.const_data_ptr<int64_t>() + ranks.numel()};
  }

  /// Row i of this rank's table is row i*t + rank of the global table.
  std::vector<megatron_cpp::ParameterShard> own_parameters() const override {
    megatron_cpp::ParameterShard shard{.name = "table.weight",
                                       .parameter = weight,
                                       .domain = megatron_cpp::GradientDomain::kSharded,
                                       .segments = {},
                                       .initial_value = megatron_cpp::InitialValue::normal(options().init_std())};
    for (int64_t i = 0; i < weight.size(0); ++i) {
      shard.segments.push_back(megatron_cpp::ParameterSegment::rows(
          "weight", {options().vocabulary_size(), hidden_size()}, 0, i * t_ + rank_, i, 1));
    }
    return {shard};
  }

 private:
  static void check_range(const char* what, const at::Tensor& numbers, int64_t end) {
    const auto wrong = numbers.masked_select(numbers.lt(0).logical_or(numbers.ge(end)));
    TORCH_CHECK_VALUE(wrong.numel() == 0, what, " ", wrong[0].item<int64_t>(), " is not in [0, ", end, ")");
  }

  int64_t t_, rank_;
  torch::nn::Embedding table_{nullptr};
};
