// One all-to-all that sends rows of an embedding from the ranks that made them to the ranks that own them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "parallel/group.h"

namespace megatron_cpp::step37::internal {

/// Which rows of the embedding travel: one list per owner, equal on every rank.
struct TravellingRows {
  explicit TravellingRows(int t) : pieces(static_cast<size_t>(t)), whole(static_cast<size_t>(t)) {}

  /// A row of which every rank makes its H/t columns: its number among the owner's rows, and among what a rank made.
  struct Piece {
    int64_t row;
    int64_t made_row;
  };
  std::vector<std::vector<Piece>> pieces;
  /// A row that one rank, its holder, makes whole.
  struct Whole {
    int64_t row;
    int64_t made_row;
    int64_t holder;
  };
  std::vector<std::vector<Whole>> whole;
};

/// The route of such rows, and the way back for their gradients. To construct one is not collective; the index lists go
/// to the device in one copy.
class RowRoute {
 public:
  RowRoute(const TravellingRows& rows, int64_t hidden_size, const c10::Device& device, parallel::GroupPtr tp);

  /// From the ranks that made the rows to their owners, forward.
  /// @param pieces  [.., H/t], this rank's columns; rows that don't travel aren't read. Undefined if none do.
  /// @param whole   [.., H], the rows this rank made. Undefined if none travel whole.
  /// @param owned   [S*B/t, H]: what arrives is written into it.
  /// Collective over tp.
  void to_owners(const at::Tensor& pieces, const at::Tensor& whole, const at::Tensor& owned) const;

  /// From the owners to the ranks that made the rows, backward.
  /// @param owned          [S*B/t, H], this rank's rows.
  /// @param pieces, whole  as above: what arrives is written into them.
  /// Collective over tp.
  void send_back(const at::Tensor& owned, const at::Tensor& pieces, const at::Tensor& whole) const;

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
  // Counts of rows by peer: what this rank makes for each owner, and what it owns from each rank.
  std::vector<int64_t> pieces_made_, whole_made_, pieces_owned_, whole_owned_;
  at::Tensor made_piece_rows_;   // this rank's numbers of the pieces it made, by owner
  at::Tensor owned_piece_rows_;  // among this rank's own; the same from every rank
  at::Tensor made_whole_rows_;   // this rank's numbers of the whole rows it made, by owner
  at::Tensor owned_whole_rows_;  // among this rank's own, by holder
};

}  // namespace megatron_cpp::step37::internal
