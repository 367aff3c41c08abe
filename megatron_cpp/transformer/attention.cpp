#include "megatron_cpp/transformer/attention.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "megatron_cpp/transformer/flash_attention.h"
#include "megatron_cpp/transformer/recompute.h"
#include "parallel/named_range.h"
#include "parallel/shard.h"

namespace megatron_cpp {
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

/// Attention of one sub-sequence longer than the window, one block of queries at a time.
std::vector<at::Tensor> windowed_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                           int64_t window, const at::Tensor& mask) {
  const int64_t length = q.size(2);
  std::vector<at::Tensor> blocks;
  for (int64_t begin = 0; begin < length; begin += mask.size(0)) {
    const int64_t rows = std::min(mask.size(0), length - begin);
    const int64_t before = std::min(begin, window - 1);  // keys before the block that it attends to
    const auto block_mask = mask.narrow(0, 0, rows).narrow(1, window - 1 - before, before + rows);
    blocks.push_back(at::scaled_dot_product_attention(q.narrow(2, begin, rows),
                                                      k.narrow(2, begin - before, before + rows),
                                                      v.narrow(2, begin - before, before + rows), block_mask));
  }
  return blocks;
}

/// Attention of queries [n, B, heads, D], which are those of the last n of the positions of k and v.
at::Tensor attention_of_last(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, int64_t sliding_window) {
  const int64_t n = q.size(0);
  const int64_t before = k.size(0) - n;
  std::optional<at::Tensor> mask;  // one query attends to every key that the cache has kept
  if (n > 1) {
    mask = at::ones({n, before + n}, q.options().dtype(at::kBool)).tril_(before);
    if (sliding_window > 0) mask->triu_(before - sliding_window + 1);
  }
  const int64_t groups = k.size(2);
  const int64_t heads_per_group = q.size(2) / groups;
  const auto output = at::scaled_dot_product_attention(group_queries(q, groups), group_keys(k, heads_per_group),
                                                       group_keys(v, heads_per_group), mask);
  return ungroup(output, q.size(1));
}

/// core_attention of positions that go on where `cache` ends; appends them to it.
at::Tensor attention_with_cache(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const SubSequences& sub_sequences, int64_t sliding_window,
                                KeyValueCache::Layer& cache) {
  const int64_t n = sub_sequences.ranges().front().length();
  const bool is_first = !cache.keys.defined();
  const auto appended = [&](const at::Tensor& cached, const at::Tensor& fresh) {
    return is_first ? fresh.narrow(0, 0, n) : at::cat({cached, fresh.narrow(0, 0, n)});
  };
  const auto keys = appended(cache.keys, k);
  const auto values = appended(cache.values, v);
  const int64_t kept = sliding_window > 0 ? std::min(sliding_window - 1, keys.size(0)) : keys.size(0);
  cache = {keys.narrow(0, keys.size(0) - kept, kept), values.narrow(0, keys.size(0) - kept, kept)};
  if (is_first) return core_attention(q, k, v, sub_sequences, sliding_window);
  const auto output = attention_of_last(q.narrow(0, 0, n), keys, values, sliding_window);
  return at::constant_pad_nd(output, {0, 0, 0, 0, 0, 0, 0, q.size(0) - n});
}

}  // namespace

at::Tensor core_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const SubSequences& sub_sequences, int64_t sliding_window) {
  if (internal::flash_attention_takes(q.device().type(), q.scalar_type(), q.size(3))) {
    return internal::flash_attention(q, k, v, sub_sequences, sliding_window);
  }
  const int64_t groups = k.size(2);
  const auto queries = group_queries(q, groups);
  const auto keys = group_keys(k, q.size(2) / groups);
  const auto values = group_keys(v, q.size(2) / groups);
  at::Tensor mask;  // shared by all blocks of all sub-sequences
  std::vector<at::Tensor> outputs;
  for (const auto& range : sub_sequences.ranges()) {
    const auto part = [&](const at::Tensor& x) { return x.narrow(2, range.begin, range.length()); };
    if (sliding_window <= 0 || range.length() <= sliding_window) {
      outputs.push_back(at::scaled_dot_product_attention(part(queries), part(keys), part(values),
                                                         /*attn_mask=*/{}, /*dropout_p=*/0.0, /*is_causal=*/true));
      continue;
    }
    if (!mask.defined()) mask = window_mask(std::max(sliding_window, kSmallestQueryBlock), sliding_window, q.device());
    for (auto& block : windowed_attention(part(queries), part(keys), part(values), sliding_window, mask)) {
      outputs.push_back(std::move(block));
    }
  }
  return ungroup(outputs.size() == 1 ? outputs.front() : at::cat(outputs, 2), q.size(1));
}

SelfAttentionImpl::SelfAttentionImpl(const TransformerConfig& config, const LayerConfig& layer,
                                     const TransformerExecution& execution, const parallel::GroupPtr& tp)
    : num_heads_(parallel::even_shard_size(layer.num_attention_heads, tp->getSize(), "num_attention_heads")),
      num_groups_(parallel::even_shard_size(config.num_query_groups, tp->getSize(), "num_query_groups")),
      head_dim_(config.head_dim),
      sliding_window_(layer.sliding_window),
      sequence_parallel_(execution.sequence_parallel),
      recomputes_core_(execution.recomputed.core_attention),
      rotary_(layer.rotary_dim(config.head_dim), layer.rope_theta, layer.rope_scaling),
      tp_(tp) {
  TORCH_CHECK_VALUE(num_groups_ > 0 && num_heads_ % num_groups_ == 0, "num_attention_heads ", layer.num_attention_heads,
                    " is not divisible by num_query_groups ", config.num_query_groups);
  const int64_t q_features = layer.num_attention_heads * head_dim_;
  const int64_t kv_features = config.num_query_groups * head_dim_;
  const std::vector<OutputPart> parts{
      {"q_proj", q_features}, {"k_proj", kv_features}, {"v_proj", kv_features}, {"g_proj", layer.num_attention_heads}};
  const auto qkv_options = ColumnParallelLinearOptions(config.hidden_size, parts).init_std(config.init_std);
  linear_qkv = register_module("linear_qkv", ColumnParallelLinear(execution.apply_to(qkv_options), tp));
  const auto domain = tp->getSize() > 1 ? GradientDomain::kReplicatedPartial : GradientDomain::kReplicated;
  if (config.qk_layernorm) {
    q_norm = register_module("q_norm", RMSNorm(head_dim_, config.rms_norm_eps, domain));
    k_norm = register_module("k_norm", RMSNorm(head_dim_, config.rms_norm_eps, domain));
  }
  const auto proj_options = RowParallelLinearOptions(q_features, config.hidden_size).init_std(config.init_std);
  linear_proj = register_module("linear_proj", RowParallelLinear(execution.apply_to(proj_options), tp));
}

at::Tensor SelfAttentionImpl::forward(const at::Tensor& input, const AttentionBatch& attention,
                                      KeyValueCache::Layer* cache) {
  TORCH_CHECK_VALUE(input.dim() == 3, "SelfAttention: input ", input.sizes(), " is not [sequence, batch, hidden]");
  const int64_t S = sequence_parallel_ ? input.size(0) * tp_->getSize() : input.size(0);
  TORCH_CHECK_VALUE(attention.sequence_length() == S && attention.batch_size() == input.size(1),
                    "SelfAttention: the input is of ", S, " positions and ", input.size(1),
                    " batch rows, the AttentionBatch of ", attention.sequence_length(), " and ",
                    attention.batch_size());
  const auto& tables = attention.tables(rotary_);

  const auto fused = parallel::in_range("qkv", [&] { return linear_qkv->forward(input); });  // [S, B, q | k | v | g]
  const int64_t q_columns = num_heads_ * head_dim_;
  const int64_t kv_columns = num_groups_ * head_dim_;
  const auto parts = fused.split_with_sizes({q_columns, kv_columns, kv_columns, num_heads_}, -1);
  const auto heads = [&](const at::Tensor& part) { return part.unflatten(-1, {-1, head_dim_}); };
  const auto rotated = [&](RMSNorm& norm, const at::Tensor& part) {
    const parallel::NamedRange range("norm and rotary");
    return apply_rotary(norm ? norm->forward(heads(part)) : heads(part), tables);
  };
  const auto q = rotated(q_norm, parts[0]);
  const auto k = rotated(k_norm, parts[1]);
  const auto v = heads(parts[2]);
  const auto& sub_sequences = attention.sub_sequences();
  const auto attend = [&] {
    if (cache != nullptr) return attention_with_cache(q, k, v, sub_sequences, sliding_window_, *cache);
    if (!recomputes_core_) return core_attention(q, k, v, sub_sequences, sliding_window_);
    const auto body = [sub_sequences, window = sliding_window_](const auto& inputs) {
      return std::vector{core_attention(inputs[0], inputs[1], inputs[2], sub_sequences, window)};
    };
    return recompute(body, {q, k, v})[0];
  };
  const auto output = parallel::in_range("core attention", attend);
  const auto gated = parallel::in_range("head gate", [&] { return output * at::sigmoid(parts[3]).unsqueeze(-1); });
  return parallel::in_range("attention output", [&] { return linear_proj->forward(gated.flatten(2, 3)); });
}

}  // namespace megatron_cpp
