// The reference's insertion on plain tensors: what ImageInsertEmbedding is compared with.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "step37/insert/image_for_insert.h"

namespace megatron_cpp::step37 {

/// A copy of `input_embeddings` [S, B, H] in which the k-th block of projected features overwrites the rows after the
/// k-th occurrence of `flag` in input_ids [B, S]. Returns the input itself if there is no occurrence or no feature;
/// warns and inserts the overlap if the counts differ. No communication.
/// @throws c10::ValueError for sizes that don't fit.
at::Tensor insert_features(const at::Tensor& input_embeddings, const FeatureList& image_features,
                           const at::Tensor& input_ids, int64_t flag);

}  // namespace megatron_cpp::step37
