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
    elements += place_of(*shard);
  }
  if (partial == parameters_.end()) partial_begin_ = elements;
  buffer_ = at::zeros({elements}, first.parameter.options().requires_grad(false));
  zero();
}

// On a GPU the optimizer's kernel loads 16 bytes at a time where every tensor begins at a multiple of them, and element
// by element otherwise.
int64_t GradientBuffer::place_of(const ParameterShard& shard) const {
  constexpr int64_t kLoadBytes = 16;
  const int64_t multiple = std::max<int64_t>(1, kLoadBytes / static_cast<int64_t>(shard.parameter.element_size()));
  return (shard.parameter.numel() + multiple - 1) / multiple * multiple;
}

void GradientBuffer::zero() {
  buffer_.zero_();
  int64_t begin = 0;
  for (auto& shard : parameters_) {
    shard.parameter.mutable_grad() = buffer_.narrow(0, begin, shard.parameter.numel()).view(shard.parameter.sizes());
    begin += place_of(shard);
  }
}

void GradientBuffer::reduce() {
  auto whole = buffer_.narrow(0, 0, partial_begin_);
  auto partial = buffer_.narrow(0, partial_begin_, buffer_.numel() - partial_begin_);
  if (whole.numel() > 0) parallel::all_reduce_in_place(whole, dp_);
  if (partial.numel() > 0) parallel::all_reduce_in_place(partial, tp_dp_);
}

at::Tensor GradientBuffer::squared_norm() const {
  // A replicated parameter is counted by rank 0 of the group, a sharded one by everybody, each its part.
  std::vector<at::Tensor> counted;
  for (const auto& shard : parameters_) {
    const bool own = shard.rule == GradientRule::kSharded || tp_->getRank() == 0;
    if (own && shard.parameter.numel() > 0) counted.push_back(shard.parameter.grad());
  }
  auto sum = at::zeros({1}, buffer_.options().dtype(at::kDouble));
  if (!counted.empty()) {
    const auto dtype = buffer_.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const auto squares = at::stack(at::_foreach_norm(counted, 2, dtype)).to(at::kDouble).square();
    // One after the other: the last of the running sums doesn't depend on how a sum would be split.
    sum = squares.cumsum(0).narrow(0, squares.size(0) - 1, 1);
  }
  return parallel::all_reduce(sum, tp_);
}

double GradientBuffer::norm() const { return std::sqrt(squared_norm().item<double>()); }

void GradientBuffer::scale(double factor) { buffer_.mul_(factor); }

}  // namespace megatron
