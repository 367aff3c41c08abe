// Rows of an embedding between the ranks that make them and the ranks that own them, and no others.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "parallel/group.h"

namespace step37::internal {

/// Which rows travel, under sequence parallelism: rank q of t owns rows [q·S·B/t, (q+1)·S·B/t) of the flat rows s*B +
/// b. The lists are by owner, and the same on every rank.
struct RouteRows {
  explicit RouteRows(int t) : pieces(static_cast<size_t>(t)), whole(static_cast<size_t>(t)) {}

  /// A row of which every rank makes its H/t columns: its flat number, and its number among what a rank made.
  struct Piece {
    int64_t row;
    int64_t made_row;
  };
  std::vector<std::vector<Piece>> pieces;
  /// A row that one rank makes whole.
  struct Whole {
    int64_t row;
    int64_t made_row;
    int64_t maker;
  };
  std::vector<std::vector<Whole>> whole;
};

/// One all-to-all in which each rank gets of its rows what others made, and the way back for gradients. Not a
/// collective to construct; the index lists go to the device in one copy.
class RowRoute {
 public:
  RowRoute(const RouteRows& rows, int64_t rows_per_rank, int64_t hidden_size, const c10::Device& device,
           parallel::GroupPtr tp);

  /// Makers to owners, forward.
  /// @param pieces  [.., H/t], this rank's columns; rows that don't travel aren't read. Undefined if none do.
  /// @param whole   [.., H], the rows this rank made. Undefined if none travel whole.
  /// @param owned   [S*B/t, H]: what arrives is written into it.
  /// Collective over tp.
  void to_owners(const at::Tensor& pieces, const at::Tensor& whole, const at::Tensor& owned) const;

  /// Owners to makers, backward: the same rows the other way.
  /// @param owned          [S*B/t, H], this rank's rows.
  /// @param pieces, whole  as above: what arrives is written into them.
  /// Collective over tp.
  void to_makers(const at::Tensor& owned, const at::Tensor& pieces, const at::Tensor& whole) const;

 private:
  /// Calls visit(peer, a view of `buffer` as that peer's pieces [k, H/t], and as its whole rows [m, H]).
  template <class Visit>
  void for_each_peer(const at::Tensor& buffer, const std::vector<int64_t>& pieces, const std::vector<int64_t>& whole,
                     const Visit& visit) const;
  std::vector<int64_t> elements(const std::vector<int64_t>& pieces, const std::vector<int64_t>& whole) const;
  /// Row numbers of the k-th list.
  at::Tensor list(const at::Tensor& rows, const std::vector<int64_t>& counts, size_t k) const;

  parallel::GroupPtr tp_;
  int64_t hidden_size_;
  int64_t piece_width_;
  // Counts of rows by peer: what this rank makes for each owner, and what it owns of each maker.
  std::vector<int64_t> pieces_made_, whole_made_, pieces_owned_, whole_owned_;
  at::Tensor made_piece_rows_;   // this rank's numbers of the pieces it made, by owner
  at::Tensor owned_piece_rows_;  // among this rank's own; the same from every maker
  at::Tensor made_whole_rows_;   // this rank's numbers of the whole rows it made, by owner
  at::Tensor owned_whole_rows_;  // among this rank's own, by maker
};

}  // namespace step37::internal
