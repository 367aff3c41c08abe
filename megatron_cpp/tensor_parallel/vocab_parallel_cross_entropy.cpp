#include "megatron_cpp/tensor_parallel/vocab_parallel_cross_entropy.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

#include "megatron_cpp/tensor_parallel/cross_entropy_shard.h"
#include "megatron_cpp/tensor_parallel/to_device.h"

namespace megatron_cpp {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct CrossEntropyFunction : torch::autograd::Function<CrossEntropyFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& logits, const at::Tensor& target,
                            const CrossEntropyOptions& options, const parallel::GroupPtr& tp) {
    const auto own = internal::own_classes(logits.size(-1), options.vocabulary_size, tp);
    const auto real_logits = logits.narrow(-1, 0, own.length());
    const auto exponentials = at::empty(
        real_logits.sizes(), logits.options().dtype(internal::loss_dtype(logits.scalar_type())).requires_grad(false));
    const auto result = internal::shard_losses(exponentials, real_logits, target, options, own, tp);
    context->save_for_backward({exponentials, result.probability, result.ignored, result.column, result.here});
    context->saved_data["columns"] = logits.size(-1);
    context->saved_data["dtype"] = logits.scalar_type();
    context->saved_data["vocabulary_size"] = options.vocabulary_size;
    context->saved_data["label_smoothing"] = options.label_smoothing;
    return result.losses;
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), "double backward through vocab_parallel_cross_entropy");
    const auto saved = context->get_saved_variables();
    const auto& exponentials = saved[0];
    const CrossEntropyOptions options{.vocabulary_size = context->saved_data["vocabulary_size"].toInt(),
                                      .label_smoothing = context->saved_data["label_smoothing"].toDouble()};
    const int64_t columns = context->saved_data["columns"].toInt();
    const int64_t own = exponentials.size(-1);
    auto gradient = at::empty({exponentials.size(0), exponentials.size(1), columns},
                              exponentials.options().dtype(context->saved_data["dtype"].toScalarType()));
    gradient.narrow(-1, own, columns - own).zero_();
    internal::shard_gradient(
        gradient.narrow(-1, 0, own), exponentials,
        {.losses = {}, .probability = saved[1], .ignored = saved[2], .column = saved[3], .here = saved[4]},
        gradients[0], options);
    return {gradient, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor vocab_parallel_cross_entropy(const at::Tensor& logits, const at::Tensor& target,
                                        const CrossEntropyOptions& options, const parallel::GroupPtr& tp) {
  TORCH_CHECK_VALUE(logits.dim() == 3 && logits.is_floating_point(), "logits must be floating point [S, B, V'/t], got ",
                    logits.sizes(), " ", logits.scalar_type());
  internal::check_cross_entropy(target, logits.size(0), logits.size(1), logits.size(-1), options, tp);
  return CrossEntropyFunction::apply(logits, internal::to_device(target, logits.device()), options, tp);
}

}  // namespace megatron_cpp
