// Checked mode: what must be equal on every rank is compared before anything is sent.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "megatron_cpp/tensor_parallel/language_model_embedding.h"
#include "step37/insert/features.h"
#include "step37/insert/image_for_insert.h"
#include "step37/insert/options.h"
#include "step37/insert/plan.h"
#include "step37/insert/projection.h"

namespace megatron_cpp::step37::internal {

/// Compares on all ranks what decides which collectives run with which sizes, and which rows go where.
/// Collective over the embedding's group.
/// @throws parallel::AgreedError on every rank, naming the field, the lowest rank at fault and both values.
void check_agreement(const at::Tensor& input_ids, const std::vector<ImageForInsert>& images, const InsertPlan& plan,
                     const LocalFeatures& features, const LanguageModelEmbeddingImpl& words,
                     const AlignProjector& projector, const ImageInsertEmbeddingOptions& options);

}  // namespace megatron_cpp::step37::internal
