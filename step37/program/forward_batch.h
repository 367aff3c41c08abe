// Reads the batch that `step37 forward` takes.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <filesystem>
#include <optional>
#include <vector>

#include "step37/published_config.h"
#include "step37/step37_model.h"

namespace megatron_cpp::step37 {

/// How an input file becomes a batch.
struct ForwardBatchOptions {
  std::optional<int64_t> image_start_token = std::nullopt;  ///< else config.json's image_start_token_id
  std::optional<int64_t> patch_start_token = std::nullopt;  ///< else config.json's patch_start_token_id
  int64_t multiple_of = 1;                                  ///< S is padded to: sequence parallelism needs one of t
};

/// The batch of an input file.
struct ForwardBatch {
  Step37Batch batch;            ///< padded; pixels on the device, all on every rank; labels undefined if there are none
  int64_t sequence_length = 0;  ///< S without padding
  std::vector<int64_t> places;  ///< b*S + s of each placeholder of a row of image features, in order
  int64_t num_loss_tokens = 0;  ///< labels that count
};

/// Reads the tensors that forward() in forward.h lists. Not collective.
/// @throws c10::ValueError naming the file, and the tensor or the place that is wrong.
ForwardBatch read_forward_batch(const std::filesystem::path& path, const PublishedConfig& config,
                                const ForwardBatchOptions& options, const at::Device& device);

}  // namespace megatron_cpp::step37
