#include "megatron_cpp/optimizer/gradient_buffer.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "parallel/collectives.h"

namespace megatron {

GradientBuffer::GradientBuffer(const std::vector<ParameterShard>& parameters, parallel::GroupPtr tp,
                               parallel::GroupPtr dp, parallel::GroupPtr tp_dp)
    : tp_(std::move(tp)), dp_(std::move(dp)), tp_dp_(std::move(tp_dp)) {
  for (const auto& shard : parameters) {
    if (shard.parameter.requires_grad()) parameters_.push_back(shard);
  }
  TORCH_CHECK_VALUE(!parameters_.empty(), "every parameter is frozen: there is nothing to train");
  const auto is_whole = [](const ParameterShard& shard) { return shard.rule != GradientRule::kReplicatedPartial; };
  const auto partial = std::stable_partition(parameters_.begin(), parameters_.end(), is_whole);
  const auto& first = parameters_.front();
  int64_t elements = 0;
  for (auto shard = parameters_.begin(); shard != parameters_.end(); ++shard) {
    if (shard == partial) partial_begin_ = elements;
    TORCH_CHECK_VALUE(shard->parameter.scalar_type() == first.parameter.scalar_type() &&
                          shard->parameter.device() == first.parameter.device(),
                      "parameter ", shard->name, " is ", shard->parameter.toString(), " on ", shard->parameter.device(),
                      ", ", first.name, " is ", first.parameter.toString(), " on ", first.parameter.device(),
                      ": one gradient buffer takes one dtype and device");
    elements += shard->parameter.numel();
  }
  if (partial == parameters_.end()) partial_begin_ = elements;
  buffer_ = at::zeros({elements}, first.parameter.options().requires_grad(false));
  zero();
}

void GradientBuffer::zero() {
  buffer_.zero_();
  int64_t begin = 0;
  for (auto& shard : parameters_) {
    const int64_t elements = shard.parameter.numel();
    shard.parameter.mutable_grad() = buffer_.narrow(0, begin, elements).view(shard.parameter.sizes());
    begin += elements;
  }
}

void GradientBuffer::reduce() {
  auto whole = buffer_.narrow(0, 0, partial_begin_);
  auto partial = buffer_.narrow(0, partial_begin_, buffer_.numel() - partial_begin_);
  if (whole.numel() > 0) parallel::all_reduce_in_place(whole, dp_);
  if (partial.numel() > 0) parallel::all_reduce_in_place(partial, tp_dp_);
}

double GradientBuffer::norm() const {
  // A replicated parameter is counted by rank 0 of the group, a sharded one by everybody, each its part.
  auto sum = at::zeros({1}, buffer_.options().dtype(at::kDouble));
  const auto dtype = buffer_.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  for (const auto& shard : parameters_) {
    if (shard.rule != GradientRule::kSharded && tp_->getRank() != 0) continue;
    const auto norm = at::linalg_vector_norm(shard.parameter.grad(), 2, std::nullopt, false, dtype).to(at::kDouble);
    sum.add_(norm * norm);
  }
  return std::sqrt(parallel::all_reduce(sum, tp_).item<double>());
}

void GradientBuffer::scale(double factor) { buffer_.mul_(factor); }

}  // namespace megatron
