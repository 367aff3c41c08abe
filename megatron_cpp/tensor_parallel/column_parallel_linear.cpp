#include "megatron_cpp/tensor_parallel/column_parallel_linear.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <utility>

#include "megatron_cpp/tensor_parallel/linear_function.h"
#include "megatron_cpp/tensor_parallel/vocab_parallel_embedding.h"
#include "parallel/mappings.h"
#include "parallel/shard.h"

namespace megatron_cpp {
namespace {

int64_t total_features(const std::vector<OutputPart>& parts) {
  int64_t total = 0;
  for (const auto& part : parts) total += part.out_features;
  return total;
}

/// The rows of F that rank r of t holds, when F rounded up to a multiple of t is split evenly.
parallel::Range rows_of(int64_t out_features, int t, int r) {
  const int64_t rows = padded_vocabulary_size(out_features, t) / t;
  return {std::min(rows * r, out_features), std::min(rows * (r + 1), out_features)};
}

}  // namespace

ColumnParallelLinearOptions::ColumnParallelLinearOptions(int64_t in_features, std::vector<OutputPart> parts)
    : in_features_(in_features), out_features_(total_features(parts)), parts_(std::move(parts)) {}

ColumnParallelLinearImpl::ColumnParallelLinearImpl(ColumnParallelLinearOptions options, parallel::GroupPtr tp)
    : options_(std::move(options)), tp_(std::move(tp)) {
  const int t = tp_->getSize();
  for (const auto& part : options_.parts())
    parallel::even_shard_size(part.out_features, t, part.name + " out_features");
  TORCH_CHECK_VALUE(!options_.pad_out_features() || options_.parts().empty(),
                    "pad_out_features of a fused weight: parts are not padded");
  const int64_t rows = options_.pad_out_features()
                           ? padded_vocabulary_size(options_.out_features(), t) / t
                           : parallel::even_shard_size(options_.out_features(), t, "out_features");
  TORCH_CHECK_VALUE(!options_.gather_output() || options_.parts().empty(),
                    "gather_output of a fused weight would mix its parts");
  weight = register_parameter("weight", at::zeros({rows, options_.in_features()}));
  bias = register_parameter("bias", options_.bias() ? at::zeros({rows}) : at::Tensor(), options_.bias());
}

at::Tensor ColumnParallelLinearImpl::forward(const at::Tensor& input) {
  use_parameters();
  const auto kind =
      options_.sequence_parallel() ? internal::LinearInput::kSequenceParallel : internal::LinearInput::kReplicated;
  auto output = internal::linear_with_communication(input, weight, bias, kind, options_.accumulate_into_grad(), tp_);
  return options_.gather_output() ? parallel::gather_from_tensor_model_parallel_region(output, tp_) : output;
}

std::vector<ParameterShard> ColumnParallelLinearImpl::own_parameters() const {
  const int t = tp_->getSize();
  const int r = tp_->getRank();
  auto parts = options_.parts();
  if (parts.empty()) parts.push_back({"", options_.out_features()});
  const auto shard = [&](const std::string& name, const at::Tensor& parameter, InitialValue initial_value,
                         bool weight_decay) {
    ParameterShard result{name, parameter, GradientDomain::kSharded, {}, initial_value, weight_decay};
    int64_t local_begin = 0;
    for (const auto& part : parts) {
      const auto range = rows_of(part.out_features, t, r);
      auto shape = parameter.sizes().vec();
      shape[0] = part.out_features;
      result.segments.push_back(ParameterSegment::rows(part.name.empty() ? name : part.name + "." + name,
                                                       std::move(shape), 0, range.begin, local_begin, range.length()));
      local_begin += range.length();
    }
    return result;
  };
  std::vector<ParameterShard> result{shard("weight", weight, InitialValue::normal(options_.init_std()), true)};
  if (options_.bias()) result.push_back(shard("bias", bias, InitialValue::constant(0.0), false));
  return result;
}

}  // namespace megatron_cpp
