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

/// What a caption is generated with.
struct CaptionerOptions {
  CaptionFormat format;
  std::filesystem::path folder;  ///< pictures' paths are relative to it
  int64_t pad_to = 1;            ///< sequences are padded to a multiple: of t under sequence parallelism
  int64_t pad_id = 0;
  int64_t max_new_tokens = 32;
  PictureFaults* faults = nullptr;  ///< takes what is wrong with the picture; null: nobody is told
};

/// The caption of one picture: the most probable token again and again, until the end token or max_new_tokens. The
/// tower runs once; the decoder runs over the whole sequence for every token (there is no key/value cache).
/// @param prompt  token ids of the caption's beginning; equal on every rank, as all arguments.
/// @return        the caption's text, prompt included.
/// Collective over tp. A broken picture is taken as black, and noted in options.faults.
std::string caption_picture(Step37Model& model, const Tokenizer& tokenizer, const PictureReference& picture,
                            const std::vector<int64_t>& prompt, const CaptionerOptions& options,
                            const parallel::GroupPtr& tp, const at::Device& device);

}  // namespace megatron_cpp::step37
