// Base of the fused deliveries: an autograd function whose backward pass sends only the gradients that are needed.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "step37/insert/delivery.h"
#include "step37/insert/row_route.h"

namespace megatron_cpp::step37::internal {

/// Which gradients are needed; equal on every rank.
struct Wanted {
  bool text = false;
  bool projected = false;
  bool operator==(const Wanted&) const = default;
};

/// One forward pass and its backward pass. Each fused delivery derives from this class.
class FusedDelivery : public torch::CustomClassHolder {
 public:
  FusedDelivery(const at::Tensor& text, const at::Tensor& projected, const DeliverySetting& setting);

  virtual at::Tensor forward(const at::Tensor& text, const at::Tensor& projected) const = 0;

  struct Gradients {
    at::Tensor text;
    at::Tensor projected;
  };
  /// The wanted gradients, from the gradient of the rows that this rank owns. Needs prepare_backward(wanted) first.
  virtual Gradients backward(const at::Tensor& gradient, Wanted wanted) const = 0;

  /// Computes the index lists of the backward pass. Runs before forward(): in backward() a GPU would wait for the host.
  void prepare_backward(Wanted wanted);

 protected:
  /// Gradient rows that an all-gather gives to every rank.
  struct GatheredRows {
    std::vector<int64_t> counts;  ///< number of rows from each rank
    at::Tensor own_rows;          ///< the rows that this rank gives, as indices among those it owns
    at::Tensor target_rows;       ///< rows of the result that the gathered rows go to, in the order of ranks
  };
  /// How gradients are sent: over `route`, or by `gather`, or, without either, by the reverse of forward's collective.
  struct WayBack {
    Wanted wanted;
    std::optional<RowRoute> route;
    std::optional<GatheredRows> gather;
  };
  /// Sets way.route or way.gather, or neither, for way.wanted.
  virtual void choose_way_back(WayBack& way) const = 0;
  const WayBack& way_back() const { return way_back_; }

  const parallel::GroupPtr& tp() const { return words_->tp(); }
  int64_t rank() const { return tp()->getRank(); }
  int64_t t() const { return tp()->getSize(); }
  int64_t H() const { return words_->hidden_size(); }
  bool sequence_parallel() const { return words_->sequence_parallel(); }
  /// Whether backward() communicates: each rank has gradients of the rows that it owns only.
  bool sends_back() const { return sequence_parallel() && t() > 1; }
  struct OwnedRow {
    size_t owner;
    int64_t row;  ///< index among the rows of its owner
  };
  /// Where the embedding row s*B + b is.
  OwnedRow owned(int64_t row) const;

  /// Copies this rank's projected rows into `embeddings` [S*B, W].
  void write_projected(const at::Tensor& embeddings, const at::Tensor& projected) const;
  /// A gradient for the projected rows, to be filled; zeros if some of them were cut or overwritten.
  at::Tensor new_projected_gradient() const;
  /// The gradient of this rank's projected rows, from the gradient `columns` [S, B, W] of all embedding rows.
  at::Tensor read_projected(const at::Tensor& columns) const;

  /// Adds the rows that images overwrite: as pieces if every rank computes a part of each row, else whole.
  void add_images(TravellingRows& rows) const;
  /// Adds all other rows as pieces; their made_row is s*B + b.
  void add_text(TravellingRows& rows) const;
  std::vector<int64_t> text_rows() const;
  RowRoute make_route(const TravellingRows& rows) const;
  GatheredRows make_gather(const TravellingRows& rows) const;
  /// The wanted gradients, sent over way_back().route; that of the text is [S, B, text_width].
  Gradients gradients_by_route(const at::Tensor& gradient, Wanted wanted, int64_t text_width) const;

  std::shared_ptr<const ParallelEmbedding> words_;
  int64_t S_;
  int64_t B_;
  parallel::SequenceLayout layout_;
  Part projected_part_;
  std::vector<InsertedRow> inserted_;
  std::vector<int64_t> projected_shape_;
  at::TensorOptions options_;
  at::Tensor rows_;            ///< the embedding rows s*B + b of which this rank projects the whole or a part
  at::Tensor projected_rows_;  ///< for each of them, its row in this rank's projected rows

 private:
  WayBack way_back_;
};

/// Runs a delivery as an autograd function. Collective over its group.
at::Tensor deliver(const at::Tensor& text, const at::Tensor& projected,
                   const c10::intrusive_ptr<FusedDelivery>& delivery);

}  // namespace megatron_cpp::step37::internal
