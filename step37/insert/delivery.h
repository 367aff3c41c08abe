// Puts projected image rows into the word embedding and sends each rank the rows that it owns. One file per method;
// choose_delivery picks one.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "megatron_cpp/tensor_parallel/parallel_embedding.h"
#include "step37/insert/features.h"
#include "step37/insert/options.h"

namespace megatron_cpp::step37::internal {

/// What a delivery needs besides its two tensors; equal on every rank, apart from features.rows.
struct DeliverySetting {
  std::shared_ptr<const ParallelEmbedding> words;  ///< with the group, and the layout of `text`
  at::Tensor input_ids;                            ///< [B, S]
  Part projected_part = Part::kColumns;            ///< which part of a projected row a rank has
  const LocalFeatures& features;                   ///< which projected row overwrites which embedding row
};

/// Puts `projected` into `text` and returns the rows that this rank owns: [S, B, H], or [S/t, B, H] under sequence
/// parallelism.
/// @param text       [S, B, W], ParallelEmbedding::partial without the rows that images overwrite; is written to.
/// @param projected  [n_r, H/t or H], what this rank projected, of the dtype and device of `text`.
/// Comm: see docs/image-insert.md. Backward sends what requires_grad of both asks for; it must be equal on every rank.
/// Collective over the group.
using Deliver = at::Tensor (*)(const at::Tensor& text, const at::Tensor& projected, const DeliverySetting& setting);

/// For kSummand text (a vocabulary-parallel embedding): the sum that the text needs anyway carries the image rows.
at::Tensor deliver_by_sum(const at::Tensor& text, const at::Tensor& projected, const DeliverySetting& setting);
/// For columns of text and of image rows: an all-to-all under sequence parallelism, an all-gather otherwise.
at::Tensor deliver_by_columns(const at::Tensor& text, const at::Tensor& projected, const DeliverySetting& setting);
/// For columns of text and whole image rows: the same collectives, uneven.
at::Tensor deliver_by_route(const at::Tensor& text, const at::Tensor& projected, const DeliverySetting& setting);
/// The baseline: the text's collective, and a second one that gives every rank all projected rows.
at::Tensor deliver_by_gather(const at::Tensor& text, const at::Tensor& projected, const DeliverySetting& setting);
/// For image rows that their owner projected (FeatureRequest::by_owners): the text's collective only.
at::Tensor deliver_in_place(const at::Tensor& text, const at::Tensor& projected, const DeliverySetting& setting);

/// The delivery for an exchange, and for the parts of text and image rows that a rank has.
/// @throws c10::ValueError if there is none.
Deliver choose_delivery(InsertExchange exchange, Part text, Part projected);

}  // namespace megatron_cpp::step37::internal
