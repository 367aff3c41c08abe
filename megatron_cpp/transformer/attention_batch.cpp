#include "megatron_cpp/transformer/attention_batch.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "megatron_cpp/tensor_parallel/to_device.h"

namespace megatron_cpp {
namespace {

/// The sub-sequences of cu_seqlens, after checking it.
std::vector<parallel::Range> packed_sub_sequences(const at::Tensor& cu_seqlens, int64_t S, int64_t B) {
  TORCH_CHECK_VALUE(B == 1, "cu_seqlens describe one packed batch row, but the batch has ", B);
  TORCH_CHECK_VALUE(
      cu_seqlens.is_cpu() && cu_seqlens.scalar_type() == at::kInt && cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 2,
      "cu_seqlens must be [k+1] int32 on the CPU, got ", cu_seqlens.sizes(), " ", cu_seqlens.scalar_type(), " on ",
      cu_seqlens.device());
  const auto contiguous = cu_seqlens.contiguous();
  const auto* ends = contiguous.const_data_ptr<int32_t>();
  const int64_t count = cu_seqlens.size(0) - 1;
  TORCH_CHECK_VALUE(ends[0] == 0 && ends[count] == S, "cu_seqlens run from ", ends[0], " to ", ends[count],
                    ", the sequence from 0 to ", S);
  std::vector<parallel::Range> result;
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_VALUE(ends[i] <= ends[i + 1], "cu_seqlens decrease at entry ", i + 1, ": ", ends[i], " to ",
                      ends[i + 1]);
    if (ends[i] < ends[i + 1]) result.push_back({ends[i], ends[i + 1]});
  }
  return result;
}

std::vector<parallel::Range> checked_ranges(const AttentionInput& input, int64_t S, int64_t B) {
  const auto& ids = input.position_ids;
  TORCH_CHECK_VALUE(ids.defined(), "position_ids are missing: wanted [1, ", S, "] or [", B, ", ", S, "]");
  TORCH_CHECK_VALUE(
      ids.dim() == 2 && ids.scalar_type() == at::kLong && ids.size(1) == S && (ids.size(0) == 1 || ids.size(0) == B),
      "position_ids are ", ids.sizes(), " ", ids.scalar_type(), ", wanted [1, ", S, "] or [", B, ", ", S, "] int64");
  if (!input.cu_seqlens.defined()) return {{0, S}};
  return packed_sub_sequences(input.cu_seqlens, S, B);
}

}  // namespace

SubSequences::SubSequences(std::vector<parallel::Range> ranges, int64_t batch_size, const c10::Device& device)
    : ranges_(std::move(ranges)) {
  for (const auto& range : ranges_) longest_ = std::max(longest_, range.length());
  if (device.is_cpu()) return;
  const int64_t S = ranges_.empty() ? 0 : ranges_.back().end;
  std::vector<int32_t> ends{0};
  for (int64_t row = 0; row < batch_size; ++row) {
    for (const auto& range : ranges_) ends.push_back(static_cast<int32_t>(row * S + range.end));
  }
  ends_ = internal::to_device(at::tensor(ends, at::kInt), device);
}

AttentionBatch::AttentionBatch(const AttentionInput& input, int64_t S, int64_t B,
                               const std::vector<RotaryEmbedding>& rotaries, const c10::Device& device)
    : sequence_length_(S), batch_size_(B), sub_sequences_(checked_ranges(input, S, B), B, device) {
  const auto position_ids = internal::to_device(input.position_ids, device);
  for (const auto& rotary : rotaries) {
    const auto same = [&](const auto& entry) { return entry.first == rotary; };
    if (std::any_of(tables_.begin(), tables_.end(), same)) continue;
    tables_.emplace_back(rotary, rotary.tables(position_ids, device));
  }
}

const RotaryTables& AttentionBatch::tables(const RotaryEmbedding& rotary) const {
  const auto found =
      std::find_if(tables_.begin(), tables_.end(), [&](const auto& entry) { return entry.first == rotary; });
  TORCH_CHECK_VALUE(found != tables_.end(), "the AttentionBatch was made without this layer's rotary embedding");
  return found->second;
}

}  // namespace megatron_cpp
