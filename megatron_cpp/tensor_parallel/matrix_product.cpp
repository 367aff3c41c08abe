#include "megatron_cpp/tensor_parallel/matrix_product.h"

#include <ATen/ATen.h>
#include <ATen/Version.h>
#include <ATen/record_function.h>

#include <algorithm>
#include <optional>

namespace megatron_cpp::internal {
namespace {

constexpr char kName[] = "megatron_cpp::matrix_product";

bool multiplies_halves_slowly() {
#if defined(__x86_64__)
  static const bool slowly = at::get_cpu_capability() != "AVX512";
  return slowly;
#else
  return false;
#endif
}

bool goes_through_float(const at::Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  return tensor.is_cpu() && (dtype == at::kBFloat16 || dtype == at::kHalf) && multiplies_halves_slowly();
}

/// Columns or rows converted at a time: few enough for buffers in cache, enough for large products.
constexpr int64_t kBlock = 512;

/// result = a · b, one block of columns of b at a time.
void product_through_float(const at::Tensor& result, const at::Tensor& a, const at::Tensor& b) {
  const int64_t width = std::min(kBlock, b.size(1));
  const auto float_a = a.to(at::kFloat);
  const auto buffer_b = at::empty({b.size(0) * width}, float_a.options());
  const auto buffer = at::empty({a.size(0) * width}, float_a.options());
  for (int64_t begin = 0; begin < b.size(1); begin += width) {
    const int64_t columns = std::min(width, b.size(1) - begin);
    // Laid out as b is: a transposed weight is converted row by row of the weight.
    auto block_b = b.stride(0) == 1 ? buffer_b.narrow(0, 0, b.size(0) * columns).view({columns, b.size(0)}).t()
                                    : buffer_b.narrow(0, 0, b.size(0) * columns).view({b.size(0), columns});
    auto block = buffer.narrow(0, 0, a.size(0) * columns).view({a.size(0), columns});
    block_b.copy_(b.narrow(1, begin, columns));
    at::mm_out(block, float_a, block_b);
    result.narrow(1, begin, columns).copy_(block);
  }
}

/// sum += a · b, one block of rows of the sum at a time.
void add_product_through_float(const at::Tensor& sum, const at::Tensor& a, const at::Tensor& b) {
  const int64_t height = std::min(kBlock, sum.size(0));
  const bool is_float = sum.scalar_type() == at::kFloat;
  const auto float_b = b.to(at::kFloat);
  const auto buffer = is_float ? at::Tensor() : at::empty({height, sum.size(1)}, float_b.options());
  for (int64_t begin = 0; begin < sum.size(0); begin += height) {
    const int64_t rows = std::min(height, sum.size(0) - begin);
    const auto own = sum.narrow(0, begin, rows);
    const auto block = is_float ? own : buffer.narrow(0, 0, rows);
    if (!is_float) block.copy_(own);
    block.addmm_(a.narrow(0, begin, rows).to(at::kFloat), float_b);
    if (!is_float) own.copy_(block);
  }
}

at::Tensor new_result(const at::Tensor& a, int64_t columns) {
  auto shape = a.sizes().vec();
  shape.back() = columns;
  return at::empty(shape, a.options().requires_grad(false));
}

}  // namespace

at::Tensor as_matrix(const at::Tensor& tensor) { return tensor.reshape({-1, tensor.size(-1)}); }

at::Tensor linear_product(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) {
  RECORD_FUNCTION(kName, c10::ArrayRef<const c10::IValue>());
  if (!goes_through_float(weight)) {
    return at::linear(input, weight, bias.defined() ? std::optional<at::Tensor>(bias) : std::nullopt);
  }
  const auto result = new_result(input, weight.size(0));
  product_through_float(as_matrix(result), as_matrix(input), weight.t());
  return bias.defined() ? result.add_(bias) : result;
}

at::Tensor matrix_product(const at::Tensor& a, const at::Tensor& b) {
  RECORD_FUNCTION(kName, c10::ArrayRef<const c10::IValue>());
  if (!goes_through_float(a)) return a.matmul(b);
  const auto result = new_result(a, b.size(1));
  product_through_float(as_matrix(result), as_matrix(a), b);
  return result;
}

void write_matrix_product(const at::Tensor& result, const at::Tensor& a, const at::Tensor& b) {
  RECORD_FUNCTION(kName, c10::ArrayRef<const c10::IValue>());
  if (goes_through_float(a)) return product_through_float(result, a, b);
  auto out = result;
  at::mm_out(out, a, b);
}

void add_matrix_product(const at::Tensor& sum, const at::Tensor& a, const at::Tensor& b) {
  RECORD_FUNCTION(kName, c10::ArrayRef<const c10::IValue>());
  const bool is_mixed = sum.scalar_type() != a.scalar_type();
  if (goes_through_float(a) || (is_mixed && sum.is_cpu())) {
    add_product_through_float(sum, a, b);
  } else if (is_mixed) {
    auto result = sum;
    at::addmm_out(result, sum, a, b, sum.scalar_type());  // added up in float32, and not rounded
  } else {
    sum.addmm_(a, b);
  }
}

}  // namespace megatron_cpp::internal
