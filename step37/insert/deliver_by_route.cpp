#include <ATen/ATen.h>

#include "megatron_cpp/tensor_parallel/rows.h"
#include "parallel/collectives.h"
#include "step37/insert/fused_delivery.h"

namespace megatron_cpp::step37::internal {
namespace {

using megatron_cpp::internal::as_rows;
using megatron_cpp::internal::copy_rows;
using megatron_cpp::internal::gather_rows;
using megatron_cpp::internal::index_tensors;

class RouteDelivery final : public FusedDelivery {
 public:
  using FusedDelivery::FusedDelivery;

  at::Tensor forward(const at::Tensor& text, const at::Tensor& projected) const override {
    if (!sequence_parallel()) return gather_all(text, projected);
    const int64_t own_positions = layout_.num_positions_of(tp()->getRank());
    const auto own_rows = at::empty({own_positions * B_, H()}, options_);
    // If both gradients are wanted, backward uses the same route.
    const bool is_same = way_back().wanted == Wanted{true, true};
    (is_same ? *way_back().route : route_of({true, true})).to_owners(as_rows(text), projected, own_rows);
    return own_rows.view({own_positions, B_, H()});
  }

  Gradients backward(const at::Tensor& gradient, Wanted wanted) const override {
    if (way_back().route) return gradients_by_route(gradient, wanted, width());
    Gradients gradients;
    if (wanted.text) gradients.text = gradient.narrow(-1, width() * rank(), width());
    if (wanted.projected) gradients.projected = read_projected(gradient);
    return gradients;
  }

 private:
  int64_t width() const { return H() / t(); }

  void choose_way_back(WayBack& way) const override {
    if (sends_back()) way.route = route_of(way.wanted);
  }
  RowRoute route_of(Wanted wanted) const {
    TravellingRows rows(tp()->getSize());
    if (wanted.text) add_text(rows);
    if (wanted.projected) add_images(rows);
    return make_route(rows);
  }

  /// All-gathers each rank's columns of text rows and the whole rows of the images that it holds.
  at::Tensor gather_all(const at::Tensor& text, const at::Tensor& projected) const {
    const auto text_row_numbers = index_tensors({text_rows()}, text.device())[0];
    std::vector<std::vector<int64_t>> whole_rows(static_cast<size_t>(t()));
    for (const auto& inserted : inserted_) whole_rows[static_cast<size_t>(inserted.holder)].push_back(inserted.row);
    const int64_t text_elements = text_row_numbers.numel() * width();
    std::vector<int64_t> counts;
    for (const auto& rows : whole_rows) counts.push_back(text_elements + static_cast<int64_t>(rows.size()) * H());

    const auto packed = at::cat(
        {gather_rows(as_rows(text), text_row_numbers).view(-1), gather_rows(projected, projected_rows_).view(-1)});
    const auto gathered = parallel::all_gather_uneven(packed, counts, tp());

    auto result = at::empty({S_ * B_, H()}, options_);
    int64_t begin = 0;
    for (int64_t holder = 0; holder < t(); ++holder) {
      const auto& rows = whole_rows[static_cast<size_t>(holder)];
      const auto part = gathered.narrow(0, begin, counts[static_cast<size_t>(holder)]);
      copy_rows(result.narrow(1, holder * width(), width()), text_row_numbers,
                part.narrow(0, 0, text_elements).view({-1, width()}), {});
      copy_rows(result, index_tensors({rows}, text.device())[0],
                part.narrow(0, text_elements, part.numel() - text_elements).view({-1, H()}), {});
      begin += part.numel();
    }
    return result.view({S_, B_, H()});
  }
};

}  // namespace

at::Tensor deliver_by_route(const at::Tensor& text, const at::Tensor& projected, const DeliverySetting& setting) {
  // On a single rank columns are whole rows.
  if (setting.words->tp()->getSize() == 1) return deliver_by_columns(text, projected, setting);
  return deliver(text, projected, c10::make_intrusive<RouteDelivery>(text, projected, setting));
}

}  // namespace megatron_cpp::step37::internal
