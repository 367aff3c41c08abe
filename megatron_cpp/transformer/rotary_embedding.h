// Rotary position embedding, half-split: element i of the rotated part is paired with element i + rotary_dim/2.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "megatron_cpp/transformer/transformer_config.h"

namespace megatron_cpp {

/// Cosines and sines of the angles of every position: float32 [S, B or 1, 1, rotary_dim/2].
struct RotaryTables {
  at::Tensor cos;  ///< of position * inverse frequency
  at::Tensor sin;  ///< of the same angles
};

/// Frequencies of one layer: position p rotates pair i by p * theta^(-2i/rotary_dim) radians, scaled if given.
class RotaryEmbedding {
 public:
  /// @param rotary_dim  elements of a head that are rotated, even.
  /// @throws c10::ValueError if rotary_dim isn't even and positive.
  RotaryEmbedding(int64_t rotary_dim, double theta, const std::optional<Llama3RopeScaling>& scaling = {});

  /// @param position_ids  [1, S] or [B, S] int64, any device.
  /// @return              on `device`, without waiting for it. Not collective.
  RotaryTables tables(const at::Tensor& position_ids, at::Device device) const;

  /// Radians per position, for each pair: [rotary_dim/2] float32 on the CPU.
  const at::Tensor& inverse_frequencies() const { return inverse_frequencies_; }

  /// Whether both were made alike: then their tables are equal.
  bool operator==(const RotaryEmbedding& other) const {
    return rotary_dim_ == other.rotary_dim_ && theta_ == other.theta_ && scaling_ == other.scaling_;
  }

 private:
  int64_t rotary_dim_;
  double theta_;
  std::optional<Llama3RopeScaling> scaling_;
  at::Tensor inverse_frequencies_;  ///< [rotary_dim/2] float32 on the CPU; not a buffer: to(bfloat16) must not round it
};

/// Rotates the first rotary_dim elements of each head; the others pass. Computed in float32, rounded to x's dtype.
/// @param x  [S, B, heads, head_dim], head_dim >= rotary_dim.
/// @return   the same shape and dtype. Its backward saves the tables only; double backward throws
///           c10::NotImplementedError. No communication.
at::Tensor apply_rotary(const at::Tensor& x, const RotaryTables& tables);

}  // namespace megatron_cpp
