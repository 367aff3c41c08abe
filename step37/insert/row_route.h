// One all-to-all that sends embedding rows from the ranks that computed them to their owners.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "parallel/group.h"

namespace megatron_cpp::step37::internal {

/// The embedding rows to send: one list per owner, equal on every rank.
struct TravellingRows {
  explicit TravellingRows(int t) : pieces(static_cast<size_t>(t)), whole(static_cast<size_t>(t)) {}

  /// A row of which every rank computes its H/t columns.
  struct Piece {
    int64_t row;       ///< index among the rows of its owner
    int64_t made_row;  ///< index in the tensor that it is sent from
  };
  std::vector<std::vector<Piece>> pieces;
  /// A row that only its holder computes, whole.
  struct Whole {
    int64_t row;       ///< as in Piece
    int64_t made_row;  ///< as in Piece
    int64_t holder;
  };
  std::vector<std::vector<Whole>> whole;
};

/// Sends such rows to their owners, and their gradients back. The constructor is not collective and copies all index
/// lists to the device at once.
class RowRoute {
 public:
  RowRoute(const TravellingRows& rows, int64_t hidden_size, const c10::Device& device, parallel::GroupPtr tp);

  /// Forward: sends rows from the ranks that computed them to their owners.
  /// @param pieces  [n, H/t], this rank's columns; only rows listed in TravellingRows are read. Undefined if none are.
  /// @param whole   [m, H], the rows that this rank computed whole. Undefined if none are listed.
  /// @param owned   [S*B/t, H]: receives the rows that this rank owns.
  /// Collective over tp.
  void to_owners(const at::Tensor& pieces, const at::Tensor& whole, const at::Tensor& owned) const;

  /// Backward: sends gradients from the owners of the rows to the ranks that computed them.
  /// @param owned          [S*B/t, H], gradient of the rows that this rank owns.
  /// @param pieces, whole  as above: receive the gradients.
  /// Collective over tp.
  void send_back(const at::Tensor& owned, const at::Tensor& pieces, const at::Tensor& whole) const;

 private:
  /// Calls visit(peer, a view of `buffer` as that peer's pieces [k, H/t], and as its whole rows [m, H]).
  template <class Visit>
  void for_each_peer(const at::Tensor& buffer, const std::vector<int64_t>& pieces, const std::vector<int64_t>& whole,
                     const Visit& visit) const;
  std::vector<int64_t> elements(const std::vector<int64_t>& pieces, const std::vector<int64_t>& whole) const;
  /// The k-th of the lists that `rows` concatenates; `counts` are their lengths.
  at::Tensor list(const at::Tensor& rows, const std::vector<int64_t>& counts, size_t k) const;

  parallel::GroupPtr tp_;
  int64_t hidden_size_;
  int64_t piece_width_;
  // Number of rows per peer: those this rank computes for that owner, and those it owns and gets from that rank.
  std::vector<int64_t> pieces_made_, whole_made_, pieces_owned_, whole_owned_;
  at::Tensor made_piece_rows_;   // indices into `pieces`, grouped by owner
  at::Tensor owned_piece_rows_;  // indices into `owned`, the same for every sender
  at::Tensor made_whole_rows_;   // indices into `whole`, grouped by owner
  at::Tensor owned_whole_rows_;  // indices into `owned`, grouped by holder
};

}  // namespace megatron_cpp::step37::internal
