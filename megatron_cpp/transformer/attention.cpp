#include "megatron_cpp/transformer/attention.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <utility>

namespace megatron {
namespace {

constexpr int64_t kSmallestQueryBlock = 128;

/// [rows, B, heads, D] -> [B * groups, heads / groups, rows, D]: the heads of a group become one batch entry, so that
/// its keys can be shared by stride 0, without copies and on every backend.
at::Tensor group_queries(const at::Tensor& q, int64_t groups) {
  const int64_t heads_per_group = q.size(2) / groups;
  return q.unflatten(2, {groups, heads_per_group}).permute({1, 2, 3, 0, 4}).flatten(0, 1);
}

/// [rows, B, groups, D] -> [B * groups, heads_per_group, rows, D].
at::Tensor group_keys(const at::Tensor& k, int64_t heads_per_group) {
  return k.permute({1, 2, 0, 3}).flatten(0, 1).unsqueeze(1).expand({-1, heads_per_group, -1, -1});
}

/// The inverse of group_queries.
at::Tensor ungroup(const at::Tensor& grouped, int64_t batch) {
  return grouped.unflatten(0, {batch, -1}).permute({3, 0, 1, 2, 4}).flatten(2, 3);
}

/// [block, block + window - 1]: query i of a block sees columns [i, i + window), column 0 being window - 1 positions
/// before the block.
at::Tensor window_mask(int64_t block, int64_t window, at::Device device) {
  return at::ones({block, block + window - 1}, at::TensorOptions(at::kBool).device(device)).triu_(0).tril_(window - 1);
}

/// One sub-sequence whose length is beyond the window, block of queries by block of queries.
std::vector<at::Tensor> windowed_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                           int64_t window, const at::Tensor& mask) {
  const int64_t length = q.size(2);
  std::vector<at::Tensor> blocks;
  for (int64_t begin = 0; begin < length; begin += mask.size(0)) {
    const int64_t rows = std::min(mask.size(0), length - begin);
    const int64_t before = std::min(begin, window - 1);  // keys in front of the block that it sees
    const auto block_mask = mask.narrow(0, 0, rows).narrow(1, window - 1 - before, before + rows);
    blocks.push_back(at::scaled_dot_product_attention(q.narrow(2, begin, rows),
                                                      k.narrow(2, begin - before, before + rows),
                                                      v.narrow(2, begin - before, before + rows), block_mask));
  }
  return blocks;
}

/// Flash attention over all sub-sequences in one call. Never run yet: written without a GPU at hand.
at::Tensor flash_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const std::vector<parallel::Range>& segments, int64_t sliding_window) {
  // Rows (b, s) one after the other; every batch row has the same sub-sequences (just one if B > 1).
  const int64_t S = q.size(0);
  const int64_t B = q.size(1);
  std::vector<int32_t> ends{0};
  int64_t longest = 0;
  for (int64_t b = 0; b < B; ++b) {
    for (const auto& segment : segments) {
      ends.push_back(static_cast<int32_t>(b * S + segment.end));
      longest = std::max(longest, segment.length());
    }
  }
  const auto cu_seqlens = at::tensor(ends, at::kInt).to(q.device());
  const auto rows = [](const at::Tensor& x) { return x.transpose(0, 1).flatten(0, 1); };
  // The window counts the positions before the token, without itself; -1: no limit.
  const int64_t left = sliding_window > 0 ? sliding_window - 1 : -1;
  const int64_t right = sliding_window > 0 ? 0 : -1;
  const auto output = std::get<0>(at::_flash_attention_forward(
      rows(q), rows(k), rows(v), cu_seqlens, cu_seqlens, longest, longest, /*dropout_p=*/0.0, /*is_causal=*/true,
      /*return_debug_mask=*/false, /*scale=*/std::nullopt, left, right));
  return output.unflatten(0, {B, S}).transpose(0, 1);
}

bool flash_attention_applies(const at::Tensor& q) {
  return q.is_cuda() && (q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16);
}

/// The checked, contiguous cu_seqlens as sub-sequences.
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

}  // namespace

std::vector<parallel::Range> sub_sequences(const AttentionInput& input, int64_t S, int64_t B) {
  const auto& ids = input.position_ids;
  TORCH_CHECK_VALUE(ids.defined(), "position_ids are missing: wanted [1, ", S, "] or [", B, ", ", S, "]");
  TORCH_CHECK_VALUE(
      ids.dim() == 2 && ids.scalar_type() == at::kLong && ids.size(1) == S && (ids.size(0) == 1 || ids.size(0) == B),
      "position_ids are ", ids.sizes(), " ", ids.scalar_type(), ", wanted [1, ", S, "] or [", B, ", ", S, "] int64");
  if (!input.cu_seqlens.defined()) return {{0, S}};
  return packed_sub_sequences(input.cu_seqlens, S, B);
}

at::Tensor core_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const std::vector<parallel::Range>& segments, int64_t sliding_window) {
  if (flash_attention_applies(q)) return flash_attention(q, k, v, segments, sliding_window);
  const int64_t groups = k.size(2);
  const auto queries = group_queries(q, groups);
  const auto keys = group_keys(k, q.size(2) / groups);
  const auto values = group_keys(v, q.size(2) / groups);
  at::Tensor mask;  // of all blocks of all sub-sequences
  std::vector<at::Tensor> outputs;
  for (const auto& segment : segments) {
    const auto of_segment = [&](const at::Tensor& x) { return x.narrow(2, segment.begin, segment.length()); };
    if (sliding_window <= 0 || segment.length() <= sliding_window) {
      outputs.push_back(at::scaled_dot_product_attention(of_segment(queries), of_segment(keys), of_segment(values),
                                                         /*attn_mask=*/{}, /*dropout_p=*/0.0, /*is_causal=*/true));
      continue;
    }
    if (!mask.defined()) mask = window_mask(std::max(sliding_window, kSmallestQueryBlock), sliding_window, q.device());
    for (auto& block :
         windowed_attention(of_segment(queries), of_segment(keys), of_segment(values), sliding_window, mask)) {
      outputs.push_back(std::move(block));
    }
  }
  return ungroup(outputs.size() == 1 ? outputs.front() : at::cat(outputs, 2), q.size(1));
}

SelfAttentionImpl::SelfAttentionImpl(const TransformerConfig& config, const AttentionLayerConfig& layer,
                                     const parallel::GroupPtr& tp)
    : num_heads_(parallel::even_shard_size(layer.num_attention_heads, tp->getSize(), "num_attention_heads")),
      num_groups_(parallel::even_shard_size(config.num_query_groups, tp->getSize(), "num_query_groups")),
      head_dim_(config.head_dim),
      sliding_window_(layer.sliding_window),
      sequence_parallel_(config.sequence_parallel),
      rotary_(layer.rotary_dim(config.head_dim), layer.rope_theta, layer.rope_scaling),
      tp_(tp) {
  TORCH_CHECK_VALUE(num_groups_ > 0 && num_heads_ % num_groups_ == 0, "num_attention_heads ", layer.num_attention_heads,
                    " is not divisible by num_query_groups ", config.num_query_groups);
  const int64_t q_features = layer.num_attention_heads * head_dim_;
  const int64_t kv_features = config.num_query_groups * head_dim_;
  const std::vector<OutputPart> parts{
      {"q_proj", q_features}, {"k_proj", kv_features}, {"v_proj", kv_features}, {"g_proj", layer.num_attention_heads}};
  linear_qkv = register_module("linear_qkv", ColumnParallelLinear(ColumnParallelLinearOptions(config.hidden_size, parts)
                                                                      .sequence_parallel(config.sequence_parallel)
                                                                      .accumulate_into_grad(config.accumulate_into_grad)
                                                                      .init_std(config.init_std),
                                                                  tp));
  const auto rule = tp->getSize() > 1 ? GradientRule::kReplicatedPartial : GradientRule::kReplicated;
  q_norm = register_module("q_norm", RMSNorm(head_dim_, config.rms_norm_eps, rule));
  k_norm = register_module("k_norm", RMSNorm(head_dim_, config.rms_norm_eps, rule));
  linear_proj =
      register_module("linear_proj", RowParallelLinear(RowParallelLinearOptions(q_features, config.hidden_size)
                                                           .sequence_parallel(config.sequence_parallel)
                                                           .accumulate_into_grad(config.accumulate_into_grad)
                                                           .init_std(config.init_std),
                                                       tp));
}

at::Tensor SelfAttentionImpl::forward(const at::Tensor& input, const AttentionInput& attention) {
  TORCH_CHECK_VALUE(input.dim() == 3, "SelfAttention: input ", input.sizes(), " is not [sequence, batch, hidden]");
  const int64_t S = sequence_parallel_ ? input.size(0) * tp_->getSize() : input.size(0);
  const auto segments = sub_sequences(attention, S, input.size(1));
  const auto tables = rotary_.tables(attention.position_ids, input.device());

  const auto fused = linear_qkv->forward(input);  // [S, B, q | k | v | g]
  const int64_t q_columns = num_heads_ * head_dim_;
  const int64_t kv_columns = num_groups_ * head_dim_;
  const auto parts = fused.split_with_sizes({q_columns, kv_columns, kv_columns, num_heads_}, -1);
  const auto heads = [&](const at::Tensor& part) { return part.unflatten(-1, {-1, head_dim_}); };
  const auto q = apply_rotary(q_norm->forward(heads(parts[0])), tables);
  const auto k = apply_rotary(k_norm->forward(heads(parts[1])), tables);
  const auto output = core_attention(q, k, heads(parts[2]), segments, sliding_window_);
  const auto gated = output * at::sigmoid(parts[3]).unsqueeze(-1);
  return linear_proj->forward(gated.flatten(2, 3));
}

}  // namespace megatron
