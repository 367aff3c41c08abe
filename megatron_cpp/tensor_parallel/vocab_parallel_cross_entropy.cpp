#include "megatron_cpp/tensor_parallel/vocab_parallel_cross_entropy.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "megatron_cpp/tensor_parallel/to_device.h"
#include "parallel/collectives.h"
#include "parallel/shard.h"

namespace megatron_cpp {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Where the targets are among this rank's columns.
struct OwnTargets {
  at::Tensor column;  ///< [S, B] int64, 0 where the target isn't here
  at::Tensor here;    ///< [S, B] bool
};

OwnTargets own_targets(const at::Tensor& target, const at::Tensor& ignored, parallel::Range own) {
  const auto here = target.ge(own.begin).logical_and(target.lt(own.end)).logical_and(ignored.logical_not());
  return {(target - own.begin).masked_fill(here.logical_not(), 0), here};
}

/// logits [S, B, columns] - maxima [S, B] at the targets that are here, [S, B]; 0 elsewhere.
at::Tensor at_targets(const at::Tensor& logits, const at::Tensor& maxima, const OwnTargets& targets) {
  if (logits.size(-1) == 0) return at::zeros_like(maxima);
  const auto picked = logits.gather(-1, targets.column.unsqueeze(-1)).squeeze(-1);
  return (picked - maxima).masked_fill(targets.here.logical_not(), 0);
}

/// Calls body(first, length) for blocks of positions of `values`, [S, B, columns]: on the CPU as many as fit into the
/// cores' caches, so that an operator finds the previous one's result in cache; elsewhere one call for all.
template <class Body>
void for_blocks_of_positions(const at::Tensor& values, const Body& body) {
  constexpr int64_t kCacheBytes = int64_t{256} * 1024;
  const int64_t S = values.size(0);
  int64_t length = S;
  if (values.is_cpu() && values.numel() > 0) {
    const auto position_bytes = static_cast<int64_t>(values.nbytes()) / S;
    length = std::max<int64_t>(1, kCacheBytes * at::get_num_threads() / position_bytes);
  }
  for (int64_t first = 0; first < S; first += length) body(first, std::min(length, S - first));
}

struct CrossEntropyFunction : torch::autograd::Function<CrossEntropyFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& logits, const at::Tensor& target,
                            int64_t vocabulary_size, double label_smoothing, int64_t ignore_index,
                            const parallel::GroupPtr& tp) {
    const int64_t begin = std::min(logits.size(-1) * tp->getRank(), vocabulary_size);
    const parallel::Range own{begin, std::min(begin + logits.size(-1), vocabulary_size)};
    const auto real_logits = logits.narrow(-1, 0, own.length());
    const auto options =
        logits.options().dtype(logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).requires_grad(false);
    const auto ignored = target.eq(ignore_index);
    const auto targets = own_targets(target, ignored, own);

    auto maxima = own.length() > 0 ? real_logits.amax(-1).to(options.dtype())
                                   : at::full(target.sizes(), -std::numeric_limits<double>::infinity(), options);
    maxima = parallel::all_reduce(maxima, tp, parallel::Reduction::kMax);

    // Half types become float32 here.
    auto exponentials = at::empty(real_logits.sizes(), options);
    auto own_sums = at::empty({label_smoothing > 0 ? 3 : 2, target.size(0), target.size(1)}, options);
    for_blocks_of_positions(exponentials, [&](int64_t first, int64_t length) {
      auto block = exponentials.narrow(0, first, length);
      auto sums = own_sums.narrow(1, first, length);
      at::sub_out(block, real_logits.narrow(0, first, length), maxima.narrow(0, first, length).unsqueeze(-1));
      if (label_smoothing > 0) sums[2].copy_(block.sum(-1));
      sums[0].copy_(block.exp_().sum(-1));
    });
    own_sums[1].copy_(at_targets(real_logits, maxima, targets));
    const auto sums = parallel::all_reduce(own_sums, tp);

    const auto log_sum = sums[0].log();
    auto loss = log_sum - (1 - label_smoothing) * sums[1];
    if (label_smoothing > 0) loss -= label_smoothing / static_cast<double>(vocabulary_size) * sums[2];

    context->save_for_backward({exponentials, sums[0].reciprocal(), ignored, targets.column, targets.here});
    context->saved_data["columns"] = logits.size(-1);
    context->saved_data["dtype"] = logits.scalar_type();
    context->saved_data["label_smoothing"] = label_smoothing;
    context->saved_data["smoothing_per_class"] = label_smoothing / static_cast<double>(vocabulary_size);
    return loss.masked_fill_(ignored, 0);
  }

  /// g · (p - (1 - s) at the target - s/V), g the loss's gradient.
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), "double backward through vocab_parallel_cross_entropy");
    const auto saved = context->get_saved_variables();
    const auto& exponentials = saved[0];
    const OwnTargets targets{saved[3], saved[4]};
    const double label_smoothing = context->saved_data["label_smoothing"].toDouble();
    const double smoothing_per_class = context->saved_data["smoothing_per_class"].toDouble();
    const int64_t columns = context->saved_data["columns"].toInt();
    const int64_t real_columns = exponentials.size(-1);

    const auto loss_gradient = gradients[0].masked_fill(saved[2], 0);
    const auto per_exponential = loss_gradient * saved[1].masked_fill(saved[2], 0);
    const auto per_class = loss_gradient * -smoothing_per_class;
    auto gradient = at::empty({exponentials.size(0), exponentials.size(1), columns},
                              exponentials.options().dtype(context->saved_data["dtype"].toScalarType()));
    gradient.narrow(-1, real_columns, columns - real_columns).zero_();
    if (real_columns > 0) {
      auto real = gradient.narrow(-1, 0, real_columns);
      for_blocks_of_positions(exponentials, [&](int64_t first, int64_t length) {
        auto block = real.narrow(0, first, length);
        const auto own = exponentials.narrow(0, first, length);
        const auto factor = per_exponential.narrow(0, first, length).unsqueeze(-1);
        if (label_smoothing > 0) {
          at::addcmul_out(block, per_class.narrow(0, first, length).unsqueeze(-1), own, factor);
        } else {
          at::mul_out(block, own, factor);
        }
      });
      // The target's column is computed from its exponential again, since the gradient may be rounded already; where
      // the target isn't on this rank, column 0 gets the same value again.
      const auto column = targets.column.unsqueeze(-1);
      const auto at_target =
          at::addcmul(per_class.unsqueeze(-1), exponentials.gather(-1, column), per_exponential.unsqueeze(-1)) -
          (loss_gradient * (1 - label_smoothing) * targets.here).unsqueeze(-1);
      real.scatter_(-1, column, at_target.to(gradient.scalar_type()));
    }
    return {gradient, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

void check_logits(const at::Tensor& logits, const at::Tensor& target, const CrossEntropyOptions& options, int t) {
  TORCH_CHECK_VALUE(logits.dim() == 3 && logits.is_floating_point(), "logits must be floating point [S, B, V'/t], got ",
                    logits.sizes(), " ", logits.scalar_type());
  TORCH_CHECK_VALUE(target.dim() == 2 && target.scalar_type() == at::kLong && target.size(0) == logits.size(0) &&
                        target.size(1) == logits.size(1),
                    "target must be int64 [", logits.size(0), ", ", logits.size(1), "] as the logits are, got ",
                    target.sizes(), " ", target.scalar_type());
  TORCH_CHECK_VALUE(options.vocabulary_size > 0 && logits.size(-1) * t >= options.vocabulary_size, t, " ranks with ",
                    logits.size(-1), " columns of logits each do not hold a vocabulary of ", options.vocabulary_size);
  TORCH_CHECK_VALUE(options.label_smoothing >= 0 && options.label_smoothing <= 1, "label_smoothing ",
                    options.label_smoothing, " is not in [0, 1]");
}

void check_target_on_host(const at::Tensor& target, const CrossEntropyOptions& options) {
  const auto contiguous = target.contiguous();
  const auto* ids = contiguous.const_data_ptr<int64_t>();
  const int64_t B = target.size(1);
  for (int64_t i = 0; i < target.numel(); ++i) {
    TORCH_CHECK_VALUE(ids[i] == options.ignore_index || (ids[i] >= 0 && ids[i] < options.vocabulary_size), "target ",
                      ids[i], " at position ", i / B, ", batch row ", i % B, " is outside the vocabulary [0, ",
                      options.vocabulary_size, ") and not the ignored ", options.ignore_index);
  }
}

void check_target_on_device(const at::Tensor& target, const CrossEntropyOptions& options) {
  const auto inside = target.ge(0).logical_and(target.lt(options.vocabulary_size));
  at::_assert_async(inside.logical_or(target.eq(options.ignore_index)).all());
}

}  // namespace

at::Tensor vocab_parallel_cross_entropy(const at::Tensor& logits, const at::Tensor& target,
                                        const CrossEntropyOptions& options, const parallel::GroupPtr& tp) {
  check_logits(logits, target, options, tp->getSize());
  if (target.is_cpu()) {
    check_target_on_host(target, options);
  } else {
    check_target_on_device(target, options);
  }
  return CrossEntropyFunction::apply(logits, internal::to_device(target, logits.device()), options.vocabulary_size,
                                     options.label_smoothing, options.ignore_index, tp);
}

}  // namespace megatron_cpp
