// Greedy captions from a model.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "parallel/group.h"
#include "step37/data/caption_batches.h"
#include "step37/data/tokenizer.h"
#include "step37/step37_model.h"

namespace megatron_cpp::step37 {

/// Options of caption_picture.
struct CaptionerOptions {
  CaptionFormat format;
  std::filesystem::path folder;  ///< paths of pictures are relative to it
  int64_t pad_to = 1;            ///< sequences are padded to a multiple of this; t under sequence parallelism
  int64_t pad_id = 0;
  int64_t max_new_tokens = 32;
  PictureFaults* faults = nullptr;  ///< where faults of the picture are noted; null: nowhere
};

/// Captions one picture by greedy decoding, until the end token or max_new_tokens. The tower runs once; the decoder
/// runs over the whole sequence for every token (there is no key/value cache).
/// @param prompt  token ids with which the caption begins; all arguments are equal on every rank.
/// @return        the text of the caption, prompt included.
/// Collective over tp. A broken picture is replaced by a black one, and noted in options.faults.
std::string caption_picture(Step37Model& model, const Tokenizer& tokenizer, const PictureReference& picture,
                            const std::vector<int64_t>& prompt, const CaptionerOptions& options,
                            const parallel::GroupPtr& tp, const at::Device& device);

}  // namespace megatron_cpp::step37
