#include "megatron_cpp/tensor_parallel/rows.h"
#include "parallel/collectives.h"
#include "parallel/mappings.h"
#include "step37/insert/fused_delivery.h"

namespace megatron_cpp::step37::internal {
namespace {

using megatron_cpp::internal::as_rows;

class ColumnsDelivery final : public FusedDelivery {
 public:
  using FusedDelivery::FusedDelivery;

  at::Tensor forward(const at::Tensor& text, const at::Tensor& projected) const override {
    write_projected(as_rows(text), projected);
    if (t() == 1) return text;
    return sequence_parallel() ? parallel::all_to_all_hidden_to_sequence_parallel(text, tp())
                               : parallel::all_gather_last_dim(text, tp());
  }

  Gradients backward(const at::Tensor& gradient, Wanted wanted) const override {
    if (way_back().route) return gradients_by_route(gradient, wanted, width());
    const auto own = sends_back() ? parallel::all_to_all_sequence_to_hidden_parallel(gradient, tp())
                                  : gradient.narrow(-1, width() * rank(), width());
    Gradients gradients;
    if (wanted.text) gradients.text = own;
    if (wanted.projected) gradients.projected = read_projected(own);
    return gradients;
  }

 private:
  int64_t width() const { return H() / t(); }

  void choose_way_back(WayBack& way) const override {
    if (!sends_back() || (way.wanted.text && way.wanted.projected)) return;
    TravellingRows rows(tp()->getSize());
    if (way.wanted.text) add_text(rows);
    if (way.wanted.projected) add_images(rows);
    way.route = make_route(rows);
  }
};

}  // namespace

at::Tensor deliver_by_columns(const at::Tensor& text, const at::Tensor& projected, const DeliverySetting& setting) {
  return deliver(text, projected, c10::make_intrusive<ColumnsDelivery>(text, projected, setting));
}

}  // namespace megatron_cpp::step37::internal
