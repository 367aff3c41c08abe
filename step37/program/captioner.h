// Captions from a model.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <string>
#include <vector>

#include "parallel/group.h"
#include "step37/data/data_set.h"
#include "step37/data/picture_faults.h"
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

/// Goes on with `tokens` until one of end_ids is chosen or max_new_tokens are. The tower runs once; of the decoder a
/// KeyValueCache keeps what later tokens need.
/// @param tokens    with those of `pictures` in them, as prompt_tokens() makes them; all arguments are equal on every
///                  rank
/// @return          the new ids, without the one that ended them. Equal on every rank.
/// Collective over tp, and with experts over ep and etp. A broken picture is replaced by a black one, and noted in
/// options.faults.
std::vector<int64_t> caption_ids(Step37Model& model, std::vector<int64_t> tokens,
                                 const std::vector<PictureReference>& pictures, const CaptionerOptions& options,
                                 const parallel::GroupPtr& tp, const at::Device& device);

}  // namespace megatron_cpp::step37
