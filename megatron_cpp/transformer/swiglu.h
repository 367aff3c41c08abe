// The gated activation of feed-forwards.
#pragma once

#include <ATen/core/Tensor.h>

namespace megatron_cpp {

/// silu(gate) * up; with limit L > 0: min(silu(gate), L) * clamp(up, -L, L).
/// @param gate_up  [.., 2F], gate in the first F columns, up in the others.
/// @return         [.., F]. Its backward saves gate_up only; double backward throws c10::NotImplementedError.
/// No communication. Throws c10::ValueError if the number of columns is odd.
at::Tensor clamped_swiglu(const at::Tensor& gate_up, double limit);

namespace internal {

/// clamped_swiglu without gradient.
at::Tensor swiglu_product(const at::Tensor& gate_up, double limit);

/// The gradient of gate_up [.., 2F] for that of the result, [.., F].
at::Tensor swiglu_gradient(const at::Tensor& gradient, const at::Tensor& gate_up, double limit);

}  // namespace internal

}  // namespace megatron_cpp
