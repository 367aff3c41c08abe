// The matrix products of linear layers.
//
// On x86 CPUs without AVX-512, LibTorch 2.15 multiplies bfloat16 and float16 matrices far below the speed of float32
// ones (11 against 88 GFLOP/s on an AVX2 EPYC core). There they are multiplied in float32, block by block, and rounded
// once, which is what the hardware of other machines does. Elsewhere these are LibTorch's own products.
//
// Profilers show each as one operation "megatron_cpp::matrix_product".
#pragma once

#include <ATen/core/Tensor.h>

namespace megatron_cpp::internal {

/// [.., C] as a matrix, a view where that is possible.
at::Tensor as_matrix(const at::Tensor& tensor);

/// input [.., C] · weightᵀ [F, C] + bias [F] (may be undefined) -> [.., F], without gradient.
at::Tensor linear_product(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias);

/// a [.., K] · b [K, C] -> [.., C], contiguous.
at::Tensor matrix_product(const at::Tensor& a, const at::Tensor& b);

/// result [R, C] = a [R, K] · b [K, C], in place; all of one dtype.
void write_matrix_product(const at::Tensor& result, const at::Tensor& a, const at::Tensor& b);

/// sum [R, C] += a [R, K] · b [K, C], in place. The sum may be float32 where a and b have a lower precision: the
/// product isn't rounded to theirs then.
void add_matrix_product(const at::Tensor& sum, const at::Tensor& a, const at::Tensor& b);

}  // namespace megatron_cpp::internal
