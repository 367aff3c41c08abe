// Captions from a model.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "parallel/group.h"
#include "step37/data/caption_batches.h"
#include "step37/data/tokenizer.h"
#include "step37/program/sampling.h"
#include "step37/step37_model.h"

namespace megatron_cpp::step37 {

/// Options of caption_ids.
struct CaptionerOptions {
  SampleFormat format;           ///< of what stands before the caption; its end_id is not read
  std::filesystem::path folder;  ///< paths of pictures are relative to it
  int64_t pad_to = 1;            ///< sequences are padded to a multiple of this; t under sequence parallelism
  int64_t pad_id = 0;
  int64_t max_new_tokens = 32;
  std::vector<int64_t> end_ids;     ///< ids that end the caption
  std::vector<int64_t> not_text;    ///< ids that are never chosen
  SamplingOptions sampling;         ///< how the others are
  bool cache = true;                ///< false: recompute all positions for every token; not under sequence parallelism
  PictureFaults* faults = nullptr;  ///< where faults of the pictures are noted; null: nowhere
};

/// Captions `pictures` together, which stand one behind the other, until one of end_ids is chosen or max_new_tokens
/// are. The tower runs once; of the decoder a KeyValueCache keeps what later tokens need.
/// @param prompt  token ids with which the caption begins; all arguments are equal on every rank.
/// @return        the ids of the caption, the prompt's included, without the one that ended it. Equal on every rank.
/// Collective over tp, and with experts over ep and etp. A broken picture is replaced by a black one, and noted in
/// options.faults.
std::vector<int64_t> caption_ids(Step37Model& model, const std::vector<PictureReference>& pictures,
                                 const std::vector<int64_t>& prompt, const CaptionerOptions& options,
                                 const parallel::GroupPtr& tp, const at::Device& device);

/// The text of the caption_ids of one picture.
std::string caption_picture(Step37Model& model, const Tokenizer& tokenizer, const PictureReference& picture,
                            const std::vector<int64_t>& prompt, const CaptionerOptions& options,
                            const parallel::GroupPtr& tp, const at::Device& device);

}  // namespace megatron_cpp::step37
