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

/// Chunk by chunk: logits, losses and, where its members are defined, the gradients. `input` has all positions.
class ChunkedLossSum {
 public:
  ChunkedLossSum(const at::Tensor& input, const at::Tensor& weight, const LinearCrossEntropyOptions& options,
                 const parallel::GroupPtr& tp)
      : input_(input),
        own_(internal::own_classes(weight.size(0), options.loss().vocabulary_size, tp)),
        weight_(weight.narrow(0, 0, own_.length())),
        loss_(options.loss()),
        chunk_(std::min(options.chunk(), input.size(0))),
        loss_options_(input.options().dtype(internal::loss_dtype(weight.scalar_type())).requires_grad(false)),
        tp_(tp) {}

  at::Tensor input_gradient;   ///< [S, B, H], overwritten with this rank's summand
  at::Tensor weight_gradient;  ///< [V'/t, H] in the weight's dtype or a higher one, added to
  double loss_gradient = 1.0;

  /// The sum of the losses.
  at::Tensor operator()(const at::Tensor& target) const {
    const int64_t S = input_.size(0);
    const int64_t B = input_.size(1);
    const int64_t columns = own_.length();
    const auto losses = at::empty({S, B}, loss_options_);
    const auto logits_buffer = at::empty({chunk_ * B, columns}, input_.options().requires_grad(false));
    const auto buffer =
        input_.scalar_type() == losses.scalar_type() ? logits_buffer : at::empty({chunk_ * B, columns}, loss_options_);
    for (int64_t first = 0; first < S; first += chunk_) {
      const int64_t length = std::min(chunk_, S - first);
      const auto rows = internal::as_matrix(input_.narrow(0, first, length));
      const auto logits = logits_buffer.narrow(0, 0, length * B);
      const auto by_position = [&](const at::Tensor& matrix) { return matrix.view({length, B, columns}); };
      const auto exponentials = by_position(buffer.narrow(0, 0, length * B));
      internal::write_matrix_product(logits, rows, weight_.t());
      const auto forward =
          internal::shard_losses(exponentials, by_position(logits), target.narrow(0, first, length), loss_, own_, tp_);
      losses.narrow(0, first, length).copy_(forward.losses);
      if (!input_gradient.defined() && !weight_gradient.defined()) continue;
      const auto& gradient = logits;
      internal::shard_gradient(by_position(gradient), exponentials, forward,
                               at::full({length, B}, loss_gradient, loss_options_), loss_);
      if (input_gradient.defined()) {
        internal::write_matrix_product(internal::as_matrix(input_gradient.narrow(0, first, length)), gradient, weight_);
      }
      if (weight_gradient.defined()) {
        internal::add_matrix_product(weight_gradient.narrow(0, 0, columns), gradient.t(), rows);
      }
    }
    return losses.sum();
  }

 private:
  at::Tensor input_;
  parallel::Range own_;  ///< classes
  at::Tensor weight_;    ///< their rows
  CrossEntropyOptions loss_;
  int64_t chunk_;
  at::TensorOptions loss_options_;
  parallel::GroupPtr tp_;
};

/// Saves the gradients; the backward pass hands them out.
struct ChunkedLossFunction : torch::autograd::Function<ChunkedLossFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& input, const at::Tensor& weight,
                            const at::Tensor& target, const LinearCrossEntropyOptions& options,
                            const parallel::GroupPtr& tp, double loss_gradient, bool needs_input, bool needs_weight) {
    const bool sp = options.sequence_parallel();
    auto whole = (sp ? parallel::all_gather(input, tp) : input).detach();
    ChunkedLossSum chunks(whole, weight.detach(), options, tp);
    chunks.loss_gradient = loss_gradient;
    if (needs_input) chunks.input_gradient = at::empty(whole.sizes(), whole.options());
    const bool accumulates = options.accumulate_into_grad() && weight.grad().defined();
    if (needs_weight) {
      chunks.weight_gradient =
          accumulates ? weight.grad()
                      : at::zeros(weight.sizes(), whole.options().dtype(internal::loss_dtype(weight.scalar_type())));
    }
    const auto sum = chunks(target);
    if (needs_input && sp) {
      chunks.input_gradient = parallel::reduce_scatter(chunks.input_gradient, tp);
    } else if (needs_input) {
      parallel::all_reduce_in_place(chunks.input_gradient, tp);
    }
    if (needs_input) context->saved_data["input_gradient"] = chunks.input_gradient;
    if (needs_weight && !accumulates) {
      context->saved_data["weight_gradient"] = chunks.weight_gradient.to(weight.scalar_type());
    }
    context->saved_data["loss_gradient"] = loss_gradient;
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
