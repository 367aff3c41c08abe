#include "megatron_cpp/optimizer/gradient_buffer.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <set>

#include "parallel/collectives.h"

namespace megatron_cpp {
namespace {

// On a GPU the optimizer's kernel loads 16 bytes at a time if every tensor begins at a multiple of 16 bytes, and
// element by element otherwise.
int64_t padded_numel(const at::Tensor& parameter, at::ScalarType dtype) {
  constexpr int64_t kLoadBytes = 16;
  const int64_t multiple = std::max<int64_t>(1, kLoadBytes / static_cast<int64_t>(c10::elementSize(dtype)));
  return (parameter.numel() + multiple - 1) / multiple * multiple;
}

int64_t num_blocks(const at::Tensor& gradient) { return (gradient.numel() + kNormBlock - 1) / kNormBlock; }

/// Eight sums side by side, so that the compiler can use vector instructions, added in a fixed order.
template <class Element>
double sum_of_squares(const Element* values, int64_t count) {
  constexpr int64_t kLanes = 8;
  std::array<double, kLanes> sums{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const auto value = static_cast<double>(values[i + lane]);
      sums[static_cast<size_t>(lane)] += value * value;
    }
  }
  double sum = 0.0;
  for (const double lane : sums) sum += lane;
  for (; i < count; ++i) sum += static_cast<double>(values[i]) * static_cast<double>(values[i]);
  return sum;
}

}  // namespace

at::Tensor squares_of_blocks(const std::vector<at::Tensor>& gradients) {
  TORCH_INTERNAL_ASSERT(!gradients.empty());
  if (!gradients.front().is_cpu()) return internal::squares_of_blocks_by_operators(gradients);
  std::vector<int64_t> first_block{0};
  for (const auto& gradient : gradients) first_block.push_back(first_block.back() + num_blocks(gradient));
  auto sums = at::empty({first_block.back()}, at::kDouble);
  auto* sum = sums.mutable_data_ptr<double>();
  for (size_t i = 0; i < gradients.size(); ++i) {
    const int64_t numel = gradients[i].numel();
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, gradients[i].scalar_type(), "squares_of_blocks", [&] {
      const auto* values = gradients[i].const_data_ptr<scalar_t>();
      at::parallel_for(0, num_blocks(gradients[i]), 1, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          const int64_t first = block * kNormBlock;
          sum[first_block[i] + block] = sum_of_squares(values + first, std::min(kNormBlock, numel - first));
        }
      });
    });
  }
  return sums;
}

at::Tensor internal::squares_of_blocks_by_operators(const std::vector<at::Tensor>& gradients) {
  // One kernel for the whole blocks of each tensor, and one for the remainders of all tensors.
  std::vector<at::Tensor> remainders;
  for (const auto& gradient : gradients) {
    const int64_t length = gradient.numel() % kNormBlock;
    if (length > 0) remainders.push_back(gradient.view(-1).narrow(0, gradient.numel() - length, length));
  }
  std::vector<at::Tensor> norms_of_remainders;
  if (!remainders.empty()) norms_of_remainders = at::_foreach_norm(remainders, 2, at::kDouble);
  auto remainder = norms_of_remainders.begin();
  std::vector<at::Tensor> norms;
  for (const auto& gradient : gradients) {
    const int64_t whole = gradient.numel() / kNormBlock;
    if (whole > 0) {
      const auto blocks = gradient.view(-1).narrow(0, 0, whole * kNormBlock).view({whole, kNormBlock});
      norms.push_back(at::linalg_vector_norm(blocks, 2, 1, /*keepdim=*/false, at::kDouble));
    }
    if (gradient.numel() % kNormBlock > 0) norms.push_back((remainder++)->view({1}));
  }
  if (norms.empty()) return at::empty({0}, gradients.front().options().dtype(at::kDouble));
  return at::cat(norms).square_();
}

GradientBuffer::Bucket& GradientBuffer::bucket_of(const ParameterShard& shard, at::ScalarType dtype) {
  const auto& group = groups_.of(shard.domain.summed_over);
  for (auto& bucket : buckets_) {
    if (bucket.dtype == dtype && bucket.group == group) return bucket;
  }
  return buckets_.emplace_back(Bucket{dtype, group, {}});
}

GradientBuffer::GradientBuffer(const std::vector<ParameterShard>& parameters, const parallel::ProcessGroups& groups,
                               const GradientBufferOptions& options)
    : groups_(groups) {
  std::vector<std::vector<ParameterShard>> by_bucket;
  for (const auto& shard : parameters) {
    if (!shard.parameter.requires_grad()) continue;
    const auto& first = by_bucket.empty() ? shard : by_bucket.front().front();
    TORCH_CHECK_VALUE(shard.parameter.device() == first.parameter.device(), "parameter ", shard.name, " is on ",
                      shard.parameter.device(), ", ", first.name, " on ", first.parameter.device(),
                      ": gradients are kept on one device");
    const auto over = shard.domain.sharded_over;
    const bool is_known = over == GradientDomain::kSharded.sharded_over || over == GradientDomain::kExpert.sharded_over;
    TORCH_CHECK_VALUE(over.empty() || is_known, "parameter ", shard.name, " is sharded over \"", over,
                      "\": the gradient norm knows sharding over tp and etp_ep only");
    if (is_known) groups.of(over);  // checks that it was made
    const auto dtype = c10::isReducedFloatingType(shard.parameter.scalar_type()) ? options.low_precision_gradients
                                                                                 : shard.parameter.scalar_type();
    auto& bucket = bucket_of(shard, dtype);
    bucket.numel += padded_numel(shard.parameter, dtype);
    by_bucket.resize(buckets_.size());
    by_bucket[static_cast<size_t>(&bucket - buckets_.data())].push_back(shard);
  }
  TORCH_CHECK_VALUE(!buckets_.empty(), "every parameter is frozen: there is nothing to train");
  for (size_t number = 0; number < buckets_.size(); ++number) {
    auto& bucket = buckets_[number];
    bucket.gradients =
        at::zeros({bucket.numel}, at::TensorOptions(by_bucket[number].front().parameter.device()).dtype(bucket.dtype));
    int64_t begin = 0;
    for (const auto& shard : by_bucket[number]) {
      const auto& parameter = shard.parameter;
      views_.push_back(bucket.gradients.narrow(0, begin, parameter.numel()).view(parameter.sizes()));
      parameter.set_grad_dtype(bucket.dtype);
      parameters_.push_back(shard);
      begin += padded_numel(parameter, bucket.dtype);
    }
  }
  zero();
}

void GradientBuffer::zero() {
  for (auto& bucket : buckets_) bucket.gradients.zero_();
  for (size_t i = 0; i < parameters_.size(); ++i) parameters_[i].parameter.mutable_grad() = views_[i];
}

void GradientBuffer::reduce() {
  for (auto& bucket : buckets_) {
    if (bucket.numel > 0) parallel::all_reduce_in_place(bucket.gradients, bucket.group);
  }
}

at::Tensor GradientBuffer::own_squares(std::string_view sharded_over, bool with_replicated) const {
  std::vector<at::Tensor> counted;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const auto& over = parameters_[i].domain.sharded_over;
    const bool is_counted = over.empty() ? with_replicated : over == sharded_over;
    if (is_counted && views_[i].numel() > 0) counted.push_back(views_[i]);
  }
  if (counted.empty()) return at::zeros({1}, views_.front().options().dtype(at::kDouble));
  // cumsum adds one after the other, so the result doesn't depend on how a parallel sum would be split.
  const auto sums = squares_of_blocks(counted).cumsum(0);
  return sums.narrow(0, sums.size(0) - 1, 1);
}

at::Tensor GradientBuffer::squared_norm() const {
  // Rank 0 of tp counts replicated parameters; every rank counts its part of the sharded ones.
  auto sum = parallel::all_reduce(own_squares("tp", groups_.tp->getRank() == 0), groups_.tp);
  std::set<std::string_view> others;
  for (const auto& shard : parameters_) others.insert(shard.domain.sharded_over);
  for (const auto over : others) {
    if (over.empty() || over == "tp") continue;
    sum = sum + parallel::all_reduce(own_squares(over, /*with_replicated=*/false), groups_.of(over));
  }
  return sum;
}

double GradientBuffer::norm() const { return std::sqrt(squared_norm().item<double>()); }

void GradientBuffer::scale(double factor) {
  for (auto& bucket : buckets_) bucket.gradients.mul_(factor);
}

double GradientBuffer::clip_grad_norm(double max_norm) {
  const double before = norm();
  if (before > max_norm) scale(max_norm / before);
  return before;
}

}  // namespace megatron_cpp
