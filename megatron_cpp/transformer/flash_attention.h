// Flash attention over packed sub-sequences, and when it applies.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceType.h>
#include <c10/core/ScalarType.h>

#include <cstdint>

#include "megatron_cpp/transformer/attention_batch.h"

namespace megatron_cpp::internal {

/// Whether the kernel takes tensors like these: float16 or bfloat16 on a GPU, with heads of a multiple of 8 elements,
/// at most 256. It neither pads nor chooses another kernel, as at::scaled_dot_product_attention does.
bool flash_attention_takes(c10::DeviceType device, at::ScalarType dtype, int64_t head_dim);

/// Whether the kernel can read `x`, [rows, heads, head_dim], without a copy. It loads 16 bytes at a time: `x`, each of
/// its rows and each head must begin at a multiple of 16 bytes, and the elements of a head be side by side.
bool has_flash_alignment(const at::Tensor& x);

/// core_attention by one call of the kernel over all sub-sequences. Copies tensors without has_flash_alignment().
/// @param q, k, v        as in core_attention; flash_attention_takes() them.
/// @param sub_sequences  on the device of q.
at::Tensor flash_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const SubSequences& sub_sequences, int64_t sliding_window);

}  // namespace megatron_cpp::internal
