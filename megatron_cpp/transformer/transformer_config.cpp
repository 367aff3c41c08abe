#include "megatron_cpp/transformer/transformer_config.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <string>

#include "parallel/shard.h"

namespace megatron_cpp {
namespace {

void validate_layer(const TransformerConfig& config, const LayerConfig& layer, int64_t number, int t) {
  const auto prefix = fmt::format("layer {} ", number);
  TORCH_CHECK_VALUE(layer.num_attention_heads > 0, prefix, "num_attention_heads ", layer.num_attention_heads,
                    " is not positive");
  parallel::even_shard_size(layer.num_attention_heads, t, prefix + "num_attention_heads");
  TORCH_CHECK_VALUE(layer.num_attention_heads % config.num_query_groups == 0, prefix, "num_attention_heads ",
                    layer.num_attention_heads, " is not divisible by num_query_groups ", config.num_query_groups);
  TORCH_CHECK_VALUE(layer.sliding_window >= 0, prefix, "sliding_window ", layer.sliding_window, " is negative");
  TORCH_CHECK_VALUE(layer.rope_theta > 0.0, prefix, "rope_theta ", layer.rope_theta, " is not positive");
  TORCH_CHECK_VALUE(layer.swiglu_limit >= 0.0, prefix, "swiglu_limit ", layer.swiglu_limit, " is negative");
  TORCH_CHECK_VALUE(layer.partial_rotary_factor > 0.0 && layer.partial_rotary_factor <= 1.0, prefix,
                    "partial_rotary_factor ", layer.partial_rotary_factor, " is not in (0, 1]");
  TORCH_CHECK_VALUE(layer.expert_swiglu_limit >= 0.0, prefix, "expert_swiglu_limit ", layer.expert_swiglu_limit,
                    " is negative");
  TORCH_CHECK_VALUE(!layer.has_experts || config.moe.has_value(), prefix, "has experts, but there is no `moe`");
  const int64_t rotary_dim = layer.rotary_dim(config.head_dim);
  TORCH_CHECK_VALUE(rotary_dim % 2 == 0 && rotary_dim >= 2 && rotary_dim <= config.head_dim, prefix, "rotates ",
                    rotary_dim, " elements of a head (head_dim ", config.head_dim, ", partial_rotary_factor ",
                    layer.partial_rotary_factor, "): wanted an even number from 2 to head_dim");
}

}  // namespace

int64_t LayerConfig::rotary_dim(int64_t head_dim) const {
  return static_cast<int64_t>(static_cast<double>(head_dim) * partial_rotary_factor);
}

void MoEConfig::validate(int tensor_parallel_size, int expert_parallel_size, int expert_tensor_parallel_size) const {
  TORCH_CHECK_VALUE(num_experts > 0, "num_experts ", num_experts, " is not positive");
  TORCH_CHECK_VALUE(router_topk > 0 && router_topk <= num_experts, "router_topk ", router_topk,
                    " is not between 1 and num_experts ", num_experts);
  TORCH_CHECK_VALUE(ffn_hidden_size > 0, "the experts' ffn_hidden_size ", ffn_hidden_size, " is not positive");
  TORCH_CHECK_VALUE(shared_expert_ffn_hidden_size >= 0, "shared_expert_ffn_hidden_size ", shared_expert_ffn_hidden_size,
                    " is negative");
  parallel::even_shard_size(num_experts, expert_parallel_size, "num_experts", "expert-parallel");
  parallel::even_shard_size(ffn_hidden_size, expert_tensor_parallel_size, "the experts' ffn_hidden_size",
                            "expert-tensor-parallel");
  parallel::even_shard_size(shared_expert_ffn_hidden_size, tensor_parallel_size, "shared_expert_ffn_hidden_size");
  const auto check_not_negative = [](double value, const char* name) {
    TORCH_CHECK_VALUE(value >= 0.0, name, " ", value, " is negative");
  };
  check_not_negative(aux_loss_coeff, "moe_aux_loss_coeff");
  check_not_negative(group_balance_loss_coeff, "moe_group_balance_loss_coeff");
  check_not_negative(z_loss_coeff, "moe_z_loss_coeff");
  check_not_negative(router_bias_update_rate, "moe_router_bias_update_rate");
  TORCH_CHECK_VALUE(group_balance_groups > 0 && num_experts % group_balance_groups == 0, "moe_group_balance_groups ",
                    group_balance_groups, " does not divide num_experts ", num_experts);
  TORCH_CHECK_VALUE(group_balance_loss_coeff == 0.0 || group_balance_groups > 1, "moe_group_balance_loss_coeff ",
                    group_balance_loss_coeff,
                    " needs moe_group_balance_groups above 1: with one group the loss is constant");
  TORCH_CHECK_VALUE(router_bias_update_rate == 0.0 || !freeze_router, "moe_router_bias_update_rate ",
                    router_bias_update_rate, " would change the correction bias of a frozen router");
}

void TransformerConfig::validate(int tensor_parallel_size) const {
  const auto check_positive = [](int64_t value, const char* name) {
    TORCH_CHECK_VALUE(value > 0, name, " ", value, " is not positive");
  };
  check_positive(vocabulary_size, "vocabulary_size");
  check_positive(hidden_size, "hidden_size");
  check_positive(head_dim, "head_dim");
  check_positive(num_query_groups, "num_query_groups");
  check_positive(ffn_hidden_size, "ffn_hidden_size");
  TORCH_CHECK_VALUE(rms_norm_eps > 0.0, "rms_norm_eps ", rms_norm_eps, " is not positive");
  TORCH_CHECK_VALUE(init_std >= 0.0, "init_std ", init_std, " is negative");
  parallel::even_shard_size(hidden_size, tensor_parallel_size, "hidden_size");
  parallel::even_shard_size(num_query_groups, tensor_parallel_size, "num_query_groups");
  parallel::even_shard_size(ffn_hidden_size, tensor_parallel_size, "ffn_hidden_size");
  int64_t number = 0;
  for (const auto* list : {&layers, &mtp_layers}) {
    for (const auto& layer : *list) validate_layer(*this, layer, number++, tensor_parallel_size);
  }
}

}  // namespace megatron_cpp
