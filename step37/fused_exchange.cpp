#include "step37/fused_exchange.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <optional>
#include <utility>

#include "megatron_cpp/tensor_parallel/rows.h"
#include "parallel/collectives.h"
#include "parallel/mappings.h"
#include "step37/row_route.h"

namespace step37::internal {
namespace {

using megatron::internal::as_rows;
using megatron::internal::copy_rows;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// What an exchange does with the tensors of one forward pass and its backward pass.
class Exchange : public torch::CustomClassHolder {
 public:
  Exchange(const InsertPlan& plan, const ExchangeLayout& layout, const at::Tensor& projected)
      : plan_(plan),
        layout_(layout),
        projected_shape_(projected.sizes().vec()),
        projected_options_(projected.options()) {
    std::vector<InsertRun> own;
    for (const auto& run : plan_.runs()) {
      if (layout_.maker.empty() || maker_of(run) == rank()) own.push_back(with_projected_rows(run));
    }
    const auto indices = row_indices(own, plan_.B());
    const auto tensors =
        megatron::internal::index_tensors({indices.embedding_rows, indices.feature_rows}, projected.device());
    rows_ = tensors[0];
    projected_rows_ = tensors[1];
  }

  /// Works out how gradients will come back; before forward(), in the thread that runs it. In backward() a GPU would
  /// wait for the host meanwhile.
  void prepare_backward(bool wants_partial, bool wants_projected) {
    if (has_way_back(wants_partial, wants_projected)) return;
    way_back_ = {wants_partial, wants_projected, {}, {}};
    choose_way(way_back_);
  }

  virtual at::Tensor forward(const at::Tensor& partial, const at::Tensor& projected) const = 0;

  struct Gradients {
    at::Tensor partial;
    at::Tensor projected;
  };
  /// Gradients of what is wanted, from this rank's rows of the gradient. After prepare_backward for the same.
  virtual Gradients backward(const at::Tensor& gradient, bool wants_partial, bool wants_projected) const = 0;

 protected:
  /// Rows of every rank's gradient that every rank gets whole.
  struct GatheredRows {
    std::vector<int64_t> counts;  ///< of each rank
    at::Tensor own_rows;          ///< among this rank's own
    at::Tensor target_rows;       ///< where they go, by rank
  };
  /// How gradients come back: by a route or a gather of some rows; with neither of them as the forward pass went.
  struct WayBack {
    bool wants_partial = false;
    bool wants_projected = false;
    std::optional<RowRoute> route;
    std::optional<GatheredRows> gather;
  };
  /// Fills in the route or the gather for what `way` wants.
  virtual void choose_way(WayBack& way) const = 0;

  bool has_way_back(bool wants_partial, bool wants_projected) const {
    return way_back_.wants_partial == wants_partial && way_back_.wants_projected == wants_projected;
  }
  const WayBack& way_back() const { return way_back_; }

  int64_t rank() const { return layout_.tp->getRank(); }
  int64_t t() const { return layout_.tp->getSize(); }
  /// Whether each rank has gradients of its own rows only.
  bool sends_back() const { return layout_.sequence_parallel && t() > 1; }
  int64_t rows_per_rank() const { return plan_.S() / t() * plan_.B(); }

  /// Writes what this rank projected into `embeddings` [S*B, W].
  void write_projected(const at::Tensor& embeddings, const at::Tensor& projected) const {
    copy_rows(embeddings, rows_, projected, projected_rows_);
  }
  /// A gradient of the projected rows to be filled; rows that were cut or overwritten get zero.
  at::Tensor new_projected_gradient() const {
    return rows_.numel() == projected_shape_[0] ? at::empty(projected_shape_, projected_options_)
                                                : at::zeros(projected_shape_, projected_options_);
  }
  /// The gradient of the projected rows out of the whole one, of these columns.
  at::Tensor read_projected(const at::Tensor& columns) const {
    auto projected = new_projected_gradient();
    copy_rows(projected, projected_rows_, as_rows(columns), rows_);
    return projected;
  }
  /// Of images: pieces where every rank makes a part of every row, else whole rows of their makers.
  void add_images(RouteRows& route) const {
    for (int64_t owner = 0; owner < t(); ++owner) {
      const int64_t rows = plan_.S() / t();
      for (const auto& owned : plan_.owned_by(owner * rows, (owner + 1) * rows)) {
        const auto run = with_projected_rows(owned);
        for (int64_t i = 0; i < run.length; ++i) {
          const int64_t row = (run.position + i) * plan_.B() + run.batch;
          const auto of_owner = static_cast<size_t>(owner);
          if (layout_.maker.empty()) {
            route.pieces[of_owner].push_back({row, run.feature_row + i});
          } else {
            route.whole[of_owner].push_back({row, run.feature_row + i, maker_of(run)});
          }
        }
      }
    }
  }
  /// Of all rows but those of images: pieces, numbered as in a partial.
  void add_text(RouteRows& route) const {
    for (const int64_t row : text_rows()) {
      route.pieces[static_cast<size_t>(row / rows_per_rank())].push_back({row, row});
    }
  }
  std::vector<int64_t> text_rows() const {
    std::vector<bool> is_image(static_cast<size_t>(plan_.S() * plan_.B()), false);
    for (const int64_t row : row_indices(plan_.runs(), plan_.B()).embedding_rows) {
      is_image[static_cast<size_t>(row)] = true;
    }
    std::vector<int64_t> rows;
    for (size_t row = 0; row < is_image.size(); ++row) {
      if (!is_image[row]) rows.push_back(static_cast<int64_t>(row));
    }
    return rows;
  }
  RowRoute make_route(const RouteRows& rows) const {
    return {rows, rows_per_rank(), layout_.hidden_size, projected_options_.device(), layout_.tp};
  }

  GatheredRows make_gather(const std::vector<std::vector<RouteRows::Piece>>& rows) const {
    GatheredRows gather;
    std::vector<int64_t> own_rows;
    std::vector<int64_t> target_rows;
    for (const auto& owned : rows) {
      const bool own = static_cast<int64_t>(gather.counts.size()) == rank();
      gather.counts.push_back(static_cast<int64_t>(owned.size()));
      for (const auto& piece : owned) {
        if (own) own_rows.push_back(piece.row - rows_per_rank() * rank());
        target_rows.push_back(piece.made_row);
      }
    }
    const auto indices = megatron::internal::index_tensors({own_rows, target_rows}, projected_options_.device());
    gather.own_rows = indices[0];
    gather.target_rows = indices[1];
    return gather;
  }

  InsertPlan plan_;
  ExchangeLayout layout_;
  std::vector<int64_t> projected_shape_;
  at::TensorOptions projected_options_;
  at::Tensor rows_;            // flat rows that this rank makes something of,
  at::Tensor projected_rows_;  // and their numbers among those it projected

 private:
  WayBack way_back_;

  int64_t maker_of(const InsertRun& run) const { return layout_.maker[static_cast<size_t>(run.image)]; }
  InsertRun with_projected_rows(InsertRun run) const {
    const auto image = static_cast<size_t>(run.image);
    run.feature_row += layout_.first_projected_row[image] - plan_.image_begins()[image];
    return run;
  }
};

/// Over summands [S, B, H]: the sum that the text needs anyway carries the images.
class SumExchange final : public Exchange {
 public:
  using Exchange::Exchange;

  at::Tensor forward(const at::Tensor& partial, const at::Tensor& projected) const override {
    write_projected(own_columns(partial.view({-1, layout_.hidden_size})), projected);
    if (layout_.sequence_parallel) return parallel::reduce_scatter(partial, layout_.tp);
    auto sum = partial;
    parallel::all_reduce_in_place(sum, layout_.tp);
    return sum;
  }

  Gradients backward(const at::Tensor& gradient, bool wants_partial, bool wants_projected) const override {
    const auto& way = way_back();
    if (way.route || way.gather) return some_gradients(gradient, wants_partial);
    const auto whole = sends_back() ? parallel::all_gather(gradient, layout_.tp) : gradient;
    Gradients gradients;
    if (wants_partial) gradients.partial = whole;
    if (wants_projected) gradients.projected = read_projected(own_columns(as_rows(whole)));
    return gradients;
  }

 private:
  at::Tensor own_columns(const at::Tensor& rows) const {
    const int64_t width = projected_shape_[1];
    const bool columns = layout_.projected == ProjectedRows::kColumns;
    return columns ? rows.narrow(1, width * rank(), width) : rows;
  }
  /// Where one of the two gradients is wanted, its rows alone travel.
  void choose_way(WayBack& way) const override {
    if (!sends_back() || way.wants_partial == way.wants_projected) return;
    RouteRows rows(layout_.tp->getSize());
    if (way.wants_projected) {
      add_images(rows);
      if (layout_.projected == ProjectedRows::kSummands) {
        way.gather = make_gather(rows.pieces);
      } else {
        way.route = make_route(rows);
      }
    } else if (layout_.finders.empty()) {
      add_text(rows);
      way.gather = make_gather(rows.pieces);
    } else {
      for (const int64_t row : text_rows()) {
        rows.whole[static_cast<size_t>(row / rows_per_rank())].push_back(
            {row, row, layout_.finders[static_cast<size_t>(row)]});
      }
      way.route = make_route(rows);
    }
  }
  Gradients some_gradients(const at::Tensor& gradient, bool of_partial) const {
    // The look-up reads the gradient of text rows that it found, and no other row is written here.
    auto wanted = of_partial ? at::empty({plan_.S(), plan_.B(), layout_.hidden_size}, gradient.options())
                             : new_projected_gradient();
    const auto& way = way_back();
    const auto rows = as_rows(gradient);
    const auto target = as_rows(wanted);
    if (way.route) {
      way.route->to_makers(rows, target, target);
    } else {
      const auto own = megatron::internal::gather_rows(rows, way.gather->own_rows);
      copy_rows(target, way.gather->target_rows, parallel::all_gather_uneven(own, way.gather->counts, layout_.tp), {});
    }
    if (of_partial) return {std::move(wanted), {}};
    return {{}, std::move(wanted)};
  }
};

/// Over columns [S, B, H/t]: an all-to-all under sequence parallelism, an all-gather otherwise.
class ColumnsExchange final : public Exchange {
 public:
  using Exchange::Exchange;

  at::Tensor forward(const at::Tensor& partial, const at::Tensor& projected) const override {
    if (layout_.projected == ProjectedRows::kWhole && t() > 1) {
      return layout_.sequence_parallel ? route_forward(partial, projected) : gather_forward(partial, projected);
    }
    write_projected(as_rows(partial), projected);
    if (t() == 1) return partial;
    return layout_.sequence_parallel ? parallel::all_to_all_hidden_to_sequence_parallel(partial, layout_.tp)
                                     : parallel::all_gather_last_dim(partial, layout_.tp);
  }

  Gradients backward(const at::Tensor& gradient, bool wants_partial, bool wants_projected) const override {
    const bool columns = layout_.projected == ProjectedRows::kColumns;
    if (way_back().route) return route_backward(gradient, wants_partial, wants_projected);
    const auto own = sends_back() ? parallel::all_to_all_sequence_to_hidden_parallel(gradient, layout_.tp)
                                  : gradient.narrow(-1, piece_width() * rank(), piece_width());
    Gradients gradients;
    if (wants_partial) gradients.partial = own;
    if (wants_projected) gradients.projected = read_projected(columns ? own : gradient);
    return gradients;
  }

 private:
  int64_t piece_width() const { return layout_.hidden_size / t(); }

  void choose_way(WayBack& way) const override {
    const bool columns = layout_.projected == ProjectedRows::kColumns;
    if (sends_back() && !(columns && way.wants_partial && way.wants_projected)) {
      way.route = route_of(way.wants_partial, way.wants_projected);
    }
  }
  RowRoute route_of(bool text, bool images) const {
    RouteRows rows(layout_.tp->getSize());
    if (text) add_text(rows);
    if (images) add_images(rows);
    return make_route(rows);
  }
  at::Tensor route_forward(const at::Tensor& partial, const at::Tensor& projected) const {
    auto owned = at::empty({rows_per_rank(), layout_.hidden_size}, projected_options_);
    // Gradients of both come back by the same route.
    const bool same = has_way_back(true, true);
    (same ? *way_back().route : route_of(true, true)).to_owners(as_rows(partial), projected, owned);
    return owned.view({plan_.S() / t(), plan_.B(), layout_.hidden_size});
  }
  Gradients route_backward(const at::Tensor& gradient, bool wants_partial, bool wants_projected) const {
    Gradients gradients;
    if (wants_partial) gradients.partial = at::empty({plan_.S(), plan_.B(), piece_width()}, gradient.options());
    if (wants_projected) gradients.projected = new_projected_gradient();
    // Pieces are text's, or where images have pieces too, only one of the two travels here.
    const auto pieces = wants_partial ? as_rows(gradients.partial) : gradients.projected;
    way_back().route->to_makers(as_rows(gradient), pieces, gradients.projected);
    return gradients;
  }
  /// Text rows as columns and this rank's images' rows whole, from every rank to every rank.
  at::Tensor gather_forward(const at::Tensor& partial, const at::Tensor& projected) const {
    const auto text = megatron::internal::index_tensors({text_rows()}, partial.device())[0];
    std::vector<int64_t> counts(static_cast<size_t>(t()), text.numel() * piece_width());
    std::vector<std::vector<int64_t>> whole_rows(static_cast<size_t>(t()));
    for (const auto& run : plan_.runs()) {
      const auto maker = static_cast<size_t>(layout_.maker[static_cast<size_t>(run.image)]);
      for (int64_t i = 0; i < run.length; ++i) {
        whole_rows[maker].push_back((run.position + i) * plan_.B() + run.batch);
        counts[maker] += layout_.hidden_size;
      }
    }
    const auto packed = at::cat({megatron::internal::gather_rows(as_rows(partial), text).view(-1),
                                 megatron::internal::gather_rows(projected, projected_rows_).view(-1)});
    return unpack(parallel::all_gather_uneven(packed, counts, layout_.tp), counts, text, whole_rows);
  }
  at::Tensor unpack(const at::Tensor& gathered, const std::vector<int64_t>& counts, const at::Tensor& text,
                    const std::vector<std::vector<int64_t>>& whole_rows) const {
    auto result = at::empty({plan_.S() * plan_.B(), layout_.hidden_size}, gathered.options());
    int64_t begin = 0;
    for (size_t maker = 0; maker < counts.size(); ++maker) {
      const auto part = gathered.narrow(0, begin, counts[maker]);
      begin += counts[maker];
      const int64_t piece_elements = text.numel() * piece_width();
      copy_rows(result.narrow(1, static_cast<int64_t>(maker) * piece_width(), piece_width()), text,
                part.narrow(0, 0, piece_elements).view({-1, piece_width()}), {});
      const auto rows = megatron::internal::index_tensors({whole_rows[maker]}, gathered.device())[0];
      copy_rows(result, rows,
                part.narrow(0, piece_elements, part.numel() - piece_elements).view({-1, layout_.hidden_size}), {});
    }
    return result.view({plan_.S(), plan_.B(), layout_.hidden_size});
  }
};

struct ExchangeFunction : torch::autograd::Function<ExchangeFunction> {
  static at::Tensor forward(AutogradContext* context, at::Tensor partial, const at::Tensor& projected,
                            const c10::intrusive_ptr<Exchange>& exchange) {
    context->saved_data["exchange"] = c10::IValue::make_capsule(exchange);
    const auto owned = exchange->forward(partial, projected);
    if (owned.is_same(partial)) context->mark_dirty({partial});
    return owned;
  }
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), "double backward through the image insert");
    const auto exchange = c10::static_intrusive_pointer_cast<Exchange>(context->saved_data["exchange"].toCapsule());
    const bool wants_partial = context->needs_input_grad(0);
    const bool wants_projected = context->needs_input_grad(1);
    exchange->prepare_backward(wants_partial, wants_projected);  // a user may want less than was prepared for
    auto result = exchange->backward(gradients[0].contiguous(), wants_partial, wants_projected);
    return {std::move(result.partial), std::move(result.projected), {}};
  }
};

struct InsertRows : torch::autograd::Function<InsertRows> {
  static at::Tensor forward(AutogradContext* context, at::Tensor embeddings, const at::Tensor& projected,
                            const at::Tensor& rows, const std::optional<at::Tensor>& projected_rows) {
    context->save_for_backward({rows, projected_rows.value_or(at::Tensor())});
    context->saved_data["projected_shape"] = projected.sizes().vec();
    context->mark_dirty({embeddings});
    copy_rows(embeddings.view({-1, embeddings.size(-1)}), rows, projected, projected_rows.value_or(at::Tensor()));
    return embeddings;
  }
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), "double backward through the image insert");
    const auto saved = context->get_saved_variables();
    at::Tensor embeddings_gradient;
    at::Tensor projected_gradient;
    if (context->needs_input_grad(1)) {
      const auto shape = context->saved_data["projected_shape"].toIntVector();
      projected_gradient = at::zeros(shape, gradients[0].options());
      copy_rows(projected_gradient, saved[1], as_rows(gradients[0]), saved[0]);
    }
    if (context->needs_input_grad(0)) {
      embeddings_gradient = gradients[0].clone(at::MemoryFormat::Contiguous);
      embeddings_gradient.view({-1, embeddings_gradient.size(-1)}).index_fill_(0, saved[0], 0);
    }
    return {embeddings_gradient, projected_gradient, {}, {}};
  }
};

}  // namespace

at::Tensor fused_exchange(const at::Tensor& partial, const at::Tensor& projected, const InsertPlan& plan,
                          const ExchangeLayout& layout) {
  c10::intrusive_ptr<Exchange> exchange;
  if (layout.partial == megatron::PartialLayout::kSummand) {
    exchange = c10::make_intrusive<SumExchange>(plan, layout, projected);
  } else {
    exchange = c10::make_intrusive<ColumnsExchange>(plan, layout, projected);
  }
  if (at::GradMode::is_enabled()) exchange->prepare_backward(partial.requires_grad(), projected.requires_grad());
  return ExchangeFunction::apply(partial, projected, exchange);
}

at::Tensor insert_rows(const at::Tensor& embeddings, const at::Tensor& projected, const at::Tensor& rows,
                       const at::Tensor& projected_rows) {
  // An undefined tensor is no argument of an autograd function; an empty optional is.
  return InsertRows::apply(embeddings, projected, rows,
                           projected_rows.defined() ? std::optional<at::Tensor>(projected_rows) : std::nullopt);
}

}  // namespace step37::internal
