// The shape of a decoder.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace megatron_cpp {

/// The frequency scaling that configurations call rope_type "llama3": wavelengths beyond
/// original_max_position_embeddings / low_freq_factor are stretched by `factor`, those below
/// original_max_position_embeddings / high_freq_factor stay, and between them the two are blended linearly.
struct Llama3RopeScaling {
  double factor = 1.0;                              ///< how much long wavelengths are stretched; 1: not at all
  double low_freq_factor = 1.0;                     ///< wavelengths above original context / this value are stretched
  double high_freq_factor = 4.0;                    ///< wavelengths below original context / this value stay
  int64_t original_max_position_embeddings = 8192;  ///< positions the model was trained for before the scaling

  bool operator==(const Llama3RopeScaling&) const = default;  ///< every number alike
};

/// What may differ from layer to layer.
struct LayerConfig {
  int64_t num_attention_heads = 0;     ///< query heads
  int64_t sliding_window = 0;          ///< positions a token attends to, itself included; 0: all before it
  double rope_theta = 10000.0;         ///< base of the rotary frequencies
  double partial_rotary_factor = 1.0;  ///< share of each head that is rotated, from its beginning
  std::optional<Llama3RopeScaling> rope_scaling = std::nullopt;  ///< Step3.7: of full-attention layers only
  double swiglu_limit = 0.0;         ///< of the dense feed-forward or the shared expert; 0: no clamp
  bool has_experts = false;          ///< whether the feed-forward is TransformerConfig::moe, not a dense one
  double expert_swiglu_limit = 0.0;  ///< of the routed experts; 0: no clamp

  /// Rotated elements of a head: head_dim * partial_rotary_factor, rounded down.
  int64_t rotary_dim(int64_t head_dim) const;

  bool operator==(const LayerConfig&) const = default;  ///< every field alike
};

/// The mixture of experts of the layers with LayerConfig::has_experts: a router chooses for each token the
/// `router_topk` of `num_experts` experts whose outputs are added, and a shared expert sees every token.
struct MoEConfig {
  int64_t num_experts = 0;                    ///< E, divisible by the expert-parallel size
  int64_t router_topk = 0;                    ///< K, experts of each token, at most E
  int64_t ffn_hidden_size = 0;                ///< I of a routed expert, divisible by the expert-tensor-parallel size
  int64_t shared_expert_ffn_hidden_size = 0;  ///< of the shared expert, divisible by t; 0: there is none
  double router_scaling_factor = 1.0;         ///< of the sum of the routed experts' outputs
  bool router_in_float32 = true;              ///< whether logits are computed in float32; false: in the weights' dtype
  bool freeze_router = false;                 ///< the router is not trained
  // Training: RouterStatistics::losses has the formulas, ExpertBalance the bias rule.
  double aux_loss_coeff = 0.0;            ///< of the load-balancing loss; 0: none
  double group_balance_loss_coeff = 0.0;  ///< of the balance loss over groups of experts; 0: none
  int64_t group_balance_groups = 1;       ///< G of that loss, a divisor of E, above 1 if there is the loss
  double z_loss_coeff = 0.0;              ///< of the z-loss; 0: none
  double router_bias_update_rate = 0.0;   ///< what a step adds to or takes from the correction biases; 0: nothing

  /// Not collective.
  /// @throws c10::ValueError naming the numbers: a size that isn't positive, topk above num_experts, sizes that the
  ///         groups don't divide, a negative coefficient or rate, groups that don't divide num_experts or are too few
  ///         for their loss, or a bias rule for a frozen router.
  void validate(int tensor_parallel_size, int expert_parallel_size, int expert_tensor_parallel_size) const;

  bool operator==(const MoEConfig&) const = default;  ///< every field alike
};

/// The shape of a decoder with grouped-query attention, norms of q and k, a gate per head, and SwiGLU feed-forwards or
/// mixtures of experts. How it runs is in TransformerExecution, over which ranks in ModelGroups.
struct TransformerConfig {
  int64_t vocabulary_size = 0;               ///< V, without padding; any number
  int64_t hidden_size = 0;                   ///< H, divisible by t
  int64_t head_dim = 0;                      ///< D, elements of a query, key or value head; heads * D need not be H
  int64_t num_query_groups = 0;              ///< key/value heads, the same in every layer
  int64_t ffn_hidden_size = 0;               ///< F, divisible by t
  double rms_norm_eps = 1e-5;                ///< added to the mean square in every norm
  int64_t embedding_padding_idx = -1;        ///< row of the word embedding that gets no gradient; -1: none
  double init_std = 0.02;                    ///< standard deviation of the initial weights of matrices
  bool qk_layernorm = true;                  ///< whether q and k are normed per head, before they are rotated
  std::vector<LayerConfig> layers;           ///< one entry per layer
  std::vector<LayerConfig> mtp_layers = {};  ///< of multi-token prediction, behind the decoder; dense or with experts
  /// Which hidden states a layer of multi-token prediction passes on: those behind its norm, as the decoder does then
  /// (Megatron-Core), or those before it (as the released Step3.7 is run by vLLM).
  bool mtp_chain_after_norm = false;
  std::optional<MoEConfig> moe = std::nullopt;  ///< given if a layer has experts

  /// Entries of `layers`.
  int64_t num_layers() const { return static_cast<int64_t>(layers.size()); }

  /// Not collective.
  /// @throws c10::ValueError naming the layer and the numbers: a size that isn't positive; hidden_size,
  ///         num_query_groups, ffn_hidden_size or a layer's num_attention_heads not divisible by
  ///         `tensor_parallel_size`; heads not divisible by groups; a window or limit below 0; a number of rotated
  ///         elements that is odd, or not in [2, head_dim]; a layer with experts without `moe`. What `moe` holds is
  ///         checked by MoEConfig::validate.
  void validate(int tensor_parallel_size) const;

  bool operator==(const TransformerConfig&) const = default;  ///< every field alike
};

}  // namespace megatron_cpp
