#include "megatron_cpp/optimizer/gradient_buffer.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <exception>
#include <functional>
#include <map>
#include <utility>

#include "parallel/collectives.h"

namespace megatron_cpp {
namespace {

/// How a parameter's squares are counted: added up over the ranks that hold its parts, or once.
enum NormClass : int64_t { kOverTp, kOverExperts, kOnce, kNumNormClasses };

NormClass norm_class(const ParameterShard& shard) {
  if (shard.domain.sharded_over.empty()) return kOnce;
  return shard.domain.sharded_over == GradientDomain::kExpert.sharded_over ? kOverExperts : kOverTp;
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

void GradientBufferOptions::validate() const {
  TORCH_CHECK_VALUE(bucket_elements >= 1, "bucket_elements ", bucket_elements,
                    ": a bucket of gradients holds at least 1 element");
}

/// Keeps the nodes of the graph that add into the gradients, since LibTorch makes them anew where nobody does.
struct GradientBuffer::BackwardHooks {
  using Node = decltype(torch::autograd::impl::grad_accumulator(at::Tensor()));
  struct Hook : torch::autograd::FunctionPostHook {
    explicit Hook(std::function<void()> action) : action_(std::move(action)) {}
    torch::autograd::variable_list operator()(const torch::autograd::variable_list& outputs,
                                              const torch::autograd::variable_list& /*inputs*/) override {
      action_();
      return outputs;
    }

   private:
    std::function<void()> action_;
  };

  BackwardHooks() = default;
  BackwardHooks(const BackwardHooks&) = delete;
  BackwardHooks& operator=(const BackwardHooks&) = delete;
  ~BackwardHooks() {
    for (const auto& [node, key] : nodes) node->del_post_hook(key);
  }

  void add(const at::Tensor& parameter, std::function<void()> action) {
    auto node = torch::autograd::impl::grad_accumulator(parameter);
    const auto key = node->add_post_hook(std::make_unique<Hook>(std::move(action)));
    nodes.emplace_back(std::move(node), key);
  }

  std::vector<std::pair<Node, uintptr_t>> nodes;
};

GradientBuffer::Bucket& GradientBuffer::bucket_of(const ParameterShard& shard, at::ScalarType dtype, int64_t full) {
  const auto& group = groups_.of(shard.domain.summed_over);
  const auto parameter_dtype = shard.parameter.scalar_type();
  for (auto& bucket : buckets_) {
    if (bucket.dtype != dtype || bucket.parameter_dtype != parameter_dtype || bucket.group != group) continue;
    int64_t numel = 0;
    for (const auto& member : bucket.members) numel += member.parameter.numel();
    if (numel < full) return bucket;
  }
  auto& bucket = buckets_.emplace_back();
  bucket.dtype = dtype;
  bucket.parameter_dtype = parameter_dtype;
  bucket.group = group;
  return bucket;
}

GradientBuffer::GradientBuffer(const std::vector<ParameterShard>& parameters, const parallel::ProcessGroups& groups,
                               const GradientBufferOptions& options)
    : groups_(groups), overlap_gather_(options.overlap_gather) {
  options.validate();
  for (auto shard = parameters.rbegin(); shard != parameters.rend(); ++shard) {
    if (!shard->parameter.requires_grad()) continue;
    const auto& first = buckets_.empty() ? *shard : buckets_.front().members.front();
    TORCH_CHECK_VALUE(shard->parameter.device() == first.parameter.device(), "parameter ", shard->name, " is on ",
                      shard->parameter.device(), ", ", first.name, " on ", first.parameter.device(),
                      ": gradients are kept on one device");
    const auto over = shard->domain.sharded_over;
    const bool is_known = over == GradientDomain::kSharded.sharded_over || over == GradientDomain::kExpert.sharded_over;
    TORCH_CHECK_VALUE(over.empty() || is_known, "parameter ", shard->name, " is sharded over \"", over,
                      "\": the gradient norm knows sharding over tp and etp_ep only");
    if (is_known) groups.of(over);  // checks that it was made
    const auto dtype = c10::isReducedFloatingType(shard->parameter.scalar_type()) ? options.low_precision_gradients
                                                                                  : shard->parameter.scalar_type();
    bucket_of(*shard, dtype, options.bucket_elements).members.push_back(*shard);
  }
  TORCH_CHECK_VALUE(!buckets_.empty(), "every parameter is frozen: there is nothing to train");
  for (auto& bucket : buckets_) {
    place(bucket, options);
    for (size_t i = 0; i < bucket.members.size(); ++i) {
      const auto& parameter = bucket.members[i].parameter;
      const auto& elements = bucket.layout.parameters[i];
      views_.push_back(bucket.gradients.narrow(0, elements.begin, elements.length()).view(parameter.sizes()));
      parameter.set_grad_dtype(bucket.dtype);
      parameters_.push_back(bucket.members[i]);
    }
    prepare_norm(bucket);
  }
  choose_overlap(options);
  if (options.overlap_gather) wait_before_use();
  zero();
}

GradientBuffer::~GradientBuffer() {
  lifetime_.reset();
  if (std::uncaught_exceptions() > 0) return;  // the others may never send theirs
  try {
    finish_gather();
  } catch (const std::exception& error) {
    TORCH_WARN("the parameters are incomplete: ", error.what());
  }
}

void GradientBuffer::place(Bucket& bucket, const GradientBufferOptions& options) {
  const at::NoGradGuard no_grad;
  std::vector<int64_t> numels;
  for (const auto& shard : bucket.members) numels.push_back(shard.parameter.numel());
  bucket.layout = FlatLayout(numels, bucket.group->getSize());
  bucket.is_divided = options.distributed_optimizer && bucket.group->getSize() > 1;
  const auto on_device = at::TensorOptions(bucket.members.front().parameter.device());
  const int64_t numel = bucket.is_divided ? bucket.layout.numel_of_slices() : bucket.layout.numel;
  bucket.gradients = at::zeros({numel}, on_device.dtype(bucket.dtype));
  if (!bucket.is_divided) return;
  bucket.parameters = at::zeros({numel}, on_device.dtype(bucket.parameter_dtype));
  for (size_t i = 0; i < bucket.members.size(); ++i) {
    const auto& parameter = bucket.members[i].parameter;
    const auto& elements = bucket.layout.parameters[i];
    const auto room = bucket.parameters.narrow(0, elements.begin, elements.length()).view(parameter.sizes());
    room.copy_(parameter);
    parameter.set_data(room);
  }
}

void GradientBuffer::choose_overlap(const GradientBufferOptions& options) {
  const std::set<parallel::GroupPtr> of_layers{groups_.tp, groups_.ep, groups_.etp, groups_.etp_ep};
  for (auto& bucket : buckets_) {
    if (bucket.layout.numel == 0 || bucket.group->getSize() == 1) continue;
    bucket.overlaps = options.overlap_reduction && of_layers.count(bucket.group) == 0 &&
                      parallel::overlaps_computation(bucket.group, bucket.gradients.device().type());
    if (!bucket.overlaps && !(bucket.is_divided && options.overlap_gather)) continue;
    if (!hooks_) hooks_ = std::make_unique<BackwardHooks>();
    for (size_t member = 0; member < bucket.members.size(); ++member) {
      hooks_->add(bucket.members[member].parameter, [this, &bucket, member] { completed(bucket, member); });
    }
  }
}

void GradientBuffer::wait_before_use() {
  std::map<std::shared_ptr<BeforeUse>, std::set<Bucket*>> buckets_of;
  for (auto& bucket : buckets_) {
    if (!bucket.is_divided) continue;
    for (const auto& shard : bucket.members) {
      if (shard.before_use) buckets_of[shard.before_use].insert(&bucket);
    }
  }
  for (const auto& [before_use, buckets] : buckets_of) {
    // Not removed at the end: by then it may be that of another buffer for the same parameters.
    *before_use = [lifetime = std::weak_ptr<bool>(lifetime_), buckets = buckets] {
      if (lifetime.expired()) return;
      for (auto* bucket : buckets) finish(bucket->gather);
    };
  }
}

void GradientBuffer::finish(std::optional<parallel::PendingTensor>& pending) {
  if (pending) std::exchange(pending, std::nullopt)->wait();
}

void GradientBuffer::zero() {
  is_last_backward_ = false;
  for (auto& bucket : buckets_) {
    finish(bucket.reduction);  // of a step that an exception ended
    bucket.gradients.zero_();
  }
  for (size_t i = 0; i < parameters_.size(); ++i) parameters_[i].parameter.mutable_grad() = views_[i];
}

at::Tensor GradientBuffer::Bucket::own_gradients() const {
  if (!is_divided) return gradients;
  const auto slice = layout.slice(group->getRank());
  return gradients.narrow(0, slice.begin, slice.length());
}

void GradientBuffer::reduce_in_backward() {
  is_last_backward_ = true;
  for (auto& bucket : buckets_) {
    if (!bucket.overlaps) continue;
    for (size_t member = 0; member < bucket.members.size(); ++member) bucket.incomplete.insert(member);
  }
}

void GradientBuffer::completed(Bucket& bucket, size_t member) {
  TORCH_CHECK(!bucket.gather, "parameter ", bucket.members[member].name,
              " was used before it was complete: what reads it must call ParallelModule::use_parameters() first");
  if (!is_last_backward_ || !bucket.overlaps) return;
  bucket.incomplete.erase(member);
  if (!bucket.incomplete.empty()) return;
  std::set<parallel::GroupPtr> waiting;  // whose next bucket isn't complete
  for (auto& next : buckets_) {
    if (!next.overlaps || next.reduction) continue;
    if (!next.incomplete.empty()) waiting.insert(next.group);
    if (waiting.count(next.group) == 0) start_reduction(next);
  }
}

void GradientBuffer::start_reduction(Bucket& bucket) {
  if (bucket.layout.numel == 0) return;
  if (bucket.group->getSize() > 1) bucket.own_squares = squares_of_blocks({bucket.gradients});
  bucket.reduction = bucket.is_divided ? parallel::start_reduce_scatter_in_place(bucket.gradients, bucket.group)
                                       : parallel::start_all_reduce_in_place(bucket.gradients, bucket.group);
}

void GradientBuffer::reduce() {
  is_last_backward_ = false;
  for (auto& bucket : buckets_) {
    if (!bucket.reduction) start_reduction(bucket);
  }
  for (auto& bucket : buckets_) finish(bucket.reduction);
}

void GradientBuffer::prepare_norm(Bucket& bucket) {
  std::vector<int64_t> rows;  // of each block, a row for each slice and class
  std::vector<int64_t> columns;
  for (int slice = 0; slice < bucket.num_norm_slices(); ++slice) {
    std::array<int64_t, kNumNormClasses> num_columns{};
    for (size_t i = 0; i < bucket.members.size(); ++i) {
      const auto elements = bucket.layout.elements_of(i, bucket.is_divided ? bucket.group->getRank() : slice);
      if (elements.length() == 0) continue;
      const auto& place = bucket.layout.parameters[i];
      bucket.norm.push_back(bucket.gradients.narrow(0, place.begin + elements.begin, elements.length()));
      const auto row_class = norm_class(bucket.members[i]);
      for (int64_t block = num_blocks(bucket.norm.back()); block > 0; --block) {
        rows.push_back(slice * kNumNormClasses + row_class);
        columns.push_back(num_columns[static_cast<size_t>(row_class)]++);
      }
    }
  }
  for (const int64_t column : columns) bucket.norm_columns = std::max(bucket.norm_columns, column + 1);
  for (size_t i = 0; i < rows.size(); ++i) columns[i] += rows[i] * bucket.norm_columns;
  bucket.norm_places = at::tensor(columns, at::kLong).to(bucket.gradients.device());
}

at::Tensor GradientBuffer::squares_of(const Bucket& bucket) {
  const int64_t slices = bucket.num_norm_slices();
  auto squares = at::zeros({kNumNormClasses}, bucket.gradients.options().dtype(at::kDouble));
  if (!bucket.norm.empty()) {
    auto blocks = at::zeros({slices * kNumNormClasses * bucket.norm_columns}, squares.options());
    blocks.index_put_({bucket.norm_places}, squares_of_blocks(bucket.norm));
    // cumsum adds one after the other, so the result doesn't depend on how a parallel sum would be split.
    const auto of_slices = blocks.view({slices, kNumNormClasses, bucket.norm_columns}).cumsum(2).select(2, -1);
    squares = of_slices.cumsum(0).select(0, -1);
  }
  // As many ranks as there are slices: added in the same order.
  return bucket.is_divided && bucket.layout.numel > 0 ? parallel::all_reduce(squares, bucket.group) : squares;
}

at::Tensor GradientBuffer::squares_before_reduction() const {
  std::vector<at::Tensor> squares;
  for (const auto& bucket : buckets_) {
    squares.push_back(bucket.own_squares.defined() ? bucket.own_squares : squares_of_blocks({bucket.gradients}));
  }
  return at::cat(squares);
}

at::Tensor GradientBuffer::squared_norm(const at::Tensor& addend) const {
  // Rank 0 of tp counts replicated parameters; every rank counts its part of the sharded ones.
  auto squares = at::zeros({kNumNormClasses}, views_.front().options().dtype(at::kDouble));
  for (const auto& bucket : buckets_) squares = squares + squares_of(bucket);
  auto own = squares.narrow(0, kOverTp, 1);
  if (groups_.tp->getRank() == 0) own = own + squares.narrow(0, kOnce, 1);
  if (addend.defined()) own = own + addend;
  auto sum = parallel::all_reduce(own, groups_.tp);
  const bool has_experts = std::any_of(parameters_.begin(), parameters_.end(),
                                       [](const auto& shard) { return norm_class(shard) == kOverExperts; });
  if (!has_experts) return sum;
  const auto& experts = groups_.of(GradientDomain::kExpert.sharded_over);
  return sum + parallel::all_reduce(squares.narrow(0, kOverExperts, 1), experts);
}

double GradientBuffer::norm() const { return std::sqrt(squared_norm().item<double>()); }

void GradientBuffer::scale(double factor) {
  for (auto& bucket : buckets_) bucket.own_gradients().mul_(factor);
}

double GradientBuffer::clip_grad_norm(double max_norm) {
  const double before = norm();
  if (before > max_norm) scale(max_norm / before);
  return before;
}

std::vector<ParameterSlice> GradientBuffer::slices(const AdamWOptions& options) const {
  std::vector<ParameterSlice> result;
  for (const auto& bucket : buckets_) {
    for (size_t i = 0; i < bucket.members.size(); ++i) {
      const auto& shard = bucket.members[i];
      const auto all = parallel::Range{0, shard.parameter.numel()};
      result.push_back(parameter_slice(
          shard, bucket.is_divided ? bucket.layout.elements_of(i, bucket.group->getRank()) : all, options));
      result.back().is_divided = bucket.is_divided;
    }
  }
  return result;
}

void GradientBuffer::gather_parameters() {
  finish_gather();
  // The other way round than backward, as the next forward pass needs them.
  for (auto bucket = buckets_.rbegin(); bucket != buckets_.rend(); ++bucket) {
    if (!bucket->is_divided || bucket->layout.numel == 0) continue;
    bucket->gather = parallel::start_all_gather_in_place(bucket->parameters, bucket->group);
    const bool has_waiters = std::all_of(bucket->members.begin(), bucket->members.end(),
                                         [](const ParameterShard& shard) { return shard.before_use != nullptr; });
    if (!overlap_gather_ || !has_waiters) finish(bucket->gather);
  }
}

void GradientBuffer::finish_gather() {
  for (auto bucket = buckets_.rbegin(); bucket != buckets_.rend(); ++bucket) finish(bucket->gather);
}

}  // namespace megatron_cpp
