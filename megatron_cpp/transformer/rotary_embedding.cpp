#include "megatron_cpp/transformer/rotary_embedding.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

#include <numbers>

#include "megatron_cpp/tensor_parallel/to_device.h"

namespace megatron_cpp {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor scale_frequencies(const at::Tensor& frequencies, const Llama3RopeScaling& scaling) {
  const auto length = static_cast<double>(scaling.original_max_position_embeddings);
  const auto wavelengths = frequencies.reciprocal() * (2.0 * std::numbers::pi);
  const auto stretched = frequencies / scaling.factor;
  // 0 where a wavelength is long (stretched), 1 where it is short (kept).
  const auto kept = ((wavelengths.reciprocal() * length - scaling.low_freq_factor) /
                     (scaling.high_freq_factor - scaling.low_freq_factor))
                        .clamp(0.0, 1.0);
  return (1.0 - kept) * stretched + kept * frequencies;
}

at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const int64_t half = cos.size(-1);
  const auto first = x.narrow(-1, 0, half);
  const auto second = x.narrow(-1, half, half);
  const auto rest = x.narrow(-1, 2 * half, x.size(-1) - 2 * half);
  const auto dtype = x.scalar_type();
  return at::cat({(first * cos - second * sin).to(dtype), (second * cos + first * sin).to(dtype), rest}, -1);
}

struct RotaryFunction : torch::autograd::Function<RotaryFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& cos,
                            const at::Tensor& sin) {
    context->save_for_backward({cos, sin});
    return rotate(x, cos, sin);
  }
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), "double backward through apply_rotary");
    const auto saved = context->get_saved_variables();
    return {rotate(gradients[0], saved[0], -saved[1]), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

RotaryEmbedding::RotaryEmbedding(int64_t rotary_dim, double theta, const std::optional<Llama3RopeScaling>& scaling)
    : rotary_dim_(rotary_dim), theta_(theta), scaling_(scaling) {
  TORCH_CHECK_VALUE(rotary_dim > 0 && rotary_dim % 2 == 0, "rotary_dim ", rotary_dim, " is not even and positive");
  const auto exponents = at::arange(0, rotary_dim, 2, at::kFloat) / static_cast<double>(rotary_dim);
  inverse_frequencies_ = at::pow(theta, exponents).reciprocal();
  if (scaling) inverse_frequencies_ = scale_frequencies(inverse_frequencies_, *scaling);
}

RotaryTables RotaryEmbedding::tables(const at::Tensor& position_ids, at::Device device) const {
  const auto positions = internal::to_device(position_ids, device).to(at::kFloat).t();  // [S, B or 1]
  const auto angles = positions.unsqueeze(-1).unsqueeze(-1) * internal::to_device(inverse_frequencies_, device);
  return {angles.cos(), angles.sin()};
}

at::Tensor apply_rotary(const at::Tensor& x, const RotaryTables& tables) {
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(-1) >= 2 * tables.cos.size(-1) && x.size(0) == tables.cos.size(0),
                    "apply_rotary: heads ", x.sizes(), " don't go with tables ", tables.cos.sizes(),
                    ": wanted [S, B, heads, head_dim] and [S, B or 1, 1, rotary_dim/2]");
  return RotaryFunction::apply(x, tables.cos, tables.sin);
}

}  // namespace megatron_cpp
