#include <ATen/ATen.h>

#include <utility>

#include "megatron_cpp/tensor_parallel/rows.h"
#include "parallel/collectives.h"
#include "step37/insert/fused_delivery.h"

namespace megatron_cpp::step37::internal {
namespace {

using megatron_cpp::internal::as_rows;

class SumDelivery final : public FusedDelivery {
 public:
  SumDelivery(const at::Tensor& text, const at::Tensor& projected, const DeliverySetting& setting)
      : FusedDelivery(text, projected, setting), input_ids_(setting.input_ids) {}

  at::Tensor forward(const at::Tensor& text, const at::Tensor& projected) const override {
    write_projected(own_columns(text.view({-1, H()})), projected);
    if (sequence_parallel()) return parallel::reduce_scatter(text, tp());
    auto sum = text;
    parallel::all_reduce_in_place(sum, tp());
    return sum;
  }

  Gradients backward(const at::Tensor& gradient, Wanted wanted) const override {
    if (way_back().route) return gradients_by_route(gradient, wanted, H());
    if (way_back().gather) return gradients_by_gather(gradient, wanted);
    const auto whole = sends_back() ? parallel::all_gather(gradient, tp()) : gradient;
    Gradients gradients;
    if (wanted.text) gradients.text = whole;
    if (wanted.projected) gradients.projected = read_projected(own_columns(as_rows(whole)));
    return gradients;
  }

 private:
  at::Tensor own_columns(const at::Tensor& rows) const {
    const int64_t width = projected_shape_[1];
    return projected_part_ == Part::kColumns ? rows.narrow(1, width * rank(), width) : rows;
  }

  /// If only one of the two gradients is wanted, only its rows are sent.
  void choose_way_back(WayBack& way) const override {
    if (!sends_back() || way.wanted.text == way.wanted.projected) return;
    TravellingRows rows(tp()->getSize());
    if (way.wanted.text) {
      // Without holders (ids on a GPU, or an embedding that doesn't tell) gradients of text rows go to every rank.
      const auto holders = input_ids_.is_cpu() ? words_->holders(input_ids_) : std::vector<int64_t>{};
      if (holders.empty()) {
        add_text(rows);
        way.gather = make_gather(rows);
        return;
      }
      for (const int64_t text_row : text_rows()) {
        const auto [owner, row] = owned(text_row);
        rows.whole[owner].push_back({row, text_row, holders[static_cast<size_t>(text_row)]});
      }
    } else {
      add_images(rows);
      if (projected_part_ == Part::kSummand) {
        way.gather = make_gather(rows);
        return;
      }
    }
    way.route = make_route(rows);
  }

  Gradients gradients_by_gather(const at::Tensor& gradient, Wanted wanted) const {
    auto result = wanted.text ? at::zeros({S_, B_, H()}, gradient.options()) : new_projected_gradient();
    const auto& gather = *way_back().gather;
    const auto own = megatron_cpp::internal::gather_rows(as_rows(gradient), gather.own_rows);
    const auto all = parallel::all_gather_uneven(own, gather.counts, tp());
    megatron_cpp::internal::copy_rows(as_rows(result), gather.target_rows, all, {});
    if (wanted.text) return {std::move(result), {}};
    return {{}, std::move(result)};
  }

  at::Tensor input_ids_;
};

}  // namespace

at::Tensor deliver_by_sum(const at::Tensor& text, const at::Tensor& projected, const DeliverySetting& setting) {
  return deliver(text, projected, c10::make_intrusive<SumDelivery>(text, projected, setting));
}

}  // namespace megatron_cpp::step37::internal
