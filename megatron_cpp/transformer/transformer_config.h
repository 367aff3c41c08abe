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
struct AttentionLayerConfig {
  int64_t num_attention_heads = 0;                ///< query heads
  int64_t sliding_window = 0;                     ///< positions a token attends to, itself included; 0: all before it
  double rope_theta = 10000.0;                    ///< base of the rotary frequencies
  double partial_rotary_factor = 1.0;             ///< share of each head that is rotated, from its beginning
  std::optional<Llama3RopeScaling> rope_scaling;  ///< Step3.7: of full-attention layers only
  double swiglu_limit = 0.0;                      ///< of the layer's feed-forward; 0: no clamp

  /// Rotated elements of a head: head_dim * partial_rotary_factor, rounded down.
  int64_t rotary_dim(int64_t head_dim) const;
};

/// The shape of a decoder with grouped-query attention, norms of q and k, a gate per head, and SwiGLU feed-forwards.
/// How it runs is in TransformerExecution, over which ranks in ModelGroups.
struct TransformerConfig {
  int64_t vocabulary_size = 0;               ///< V, without padding; any number
  int64_t hidden_size = 0;                   ///< H, divisible by t
  int64_t head_dim = 0;                      ///< D, elements of a query, key or value head; heads * D need not be H
  int64_t num_query_groups = 0;              ///< key/value heads, the same in every layer
  int64_t ffn_hidden_size = 0;               ///< F, divisible by t
  double rms_norm_eps = 1e-5;                ///< added to the mean square in every norm
  double init_std = 0.02;                    ///< standard deviation of the initial weights of matrices
  std::vector<AttentionLayerConfig> layers;  ///< one entry per layer

  /// Entries of `layers`.
  int64_t num_layers() const { return static_cast<int64_t>(layers.size()); }

  /// Not collective.
  /// @throws c10::ValueError naming the layer and the numbers: a size that isn't positive; hidden_size,
  ///         num_query_groups, ffn_hidden_size or a layer's num_attention_heads not divisible by
  ///         `tensor_parallel_size`; heads not divisible by groups; a window or limit below 0; a number of rotated
  ///         elements that is odd, or not in [2, head_dim].
  void validate(int tensor_parallel_size) const;
};

}  // namespace megatron_cpp
