#include "megatron_cpp/tensor_parallel/rows.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>

namespace megatron_cpp::internal {
namespace {

/// Rows of a matrix on the CPU as bytes.
struct RowBytes {
  char* begin;
  int64_t stride;
  int64_t num_rows;

  explicit RowBytes(const at::Tensor& matrix)
      : begin(static_cast<char*>(matrix.mutable_data_ptr())),
        stride(matrix.stride(0) * matrix.element_size()),
        num_rows(matrix.size(0)) {}
  char* row(int64_t number) const {
    TORCH_INTERNAL_ASSERT(number >= 0 && number < num_rows, "row ", number, " of ", num_rows);
    return begin + number * stride;
  }
};

/// Row numbers, or 0, 1, 2, ... for an undefined tensor.
struct RowNumbers {
  const int64_t* numbers;
  explicit RowNumbers(const at::Tensor& rows) : numbers(rows.defined() ? rows.const_data_ptr<int64_t>() : nullptr) {}
  int64_t operator[](int64_t i) const { return numbers == nullptr ? i : numbers[i]; }
};

void check_matrices(const at::Tensor& target, const at::Tensor& source) {
  TORCH_INTERNAL_ASSERT(target.dim() == 2 && source.dim() == 2 && target.size(1) == source.size(1) &&
                            target.scalar_type() == source.scalar_type() && target.device() == source.device(),
                        "rows of ", source.sizes(), " ", source.scalar_type(), " into ", target.sizes(), " ",
                        target.scalar_type());
  // A matrix without rows may have any strides.
  TORCH_INTERNAL_ASSERT(
      (target.stride(1) == 1 || target.size(1) <= 1) && (source.stride(1) == 1 || source.size(1) <= 1),
      "the elements of a row must be side by side");
}

/// Fewest bytes worth another thread.
constexpr int64_t kGrainBytes = 1 << 18;

void move_rows_on_host(const at::Tensor& target, const at::Tensor& target_rows, const at::Tensor& source,
                       const at::Tensor& source_rows, int64_t num_rows) {
  const auto width = static_cast<size_t>(target.size(1) * target.element_size());
  if (num_rows == 0 || width == 0) return;
  const RowBytes to(target);
  const RowBytes from(source);
  const RowNumbers to_row(target_rows);
  const RowNumbers from_row(source_rows);
  at::parallel_for(0, num_rows, std::max<int64_t>(1, kGrainBytes / static_cast<int64_t>(width)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       std::memcpy(to.row(to_row[i]), from.row(from_row[i]), width);
                     }
                   });
}

}  // namespace

std::vector<at::Tensor> index_tensors(std::initializer_list<std::span<const int64_t>> lists,
                                      const c10::Device& device) {
  int64_t total = 0;
  for (const auto& list : lists) total += static_cast<int64_t>(list.size());
  const auto all = at::empty({total}, at::TensorOptions(at::kLong).pinned_memory(device.is_cuda()));
  auto* next = all.mutable_data_ptr<int64_t>();
  for (const auto& list : lists) next = std::copy(list.begin(), list.end(), next);
  const auto there = all.to(device, /*non_blocking=*/true);
  std::vector<at::Tensor> tensors;
  int64_t begin = 0;
  for (const auto& list : lists) {
    tensors.push_back(there.narrow(0, begin, static_cast<int64_t>(list.size())));
    begin += static_cast<int64_t>(list.size());
  }
  return tensors;
}

at::Tensor as_rows(const at::Tensor& tensor) {
  const int64_t width = tensor.size(-1);
  const auto rows = tensor.reshape({width == 0 ? 0 : tensor.numel() / width, width});
  return rows.stride(1) == 1 ? rows : rows.contiguous();
}

void copy_rows(const at::Tensor& target, const at::Tensor& target_rows, const at::Tensor& source,
               const at::Tensor& source_rows) {
  check_matrices(target, source);
  const int64_t num_rows = target_rows.defined() ? target_rows.numel() : source_rows.numel();
  if (target.is_cpu()) {
    move_rows_on_host(target, target_rows, source, source_rows, num_rows);
    return;
  }
  const auto rows = source_rows.defined() ? source.index_select(0, source_rows) : source.narrow(0, 0, num_rows);
  if (target_rows.defined()) {
    target.index_copy_(0, target_rows, rows);
  } else {
    target.narrow(0, 0, num_rows).copy_(rows);
  }
}

at::Tensor gather_rows(const at::Tensor& source, const at::Tensor& rows) {
  auto gathered = at::empty({rows.numel(), source.size(1)}, source.options().requires_grad(false));
  copy_rows(gathered, {}, source, rows);
  return gathered;
}

}  // namespace megatron_cpp::internal
