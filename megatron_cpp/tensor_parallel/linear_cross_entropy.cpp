#include "megatron_cpp/tensor_parallel/linear_cross_entropy.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>

#include "megatron_cpp/tensor_parallel/cross_entropy_shard.h"
#include "megatron_cpp/tensor_parallel/linear_function.h"
#include "megatron_cpp/tensor_parallel/matrix_product.h"
#include "megatron_cpp/tensor_parallel/to_device.h"
#include "parallel/collectives.h"

namespace megatron_cpp {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Where the gradients of a loss are written; an undefined one isn't computed.
struct Gradients {
  double loss;        ///< of the sum of the losses
  at::Tensor input;   ///< [S, B, H], overwritten with this rank's summand
  at::Tensor weight;  ///< [V'/t, H] in the weight's dtype or a higher one, added to
};

/// The sum of the losses, and the gradients, chunk by chunk. `input` has all positions.
at::Tensor chunked_loss_sum(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target,
                            const LinearCrossEntropyOptions& options, const parallel::GroupPtr& tp,
                            const Gradients& gradients) {
  const int64_t S = input.size(0);
  const int64_t B = input.size(1);
  const int64_t chunk = std::min(options.chunk(), S);
  const auto own = internal::own_classes(weight.size(0), options.loss().vocabulary_size, tp);
  const int64_t columns = own.length();
  const auto own_weight = weight.narrow(0, 0, columns);
  const auto loss_options = input.options().dtype(internal::loss_dtype(input.scalar_type()));
  const auto losses = at::empty({S, B}, loss_options);
  const auto logits_buffer = at::empty({chunk * B, columns}, input.options());
  const auto buffer =
      input.scalar_type() == losses.scalar_type() ? logits_buffer : at::empty({chunk * B, columns}, loss_options);
  for (int64_t first = 0; first < S; first += chunk) {
    const int64_t length = std::min(chunk, S - first);
    const auto by_position = [&](const at::Tensor& matrix) { return matrix.view({length, B, columns}); };
    const auto rows = internal::as_matrix(input.narrow(0, first, length));
    const auto logits = logits_buffer.narrow(0, 0, length * B);
    const auto exponentials = by_position(buffer.narrow(0, 0, length * B));
    internal::write_matrix_product(logits, rows, own_weight.t());
    const auto forward = internal::shard_losses(exponentials, by_position(logits), target.narrow(0, first, length),
                                                options.loss(), own, tp);
    losses.narrow(0, first, length).copy_(forward.losses);
    if (!gradients.input.defined() && !gradients.weight.defined()) continue;
    const auto& gradient = logits;  // in their place
    internal::shard_gradient(by_position(gradient), exponentials, forward,
                             at::full({length, B}, gradients.loss, loss_options), options.loss());
    if (gradients.input.defined()) {
      internal::write_matrix_product(internal::as_matrix(gradients.input.narrow(0, first, length)), gradient,
                                     own_weight);
    }
    if (gradients.weight.defined()) {
      internal::add_matrix_product(gradients.weight.narrow(0, 0, columns), gradient.t(), rows);
    }
  }
  return losses.sum();
}

/// Saves the gradients; the backward pass hands them out.
struct ChunkedLossFunction : torch::autograd::Function<ChunkedLossFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& input, const at::Tensor& weight,
                            const at::Tensor& target, const LinearCrossEntropyOptions& options,
                            const parallel::GroupPtr& tp, double loss_gradient, bool needs_input, bool needs_weight) {
    const bool gathers = options.sequence_parallel();
    const auto whole = (gathers ? parallel::all_gather(input, tp) : input).detach();
    const bool accumulates = options.accumulate_into_grad() && weight.grad().defined();
    const auto high_precision = whole.options().dtype(internal::loss_dtype(weight.scalar_type()));
    Gradients gradients{loss_gradient, {}, {}};
    if (needs_input) gradients.input = at::empty(whole.sizes(), whole.options());
    if (needs_weight) gradients.weight = accumulates ? weight.grad() : at::zeros(weight.sizes(), high_precision);
    const auto sum = chunked_loss_sum(whole, weight.detach(), target, options, tp, gradients);
    if (needs_input && gathers) {
      gradients.input = parallel::reduce_scatter(gradients.input, tp);
    } else if (needs_input) {
      parallel::all_reduce_in_place(gradients.input, tp);
    }
    auto& saved = context->saved_data;
    saved["loss_gradient"] = loss_gradient;
    if (needs_input) saved["input_gradient"] = gradients.input;
    if (needs_weight && !accumulates) saved["weight_gradient"] = gradients.weight.to(weight.scalar_type());
    return sum;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), "double backward through linear_cross_entropy");
    auto& saved = context->saved_data;
    TORCH_CHECK(!saved.empty(),
                "linear_cross_entropy: a second backward pass, whose gradients the first one has taken");
    const double announced = saved["loss_gradient"].toDouble();
    const auto& given = gradients[0];
    constexpr double kRounding = 1e-6;
    if (given.is_cpu()) {
      const double value = given.item<double>();
      TORCH_CHECK_VALUE(std::abs(value - announced) <= kRounding * std::abs(announced),
                        "linear_cross_entropy: the loss got the gradient ", value,
                        " in the backward pass, and its loss_gradient was ", announced);
    } else {
      at::_assert_async((given - announced).abs().le(kRounding * std::abs(announced)));
    }
    const auto take = [&](const char* name) {
      const auto found = saved.find(name);
      return found == saved.end() ? at::Tensor() : found->second.toTensor();
    };
    const variable_list result{take("input_gradient"), take("weight_gradient"), {}, {}, {}, {}, {}, {}};
    saved.clear();
    return result;
  }
};

}  // namespace

at::Tensor linear_cross_entropy(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& target,
                                const LinearCrossEntropyOptions& options, const parallel::GroupPtr& tp,
                                double loss_gradient) {
  TORCH_CHECK_VALUE(options.chunk() >= 0, "linear_cross_entropy: chunk ", options.chunk(), " is negative");
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.is_floating_point() && input.dim() == 3 &&
                        input.size(-1) == weight.size(1) && input.scalar_type() == weight.scalar_type(),
                    "linear_cross_entropy: input ", input.sizes(), " ", input.scalar_type(), " and weight ",
                    weight.sizes(), " ", weight.scalar_type(), " are not [S, B, H] and [V'/t, H] of one dtype");
  const int64_t S = input.size(0) * (options.sequence_parallel() ? tp->getSize() : 1);
  internal::check_cross_entropy(target, S, input.size(1), weight.size(0), options.loss(), tp);
  if (options.chunk() == 0) {
    const auto kind =
        options.sequence_parallel() ? internal::LinearInput::kSequenceParallel : internal::LinearInput::kReplicated;
    const auto logits =
        internal::linear_with_communication(input, weight, {}, kind, options.accumulate_into_grad(), tp);
    return vocab_parallel_cross_entropy(logits, target, options.loss(), tp).sum();
  }
  const bool trains = c10::GradMode::is_enabled();
  return ChunkedLossFunction::apply(input, weight, internal::to_device(target, input.device()), options, tp,
                                    loss_gradient, trains && input.requires_grad(), trains && weight.requires_grad());
}

int64_t default_loss_chunk(int64_t positions, int64_t columns) {
  constexpr int64_t kElements = int64_t{32} * 1024 * 1024;
  constexpr int64_t kStep = 64;
  const int64_t fitting = kElements / std::max<int64_t>(columns, 1);
  return positions <= fitting ? 0 : std::max(fitting / kStep * kStep, kStep);
}

}  // namespace megatron_cpp
