#include "step37/insert/fused_delivery.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

#include <utility>

#include "megatron_cpp/tensor_parallel/rows.h"

namespace megatron_cpp::step37::internal {
namespace {

using megatron_cpp::internal::as_rows;
using megatron_cpp::internal::copy_rows;
using megatron_cpp::internal::index_tensors;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct DeliverFunction : torch::autograd::Function<DeliverFunction> {
  static at::Tensor forward(AutogradContext* context, at::Tensor text, const at::Tensor& projected,
                            const c10::intrusive_ptr<FusedDelivery>& delivery) {
    context->saved_data["delivery"] = c10::IValue::make_capsule(delivery);
    const auto owned = delivery->forward(text, projected);
    if (owned.is_same(text)) context->mark_dirty({text});
    return owned;
  }
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), "double backward through the image insert");
    const auto delivery =
        c10::static_intrusive_pointer_cast<FusedDelivery>(context->saved_data["delivery"].toCapsule());
    const Wanted wanted{context->needs_input_grad(0), context->needs_input_grad(1)};
    delivery->prepare_backward(wanted);  // autograd.grad() may need fewer gradients than requires_grad announced
    auto result = delivery->backward(gradients[0].contiguous(), wanted);
    return {std::move(result.text), std::move(result.projected), {}};
  }
};

}  // namespace

FusedDelivery::FusedDelivery(const at::Tensor& text, const at::Tensor& projected, const DeliverySetting& setting)
    : words_(setting.words),
      S_(text.size(0)),
      B_(text.size(1)),
      layout_(words_->sequence_layout(S_)),
      projected_part_(setting.projected_part),
      inserted_(setting.features.inserted),
      projected_shape_(projected.sizes().vec()),
      options_(projected.options().requires_grad(false)) {
  std::vector<int64_t> rows;
  std::vector<int64_t> projected_rows;
  for (const auto& inserted : inserted_) {
    if (inserted.holder != kEveryRank && inserted.holder != rank()) continue;
    rows.push_back(inserted.row);
    projected_rows.push_back(inserted.projected_row);
  }
  const auto tensors = index_tensors({rows, projected_rows}, projected.device());
  rows_ = tensors[0];
  projected_rows_ = tensors[1];
}

void FusedDelivery::prepare_backward(Wanted wanted) {
  if (way_back_.wanted == wanted) return;
  way_back_ = {wanted, {}, {}};
  choose_way_back(way_back_);
}

FusedDelivery::OwnedRow FusedDelivery::owned(int64_t row) const {
  const auto place = layout_.place_of(row / B_);
  return {static_cast<size_t>(place.rank), place.position * B_ + row % B_};
}

void FusedDelivery::write_projected(const at::Tensor& embeddings, const at::Tensor& projected) const {
  copy_rows(embeddings, rows_, projected, projected_rows_);
}

at::Tensor FusedDelivery::new_projected_gradient() const {
  return rows_.numel() == projected_shape_[0] ? at::empty(projected_shape_, options_)
                                              : at::zeros(projected_shape_, options_);
}

at::Tensor FusedDelivery::read_projected(const at::Tensor& columns) const {
  auto projected = new_projected_gradient();
  copy_rows(projected, projected_rows_, as_rows(columns), rows_);
  return projected;
}

void FusedDelivery::add_images(TravellingRows& rows) const {
  for (const auto& inserted : inserted_) {
    const auto [owner, row] = owned(inserted.row);
    if (inserted.holder == kEveryRank) {
      rows.pieces[owner].push_back({row, inserted.projected_row});
    } else {
      rows.whole[owner].push_back({row, inserted.projected_row, inserted.holder});
    }
  }
}

void FusedDelivery::add_text(TravellingRows& rows) const {
  for (const int64_t text_row : text_rows()) {
    const auto [owner, row] = owned(text_row);
    rows.pieces[owner].push_back({row, text_row});
  }
}

std::vector<int64_t> FusedDelivery::text_rows() const {
  std::vector<bool> is_image(static_cast<size_t>(S_ * B_), false);
  for (const auto& inserted : inserted_) is_image[static_cast<size_t>(inserted.row)] = true;
  std::vector<int64_t> rows;
  for (size_t row = 0; row < is_image.size(); ++row) {
    if (!is_image[row]) rows.push_back(static_cast<int64_t>(row));
  }
  return rows;
}

RowRoute FusedDelivery::make_route(const TravellingRows& rows) const { return {rows, H(), options_.device(), tp()}; }

FusedDelivery::GatheredRows FusedDelivery::make_gather(const TravellingRows& rows) const {
  GatheredRows gather;
  std::vector<int64_t> own_rows;
  std::vector<int64_t> target_rows;
  for (const auto& pieces : rows.pieces) {
    const bool is_own = static_cast<int64_t>(gather.counts.size()) == rank();
    gather.counts.push_back(static_cast<int64_t>(pieces.size()));
    for (const auto& piece : pieces) {
      if (is_own) own_rows.push_back(piece.row);
      target_rows.push_back(piece.made_row);
    }
  }
  const auto tensors = index_tensors({own_rows, target_rows}, options_.device());
  gather.own_rows = tensors[0];
  gather.target_rows = tensors[1];
  return gather;
}

FusedDelivery::Gradients FusedDelivery::gradients_by_route(const at::Tensor& gradient, Wanted wanted,
                                                           int64_t text_width) const {
  Gradients gradients;
  // Zeros, because ParallelEmbedding::partial promises a finite gradient also for rows that aren't sent.
  if (wanted.text) gradients.text = at::zeros({S_, B_, text_width}, gradient.options());
  if (wanted.projected) gradients.projected = new_projected_gradient();
  const auto text = wanted.text ? as_rows(gradients.text) : at::Tensor();
  // Text and image rows are never both sent as pieces, and never both whole.
  const auto pieces = wanted.text ? text : gradients.projected;
  const auto whole = wanted.projected ? gradients.projected : text;
  way_back().route->send_back(as_rows(gradient), pieces, whole);
  return gradients;
}

at::Tensor deliver(const at::Tensor& text, const at::Tensor& projected,
                   const c10::intrusive_ptr<FusedDelivery>& delivery) {
  if (at::GradMode::is_enabled()) delivery->prepare_backward({text.requires_grad(), projected.requires_grad()});
  return DeliverFunction::apply(text, projected, delivery);
}

}  // namespace megatron_cpp::step37::internal
