#include "step37/insert/row_route.h"

#include <ATen/ATen.h>

#include <numeric>
#include <utility>

#include "megatron_cpp/tensor_parallel/rows.h"
#include "parallel/collectives.h"

namespace megatron_cpp::step37::internal {
namespace {

using megatron_cpp::internal::copy_rows;

int64_t sum(const std::vector<int64_t>& values) { return std::accumulate(values.begin(), values.end(), int64_t{0}); }

}  // namespace

RowRoute::RowRoute(const TravellingRows& rows, int64_t hidden_size, const c10::Device& device, parallel::GroupPtr tp)
    : tp_(std::move(tp)), hidden_size_(hidden_size), piece_width_(hidden_size / tp_->getSize()) {
  const auto t = static_cast<size_t>(tp_->getSize());
  const auto own = static_cast<size_t>(tp_->getRank());
  std::vector<int64_t> made_piece_rows;
  std::vector<int64_t> owned_piece_rows;
  std::vector<int64_t> made_whole_rows;
  std::vector<std::vector<int64_t>> owned_by_holder(t);
  for (size_t owner = 0; owner < t; ++owner) {
    pieces_made_.push_back(static_cast<int64_t>(rows.pieces[owner].size()));
    for (const auto& piece : rows.pieces[owner]) {
      made_piece_rows.push_back(piece.made_row);
      if (owner == own) owned_piece_rows.push_back(piece.row);
    }
    int64_t made = 0;
    for (const auto& whole : rows.whole[owner]) {
      if (whole.holder == tp_->getRank()) {
        made_whole_rows.push_back(whole.made_row);
        ++made;
      }
      if (owner == own) owned_by_holder[static_cast<size_t>(whole.holder)].push_back(whole.row);
    }
    whole_made_.push_back(made);
  }
  std::vector<int64_t> owned_whole_rows;
  for (const auto& owned : owned_by_holder) {
    whole_owned_.push_back(static_cast<int64_t>(owned.size()));
    owned_whole_rows.insert(owned_whole_rows.end(), owned.begin(), owned.end());
  }
  pieces_owned_.assign(t, pieces_made_[own]);
  const auto tensors = megatron_cpp::internal::index_tensors(
      {made_piece_rows, owned_piece_rows, made_whole_rows, owned_whole_rows}, device);
  made_piece_rows_ = tensors[0];
  owned_piece_rows_ = tensors[1];
  made_whole_rows_ = tensors[2];
  owned_whole_rows_ = tensors[3];
}

std::vector<int64_t> RowRoute::elements(const std::vector<int64_t>& pieces, const std::vector<int64_t>& whole) const {
  std::vector<int64_t> counts;
  for (size_t peer = 0; peer < pieces.size(); ++peer) {
    counts.push_back(pieces[peer] * piece_width_ + whole[peer] * hidden_size_);
  }
  return counts;
}

at::Tensor RowRoute::list(const at::Tensor& rows, const std::vector<int64_t>& counts, size_t k) const {
  const auto begin = std::accumulate(counts.begin(), counts.begin() + static_cast<std::ptrdiff_t>(k), int64_t{0});
  return rows.narrow(0, begin, counts[k]);
}

template <class Visit>
void RowRoute::for_each_peer(const at::Tensor& buffer, const std::vector<int64_t>& pieces,
                             const std::vector<int64_t>& whole, const Visit& visit) const {
  int64_t begin = 0;
  for (size_t peer = 0; peer < pieces.size(); ++peer) {
    const auto piece_part = buffer.narrow(0, begin, pieces[peer] * piece_width_).view({pieces[peer], piece_width_});
    begin += piece_part.numel();
    const auto whole_part = buffer.narrow(0, begin, whole[peer] * hidden_size_).view({whole[peer], hidden_size_});
    begin += whole_part.numel();
    visit(peer, piece_part, whole_part);
  }
}

void RowRoute::to_owners(const at::Tensor& pieces, const at::Tensor& whole, const at::Tensor& owned) const {
  const auto sent = elements(pieces_made_, whole_made_);
  const auto received = elements(pieces_owned_, whole_owned_);
  const auto send = at::empty({sum(sent)}, owned.options());
  for_each_peer(send, pieces_made_, whole_made_,
                [&](size_t owner, const at::Tensor& piece_part, const at::Tensor& whole_part) {
                  if (piece_part.numel() > 0)
                    copy_rows(piece_part, {}, pieces, list(made_piece_rows_, pieces_made_, owner));
                  if (whole_part.numel() > 0)
                    copy_rows(whole_part, {}, whole, list(made_whole_rows_, whole_made_, owner));
                });
  const auto arrived = parallel::all_to_all(send, received, sent, tp_);
  for_each_peer(arrived, pieces_owned_, whole_owned_,
                [&](size_t holder, const at::Tensor& piece_part, const at::Tensor& whole_part) {
                  const auto columns = owned.narrow(1, static_cast<int64_t>(holder) * piece_width_, piece_width_);
                  if (piece_part.numel() > 0) copy_rows(columns, owned_piece_rows_, piece_part, {});
                  if (whole_part.numel() > 0) {
                    copy_rows(owned, list(owned_whole_rows_, whole_owned_, holder), whole_part, {});
                  }
                });
}

void RowRoute::send_back(const at::Tensor& owned, const at::Tensor& pieces, const at::Tensor& whole) const {
  const auto sent = elements(pieces_owned_, whole_owned_);
  const auto received = elements(pieces_made_, whole_made_);
  const auto send = at::empty({sum(sent)}, owned.options());
  for_each_peer(send, pieces_owned_, whole_owned_,
                [&](size_t holder, const at::Tensor& piece_part, const at::Tensor& whole_part) {
                  const auto columns = owned.narrow(1, static_cast<int64_t>(holder) * piece_width_, piece_width_);
                  if (piece_part.numel() > 0) copy_rows(piece_part, {}, columns, owned_piece_rows_);
                  if (whole_part.numel() > 0) {
                    copy_rows(whole_part, {}, owned, list(owned_whole_rows_, whole_owned_, holder));
                  }
                });
  const auto arrived = parallel::all_to_all(send, received, sent, tp_);
  for_each_peer(arrived, pieces_made_, whole_made_,
                [&](size_t owner, const at::Tensor& piece_part, const at::Tensor& whole_part) {
                  if (piece_part.numel() > 0)
                    copy_rows(pieces, list(made_piece_rows_, pieces_made_, owner), piece_part, {});
                  if (whole_part.numel() > 0)
                    copy_rows(whole, list(made_whole_rows_, whole_made_, owner), whole_part, {});
                });
}

}  // namespace megatron_cpp::step37::internal
