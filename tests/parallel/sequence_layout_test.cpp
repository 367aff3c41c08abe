// SequenceLayout against an owner list made by hand.
#include "parallel/sequence_layout.h"

#include <gtest/gtest.h>

#include <vector>

#include "tests/support/errors.h"

namespace megatron_cpp::parallel {
namespace {

using test_support::value_error;

/// Walks through the ranks' ranges, and asks for each position.
void expect_consistent(const SequenceLayout& layout, int64_t sequence_length) {
  EXPECT_EQ(layout.sequence_length(), sequence_length);
  int64_t positions = 0;
  for (int rank = 0; rank < layout.num_ranks(); ++rank) {
    int64_t own = 0;
    for (const auto& range : layout.ranges_of(rank)) {
      for (int64_t position = range.begin; position < range.end; ++position, ++own) {
        EXPECT_EQ(layout.place_of(position).rank, rank) << position;
        EXPECT_EQ(layout.place_of(position).position, own) << position;
      }
    }
    EXPECT_EQ(layout.num_positions_of(rank), own);
    positions += own;
  }
  EXPECT_EQ(positions, sequence_length);
}

}  // namespace

TEST(SequenceLayout, ContiguousIsEvenShards) {
  for (const int ranks : {1, 2, 3, 4, 8}) {
    for (const int64_t per_rank : {0, 1, 5}) {
      const auto layout = SequenceLayout::contiguous(per_rank * ranks, ranks);
      expect_consistent(layout, per_rank * ranks);
      for (int rank = 0; rank < ranks; ++rank) {
        EXPECT_EQ(layout.ranges_of(rank), (std::vector<Range>{{per_rank * rank, per_rank * (rank + 1)}}));
      }
    }
  }
  EXPECT_EQ(value_error([] { SequenceLayout::contiguous(10, 4); }),
            "sequence length 10 is not divisible by tensor-parallel size 4");
}

// As context parallelism deals chunks: rank r of 2 has chunks r and 3 - r of four. Ranks may have nothing.
TEST(SequenceLayout, TakesSeveralRangesARank) {
  expect_consistent(SequenceLayout({{{0, 3}, {9, 12}}, {{3, 6}, {6, 9}}}), 12);
  expect_consistent(SequenceLayout({{{2, 7}}, {}, {{0, 2}, {7, 8}}, {{8, 8}}}), 8);
}

TEST(SequenceLayout, RefusesGapsAndOverlaps) {
  EXPECT_EQ(value_error([] { SequenceLayout({{{0, 3}}, {{4, 6}}}); }), "position 3 of the sequence has no owner");
  EXPECT_EQ(value_error([] { SequenceLayout({{{1, 3}}}); }), "position 0 of the sequence has no owner");
  EXPECT_EQ(value_error([] { SequenceLayout({{{0, 4}}, {{3, 6}}}); }), "position 3 of the sequence has two owners");
}

}  // namespace megatron_cpp::parallel
