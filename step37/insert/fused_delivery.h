// What the fused deliveries share: one autograd function whose backward pass carries only what is trained.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "step37/insert/delivery.h"
#include "step37/insert/row_route.h"

namespace megatron_cpp::step37::internal {

/// Whose gradients are wanted; equal on every rank.
struct Wanted {
  bool text = false;
  bool projected = false;
  bool operator==(const Wanted&) const = default;
};

/// One forward pass and its backward pass. A way of delivery derives from this class.
class FusedDelivery : public torch::CustomClassHolder {
 public:
  FusedDelivery(const at::Tensor& text, const at::Tensor& projected, const DeliverySetting& setting);

  virtual at::Tensor forward(const at::Tensor& text, const at::Tensor& projected) const = 0;

  struct Gradients {
    at::Tensor text;
    at::Tensor projected;
  };
  /// Gradients of what is wanted, from this rank's rows of the gradient. After prepare_backward for the same.
  virtual Gradients backward(const at::Tensor& gradient, Wanted wanted) const = 0;

  /// Works out how gradients will come back; before forward(), in the thread that runs it. In backward() a GPU would
  /// wait for the host meanwhile.
  void prepare_backward(Wanted wanted);

 protected:
  /// Rows of every rank's gradient that every rank gets whole.
  struct GatheredRows {
    std::vector<int64_t> counts;  ///< of each rank
    at::Tensor own_rows;          ///< among those that this rank owns
    at::Tensor target_rows;       ///< where they go, by rank
  };
  /// How gradients come back: by a route or a gather of some rows; with neither of them as the forward pass went.
  struct WayBack {
    Wanted wanted;
    std::optional<RowRoute> route;
    std::optional<GatheredRows> gather;
  };
  /// Fills in the route or the gather for what `way` wants.
  virtual void choose_way_back(WayBack& way) const = 0;
  const WayBack& way_back() const { return way_back_; }

  const parallel::GroupPtr& tp() const { return words_->tp(); }
  int64_t rank() const { return tp()->getRank(); }
  int64_t t() const { return tp()->getSize(); }
  int64_t H() const { return words_->hidden_size(); }
  bool sequence_parallel() const { return words_->sequence_parallel(); }
  /// Whether each rank has gradients of its own rows only.
  bool sends_back() const { return sequence_parallel() && t() > 1; }
  /// Where a row of the embedding is: its owner, and its number among the owner's rows.
  struct OwnedRow {
    size_t owner;
    int64_t row;
  };
  OwnedRow owned(int64_t row) const;

  /// Writes what this rank projected into `embeddings` [S*B, W].
  void write_projected(const at::Tensor& embeddings, const at::Tensor& projected) const;
  /// A gradient of the projected rows to be filled; rows that were cut or overwritten get zero.
  at::Tensor new_projected_gradient() const;
  /// The gradient of the projected rows out of the whole one, of these columns.
  at::Tensor read_projected(const at::Tensor& columns) const;

  /// The rows of images, for a route: pieces where every rank makes a part of every row, else whole rows.
  void add_images(TravellingRows& rows) const;
  /// All other rows: pieces, numbered as in a partial.
  void add_text(TravellingRows& rows) const;
  std::vector<int64_t> text_rows() const;
  RowRoute make_route(const TravellingRows& rows) const;
  GatheredRows make_gather(const TravellingRows& rows) const;
  /// Gradients of what is wanted by way_back().route; text has `text_width` columns.
  Gradients gradients_by_route(const at::Tensor& gradient, Wanted wanted, int64_t text_width) const;

  std::shared_ptr<const ParallelEmbedding> words_;
  int64_t S_;
  int64_t B_;
  parallel::SequenceLayout layout_;
  Part projected_part_;
  std::vector<InsertedRow> inserted_;
  std::vector<int64_t> projected_shape_;
  at::TensorOptions options_;
  at::Tensor rows_;            ///< rows of the embedding that this rank makes something of,
  at::Tensor projected_rows_;  ///< and their numbers among those it projected

 private:
  WayBack way_back_;
};

/// Runs a delivery, and its backward pass when autograd asks for it. Collective over its group.
at::Tensor deliver(const at::Tensor& text, const at::Tensor& projected,
                   const c10::intrusive_ptr<FusedDelivery>& delivery);

}  // namespace megatron_cpp::step37::internal
