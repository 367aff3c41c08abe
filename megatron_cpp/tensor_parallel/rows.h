// Copies rows of matrices by number, for embeddings and inserts.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <initializer_list>
#include <span>
#include <vector>

namespace megatron_cpp::internal {

/// Row numbers as int64 tensors [k] on `device`, all of them in one copy: on a GPU from pinned memory and without
/// waiting, so that nothing here synchronises the device.
std::vector<at::Tensor> index_tensors(std::initializer_list<std::span<const int64_t>> lists, const c10::Device& device);

/// [.., W] as a matrix with the elements of a row side by side: a view where that is possible.
at::Tensor as_rows(const at::Tensor& tensor);

/// target[target_rows[i]] = source[source_rows[i]], without gradient.
/// @param target, source  [.., W] with the elements of a row side by side, one dtype and device.
/// @param target_rows, source_rows  [k] int64 on that device; undefined: rows 0, 1, 2, ... Target rows are all
///                                  different. At least one is defined.
/// On the CPU one memcpy per row: the index operators of LibTorch 2.15 go element by element where rows aren't
/// contiguous.
void copy_rows(const at::Tensor& target, const at::Tensor& target_rows, const at::Tensor& source,
               const at::Tensor& source_rows);

/// source[rows[i]] as a new tensor [k, W], without gradient; `source` as in copy_rows.
at::Tensor gather_rows(const at::Tensor& source, const at::Tensor& rows);

}  // namespace megatron_cpp::internal
