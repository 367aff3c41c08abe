// What the routers of a forward pass say of its tokens, and the losses that are made of it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "megatron_cpp/transformer/moe/router.h"
#include "megatron_cpp/transformer/transformer_config.h"
#include "parallel/group.h"

namespace megatron_cpp {

/// Names of the losses that MoEConfig's coefficients switch on, in the order of RouterStatistics::losses:
/// load_balancing_loss, group_balance_loss, z_loss.
std::vector<std::string> router_loss_names(const MoEConfig& config);

/// What one layer with experts brings.
struct LayerStatistics {
  at::Tensor tokens_per_expert;  ///< [E] float64: this rank's tokens that went to each expert
  at::Tensor
      sums;  ///< [2E + G + 2] float64, with gradient: what the losses are made of; undefined without coefficients
};

/// Sums over the tokens of one forward pass, layer by layer. A forward pass that is given one (TransformerBlock, down
/// to MoELayer) adds its layers' sums, once each; a caller that computes a layer again gives that pass another one.
/// Padding isn't counted. Sums are in float64, so that counts are exact.
class RouterStatistics {
 public:
  /// @param padding_mask  [B, S] of any dtype, on the device of the layers: not 0 where there is padding instead of a
  ///                      token. Undefined: there is none. Equal on every rank of tp.
  explicit RouterStatistics(at::Tensor padding_mask = {}) : padding_mask_(std::move(padding_mask)) {}

  /// As given to the constructor.
  const at::Tensor& padding_mask() const { return padding_mask_; }

  /// Adds the next layer with experts. No communication.
  /// @param routing  of this rank's n tokens.
  /// @param begin    number of the first of them among the S·B of the batch, in the order of a [S, B] tensor.
  void add(const Routing& routing, const MoEConfig& config, int64_t begin);

  /// Adds what another one counted of the next layer.
  void add(LayerStatistics layer) { layers_.push_back(std::move(layer)); }

  /// One entry a layer, in the order in which they were added.
  const std::vector<LayerStatistics>& layers() const { return layers_; }

  /// [layers, E] without gradient: this rank's tokens that went to each expert. One layer at least was added.
  at::Tensor tokens_per_expert() const;

  /// The losses of router_loss_names, float64 scalars with gradient, equal on every rank of `tp`: means over the T
  /// tokens of all its ranks, summed over the layers, times their coefficients. s_e are a token's scores (of all E
  /// experts, without the correction bias) divided by their sum, P_e the sum of s_e over the tokens.
  ///  - load_balancing_loss: E / (K T²) Σ_e P_e N_e, where N_e counts the tokens that have s_e among their K highest
  ///    (Megatron-Core's "aux_loss", moe_utils.py: switch_load_balancing_loss_func).
  ///  - group_balance_loss: G Σ_g f_g p_g over G groups of E/G consecutive experts, where f_g is the share of tokens
  ///    that are routed to any expert of the group, and p_g the mean of the sum of its s_e (Step-3.5-Flash, arXiv
  ///    2602.10604: the EP-group balance loss).
  ///  - z_loss: the mean of logsumexp(logits)² (Megatron-Core's z_loss_func).
  /// Backward leaves on each rank the gradient that its own tokens bring.
  /// Comm: 1 all-reduce over tp of 2E + G + 2 numbers a layer, none without coefficients; backward none. Collective
  /// over tp. At least one layer was added.
  std::vector<at::Tensor> losses(const MoEConfig& config, const parallel::GroupPtr& tp) const;

 private:
  at::Tensor padding_mask_;
  std::vector<LayerStatistics> layers_;
};

}  // namespace megatron_cpp
