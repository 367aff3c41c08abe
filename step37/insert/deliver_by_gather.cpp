#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "megatron_cpp/tensor_parallel/rows.h"
#include "parallel/mappings.h"
#include "step37/insert/delivery.h"

namespace megatron_cpp::step37::internal {
namespace {

using megatron_cpp::internal::as_rows;
using megatron_cpp::internal::copy_rows;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Copies rows `projected_rows` of `projected` to rows `rows` of `embeddings` [R, B, H], in place. An overwritten row
/// gives `embeddings` zero gradient.
struct InsertRows : torch::autograd::Function<InsertRows> {
  static at::Tensor forward(AutogradContext* context, at::Tensor embeddings, const at::Tensor& projected,
                            const at::Tensor& rows, const at::Tensor& projected_rows) {
    context->save_for_backward({rows, projected_rows});
    context->saved_data["projected_shape"] = projected.sizes().vec();
    context->mark_dirty({embeddings});
    copy_rows(embeddings.view({-1, embeddings.size(-1)}), rows, projected, projected_rows);
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

/// Inserts the image rows that this rank owns into `text`, its word embeddings. `number_of` gives their row in
/// `projected`.
template <class Number>
at::Tensor insert_own_rows(const at::Tensor& text, const at::Tensor& projected, const DeliverySetting& setting,
                           const Number& number_of) {
  const auto& words = *setting.words;
  const int64_t B = text.size(1);
  const auto layout = words.sequence_layout(setting.input_ids.size(1));
  const int own_rank = words.sequence_parallel() ? words.tp()->getRank() : 0;
  std::vector<int64_t> rows;
  std::vector<int64_t> projected_rows;
  for (const auto& inserted : setting.features.inserted) {
    const auto place = layout.place_of(inserted.row / B);
    if (place.rank != own_rank) continue;
    rows.push_back(place.position * B + inserted.row % B);
    projected_rows.push_back(number_of(inserted));
  }
  const auto indices = megatron_cpp::internal::index_tensors({rows, projected_rows}, text.device());
  // Also on a rank that owns no image row: the backward pass of the gather is collective.
  return InsertRows::apply(text, projected, indices[0], indices[1]);
}

int64_t most_rows(const DeliverySetting& setting) {
  const auto& rows = setting.features.rows_of_rank;
  return rows.empty() ? 0 : *std::max_element(rows.begin(), rows.end());
}

/// Gives every rank all projected rows; those from holders are padded to the largest holder.
at::Tensor gather_projected(const at::Tensor& projected, const DeliverySetting& setting) {
  const auto& tp = setting.words->tp();
  const bool is_for_own_rows = setting.words->sequence_parallel();
  switch (setting.projected_part) {
    case Part::kColumns:
      return is_for_own_rows ? parallel::all_gather_last_dim_from_tensor_parallel_region(projected, tp)
                             : parallel::gather_from_tensor_model_parallel_region(projected, tp);
    case Part::kSummand:
      return is_for_own_rows ? parallel::reduce_from_tensor_model_parallel_region_to_partial_use(projected, tp)
                             : parallel::reduce_from_tensor_model_parallel_region(projected, tp);
    case Part::kWhole: {
      const auto padded = at::constant_pad_nd(projected, {0, 0, 0, most_rows(setting) - projected.size(0)});
      return is_for_own_rows ? parallel::gather_from_sequence_parallel_region(padded, tp)
                             : parallel::gather_from_sequence_parallel_region_to_replicated_use(padded, tp);
    }
  }
  TORCH_INTERNAL_ASSERT(false);
}

}  // namespace

at::Tensor deliver_by_gather(const at::Tensor& text, const at::Tensor& projected, const DeliverySetting& setting) {
  const auto owned = setting.words->reduce(text);
  const auto gathered = gather_projected(projected, setting);
  const int64_t most = most_rows(setting);
  return insert_own_rows(owned, gathered, setting, [most](const InsertedRow& inserted) {
    return inserted.projected_row + std::max<int64_t>(inserted.holder, 0) * most;
  });
}

at::Tensor deliver_in_place(const at::Tensor& text, const at::Tensor& projected, const DeliverySetting& setting) {
  return insert_own_rows(setting.words->reduce(text), projected, setting,
                         [](const InsertedRow& inserted) { return inserted.projected_row; });
}

}  // namespace megatron_cpp::step37::internal
