// How projected image rows and the word embedding come together on the ranks that own them: one file for each way, and
// one table that chooses.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "megatron_cpp/tensor_parallel/parallel_embedding.h"
#include "step37/insert/features.h"
#include "step37/insert/options.h"

namespace megatron_cpp::step37::internal {

/// What a delivery has to know besides its two tensors; equal on every rank of the group.
struct DeliverySetting {
  std::shared_ptr<const ParallelEmbedding> words;  ///< the group, and what its partials are
  at::Tensor input_ids;                            ///< [B, S]
  Part projected_part = Part::kColumns;            ///< what a rank made of projected rows
  const LocalFeatures& features;                   ///< which row ends where
};

/// Puts `projected` into `text` and gives this rank what it owns of the whole: [S, B, H], or [S/t, B, H] under sequence
/// parallelism.
/// @param text       [S, B, W], ParallelEmbedding::partial without the rows that images overwrite; is written to.
/// @param projected  [n_r, H/t or H], what this rank projected, of the dtype and device of `text`.
/// Comm: see docs/image-insert.md. What is sent backward follows from requires_grad of both, which must be equal on
/// every rank. Collective over the group.
using Deliver = at::Tensor (*)(const at::Tensor& text, const at::Tensor& projected, const DeliverySetting& setting);

/// Over summands of text: the sum that the text needs anyway carries the images.
at::Tensor deliver_by_sum(const at::Tensor& text, const at::Tensor& projected, const DeliverySetting& setting);
/// Over columns of text and of image rows: an all-to-all under sequence parallelism, an all-gather otherwise.
at::Tensor deliver_by_columns(const at::Tensor& text, const at::Tensor& projected, const DeliverySetting& setting);
/// Over columns of text and whole image rows: each goes from the ranks that made it to the rank that owns it.
at::Tensor deliver_by_route(const at::Tensor& text, const at::Tensor& projected, const DeliverySetting& setting);
/// The plain way: the text's collective, and one more that gives every rank every whole image row.
at::Tensor deliver_by_gather(const at::Tensor& text, const at::Tensor& projected, const DeliverySetting& setting);
/// Of rows that are where they belong (FeatureRequest::by_owners): the text's collective alone.
at::Tensor deliver_in_place(const at::Tensor& text, const at::Tensor& projected, const DeliverySetting& setting);

/// The way for an exchange, and for what a rank makes of text and of image rows.
/// @throws c10::ValueError if there is none.
Deliver choose_delivery(InsertExchange exchange, Part text, Part projected);

}  // namespace megatron_cpp::step37::internal
