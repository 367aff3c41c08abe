#include "parallel/sequence_layout.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <utility>

namespace megatron_cpp::parallel {

SequenceLayout::SequenceLayout(std::vector<std::vector<Range>> ranges) : ranges_(std::move(ranges)) {
  for (size_t rank = 0; rank < ranges_.size(); ++rank) {
    int64_t own = 0;
    for (const auto& range : ranges_[rank]) {
      pieces_.push_back({range, {static_cast<int>(rank), own}});
      own += range.length();
    }
  }
  std::erase_if(pieces_, [](const Piece& piece) { return piece.range.length() == 0; });
  std::sort(pieces_.begin(), pieces_.end(),
            [](const Piece& a, const Piece& b) { return a.range.begin < b.range.begin; });
  for (const auto& piece : pieces_) {
    TORCH_CHECK_VALUE(piece.range.length() > 0 && piece.range.begin == sequence_length_, "position ",
                      std::min(piece.range.begin, sequence_length_), " of the sequence has ",
                      piece.range.begin > sequence_length_ ? "no owner" : "two owners");
    sequence_length_ = piece.range.end;
  }
}

SequenceLayout SequenceLayout::contiguous(int64_t sequence_length, int num_ranks) {
  std::vector<std::vector<Range>> ranges;
  for (int rank = 0; rank < num_ranks; ++rank) {
    ranges.push_back({even_shard(sequence_length, num_ranks, rank, "sequence length")});
  }
  return SequenceLayout(std::move(ranges));
}

int64_t SequenceLayout::num_positions_of(int rank) const {
  int64_t positions = 0;
  for (const auto& range : ranges_of(rank)) positions += range.length();
  return positions;
}

SequenceLayout::Place SequenceLayout::place_of(int64_t position) const {
  TORCH_INTERNAL_ASSERT_DEBUG_ONLY(position >= 0 && position < sequence_length_);
  const auto next = std::upper_bound(pieces_.begin(), pieces_.end(), position,
                                     [](int64_t at, const Piece& piece) { return at < piece.range.begin; });
  const auto& piece = *std::prev(next);
  return {piece.begin.rank, piece.begin.position + position - piece.range.begin};
}

}  // namespace megatron_cpp::parallel
