// Which positions of a sequence each rank of a group owns. Pure arithmetic.
#pragma once

#include <cstdint>
#include <vector>

#include "parallel/shard.h"

namespace megatron_cpp::parallel {

/// How the S positions of a sequence are distributed over the ranks of a group. All code asks this class which rank
/// owns which positions, so that layouts with several pieces per rank (context parallelism) can be added in one place.
class SequenceLayout {
 public:
  /// Every rank owns `ranges[rank]`, in increasing order; together they are [0, S), and no two overlap.
  /// @throws c10::ValueError naming the first position that no rank or two ranks own.
  explicit SequenceLayout(std::vector<std::vector<Range>> ranges);

  /// Rank r of t owns [r·S/t, (r+1)·S/t): sequence parallelism.
  /// @throws c10::ValueError "sequence length 10 is not divisible by tensor-parallel size 4" if S % t != 0.
  static SequenceLayout contiguous(int64_t sequence_length, int num_ranks);

  int64_t sequence_length() const { return sequence_length_; }        ///< S
  int num_ranks() const { return static_cast<int>(ranges_.size()); }  ///< of the group
  /// The positions of a rank, in the order of its rows.
  const std::vector<Range>& ranges_of(int rank) const { return ranges_.at(static_cast<size_t>(rank)); }
  /// How many positions a rank owns.
  int64_t num_positions_of(int rank) const;

  /// The owner of a position of the sequence.
  struct Place {
    int rank = 0;          ///< the rank that owns it
    int64_t position = 0;  ///< its number among the positions of that rank
  };
  /// The place of `position`, in [0, S).
  Place place_of(int64_t position) const;

 private:
  struct Piece {
    Range range;
    Place begin;
  };
  int64_t sequence_length_ = 0;
  std::vector<std::vector<Range>> ranges_;
  std::vector<Piece> pieces_;  ///< of all ranks, by position
};

}  // namespace megatron_cpp::parallel
