// Packing: several samples one after the other in one sequence, told apart by position ids and cu_seqlens.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace megatron_cpp {

/// Label of a position that doesn't count in the loss.
inline constexpr int64_t kIgnoreIndex = -100;

/// One training sample. L tokens give L - 1 positions: token i predicts token i + 1.
struct Sample {
  std::vector<int64_t> tokens;     ///< at least two
  std::vector<uint8_t> loss_mask;  ///< per token: 1 if predicting it counts in the loss, else 0
};

/// What becomes of a sample with more than max_length positions; none is ever cut.
enum class OversizePolicy {
  kDrop,    ///< left out, and reported: Result::kDropped, PackedSamples::dropped
  kExtend,  ///< gets a sequence of its own, longer than max_length
};

/// How long sequences are and what fills them up.
struct PackingOptions {
  int64_t max_length = 2048;                        ///< positions of all samples in a sequence, without padding
  int64_t pad_to = 64;                              ///< S is a multiple of this; for tensor parallelism lcm(64, t, 16)
  int64_t pad_token = 0;                            ///< id at positions of the padding, whose labels are kIgnoreIndex
  OversizePolicy oversize = OversizePolicy::kDrop;  ///< of samples longer than max_length

  /// @throws c10::ValueError if max_length or pad_to isn't positive.
  void validate() const;
};

/// One packed sequence, on the CPU. B is 1; S counts the padding, which is a sub-sequence of its own at the end.
struct PackedBatch {
  at::Tensor tokens;        ///< [1, S] int64: tokens[:-1] of each sample
  at::Tensor labels;        ///< [1, S] int64: tokens[1:] of each sample, kIgnoreIndex where loss_mask is 0
  at::Tensor loss_mask;     ///< [1, S] int64: loss_mask[1:] of each sample
  at::Tensor position_ids;  ///< [1, S] int64: from 0 in each sub-sequence
  at::Tensor cu_seqlens;    ///< [k + 1] int32: 0, then the end of each of the k sub-sequences; the last is S
  at::Tensor padding_mask;  ///< [1, S] int64: 1 at positions of the padding, else 0
};

/// Joins several sequences into one; their sub-sequences stay separate, and so do their paddings.
/// @throws c10::ValueError if there is none, or S doesn't fit in int32.
PackedBatch concatenate(const std::vector<PackedBatch>& batches);

/// Fills one sequence after the other with samples in the order given.
///
/// A caller that draws from a resumable sampler needs no other state to resume exactly: at kFull it finishes the
/// sequence and adds the same sample again, so every sequence starts at a known draw.
class SamplePacker {
 public:
  /// What became of a sample.
  enum class Result {
    kAdded,
    kFull,     ///< doesn't fit into the current sequence: call finish() and add it again
    kDropped,  ///< too long for any sequence, and the policy is kDrop
  };

  /// @throws c10::ValueError as PackingOptions::validate().
  explicit SamplePacker(const PackingOptions& options);

  /// @throws c10::ValueError if the sample has fewer than two tokens, or a mask of another length.
  Result add(const Sample& sample);

  /// Whether no sample was added since the last finish().
  bool empty() const { return ends_.empty(); }
  /// Samples added since the last finish().
  int64_t num_samples() const { return static_cast<int64_t>(ends_.size()); }
  /// Positions they take, without padding.
  int64_t num_positions() const { return static_cast<int64_t>(tokens_.size()); }

  /// The sequence of the samples added since the last call, padded. The packer is empty afterwards.
  /// @throws c10::ValueError if no sample was added, or S doesn't fit in int32.
  PackedBatch finish();

 private:
  PackingOptions options_;
  std::vector<int64_t> tokens_;
  std::vector<int64_t> labels_;
  std::vector<int64_t> loss_mask_;
  std::vector<int64_t> position_ids_;
  std::vector<int32_t> ends_;  ///< of each sample
};

/// Packed sequences and where the samples went, by index into the list that was packed.
struct PackedSamples {
  std::vector<PackedBatch> batches;           ///< in the order of their first samples
  std::vector<std::vector<int64_t>> samples;  ///< per batch, in order
  std::vector<int64_t> dropped;               ///< too long for any sequence, under OversizePolicy::kDrop
};

/// Packs a whole list by SamplePacker. No samples give no batches.
PackedSamples pack(const std::vector<Sample>& samples, const PackingOptions& options);

}  // namespace megatron_cpp
