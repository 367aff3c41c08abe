// Positions and sub-sequences of the tokens of a batch, for the layers of a decoder.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "megatron_cpp/transformer/rotary_embedding.h"
#include "parallel/shard.h"

namespace megatron_cpp {

/// Positions and sub-sequences of the tokens of a batch. Describes the whole sequence, on every rank, also under
/// sequence parallelism.
struct AttentionInput {
  at::Tensor position_ids;  ///< [1, S] (for all batch rows) or [B, S] int64
  at::Tensor cu_seqlens;    ///< [k+1] int32 on the CPU: sub-sequence i is [cu_seqlens[i], cu_seqlens[i+1]) of the one
                            ///< batch row. Undefined: every batch row is one sequence.
};

/// The parts of the sequence between which there is no attention; every batch row has the same.
class SubSequences {
 public:
  /// @param ranges  none of length 0; together they cover [0, S), in order.
  /// @param device  of the layers; a GPU gets its copy of the ends here, without waiting.
  SubSequences(std::vector<parallel::Range> ranges, int64_t batch_size, const c10::Device& device);

  /// As given to the constructor.
  const std::vector<parallel::Range>& ranges() const { return ranges_; }
  /// Positions of the longest one.
  int64_t longest() const { return longest_; }
  /// On a GPU, [B·k+1] int32: 0, then where each sub-sequence ends, with the batch rows one after the other. Undefined
  /// on the CPU, where no kernel reads it.
  const at::Tensor& ends() const { return ends_; }

 private:
  std::vector<parallel::Range> ranges_;
  int64_t longest_ = 0;
  at::Tensor ends_;
};

/// An AttentionInput, checked and prepared on the device of the layers: made once per forward pass, so that no layer
/// copies anything from the host. TransformerBlock makes one for its layers.
class AttentionBatch {
 public:
  /// @param S, B      sizes of the whole sequence and of the batch.
  /// @param rotaries  of the layers that will be given this: equal ones share their tables.
  /// @param device    of the layers.
  /// Not collective. Throws c10::ValueError, the same on every rank, if position_ids is not [1, S] or [B, S] int64, or
  /// cu_seqlens is given with B > 1, is not int32 on the CPU, decreases, or does not run from 0 to S. Empty
  /// sub-sequences are left out.
  AttentionBatch(const AttentionInput& input, int64_t S, int64_t B, const std::vector<RotaryEmbedding>& rotaries,
                 const c10::Device& device);

  int64_t sequence_length() const { return sequence_length_; }          ///< S
  int64_t batch_size() const { return batch_size_; }                    ///< B
  const SubSequences& sub_sequences() const { return sub_sequences_; }  ///< of each batch row
  /// The tables of `rotary` for these positions. Throws c10::ValueError if it wasn't among the rotaries given.
  const RotaryTables& tables(const RotaryEmbedding& rotary) const;

 private:
  int64_t sequence_length_;
  int64_t batch_size_;
  SubSequences sub_sequences_;
  std::vector<std::pair<RotaryEmbedding, RotaryTables>> tables_;  ///< of different rotaries
};

}  // namespace megatron_cpp
