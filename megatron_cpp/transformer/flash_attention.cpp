#include "megatron_cpp/transformer/flash_attention.h"

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace megatron_cpp::internal {
namespace {

constexpr int64_t kLoadBytes = 16;
constexpr int64_t kHeadDimMultiple = 8;
constexpr int64_t kLargestHeadDim = 256;

/// [S, B, heads, D] -> [B * S, heads, D], rows (b, s) one after the other.
at::Tensor rows_of(const at::Tensor& x) {
  const auto rows = x.transpose(0, 1).flatten(0, 1);
  return has_flash_alignment(rows) ? rows : rows.clone(at::MemoryFormat::Contiguous);
}

}  // namespace

bool flash_attention_takes(c10::DeviceType device, at::ScalarType dtype, int64_t head_dim) {
  return device == c10::DeviceType::CUDA && (dtype == at::kHalf || dtype == at::kBFloat16) &&
         head_dim % kHeadDimMultiple == 0 && head_dim <= kLargestHeadDim;
}

bool has_flash_alignment(const at::Tensor& x) {
  const auto bytes = static_cast<int64_t>(x.element_size());
  return x.stride(2) == 1 && x.stride(0) * bytes % kLoadBytes == 0 && x.stride(1) * bytes % kLoadBytes == 0 &&
         reinterpret_cast<std::uintptr_t>(x.const_data_ptr()) % kLoadBytes == 0;
}

at::Tensor flash_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const SubSequences& sub_sequences, int64_t sliding_window) {
  const auto& ends = sub_sequences.ends();
  const int64_t longest = sub_sequences.longest();
  // The window counts the positions before the token, without itself; -1: no limit.
  const int64_t left = sliding_window > 0 ? sliding_window - 1 : -1;
  const int64_t right = sliding_window > 0 ? 0 : -1;
  const auto output = std::get<0>(at::_flash_attention_forward(
      rows_of(q), rows_of(k), rows_of(v), ends, ends, longest, longest, /*dropout_p=*/0.0, /*is_causal=*/true,
      /*return_debug_mask=*/false, /*scale=*/std::nullopt, left, right));
  return output.unflatten(0, {q.size(1), q.size(0)}).transpose(0, 1);
}

}  // namespace megatron_cpp::internal
