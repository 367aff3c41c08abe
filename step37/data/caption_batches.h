// Batches of captioned pictures for training: packed on one rank, decoded one step ahead on the ranks that need them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <filesystem>
#include <future>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "megatron_cpp/data/packed_batch.h"
#include "megatron_cpp/data/sampler.h"
#include "parallel/process_groups.h"
#include "step37/data/captioned_pictures.h"
#include "step37/data/crop_plan.h"
#include "step37/data/data_set.h"
#include "step37/data/picture_faults.h"
#include "step37/data/tokenizer.h"
#include "step37/step37_model.h"

namespace megatron_cpp::step37 {

/// A packed sequence, or several concatenated, and its pictures in the order of their tokens.
struct CaptionPack {
  PackedBatch packed;
  std::vector<PictureReference> pictures;
};

/// The micro-batches of a data-parallel rank for one step, and the counts of the global batch.
struct CaptionStep {
  std::vector<CaptionPack> micro_batches;
  int64_t num_loss_tokens = 0;  ///< of the global batch
  int64_t num_tokens = 0;       ///< of the global batch, padding left out
  int64_t num_pictures = 0;     ///< of the global batch
  SamplerState next;            ///< state of the sampler after the step
};

/// How captioned pictures become samples: begin token, picture tokens, caption tokens, end token. The loss counts the
/// caption and the end token.
SampleFormat caption_format(const Tokenizer& tokenizer, const CropOptions& crops);

/// The begin token and the tokens of the pictures, one behind the other, from which generation starts.
std::vector<int64_t> prompt_tokens(const std::vector<PictureReference>& pictures, const SampleFormat& format);
Sample caption_sample(const PictureReference& picture, const std::vector<int64_t>& caption, const SampleFormat& format);

/// Width and height of a picture file from its header; a square of `side` if it can't be read (decoding will then give
/// a black picture of that size, with a warning).
PictureReference reference_to(const std::filesystem::path& folder, const std::string& path, int64_t side);

/// The tensor-parallel rank that decodes each picture and runs the tower on all its views: balanced by patches.
std::vector<int64_t> assign_pictures(const std::vector<PictureReference>& pictures, const CropOptions& crops, int t);

/// Decodes this rank's pictures of a pack into groups for the model: crops, then global views; pixels are uint8 on the
/// CPU. With MmEncoderTpMode::kData these are the pictures that assign_pictures gives to the rank of `tp`, and groups
/// are `held`; with kWeights all of them. A broken picture becomes a black one. Broken, damaged and changed files are
/// noted in `faults`. Thread-safe; not collective.
std::vector<ImageForInsert> load_pictures(const CaptionPack& pack, const SampleFormat& format,
                                          const std::filesystem::path& folder, MmEncoderTpMode mode,
                                          const parallel::GroupPtr& tp, PictureFaults& faults);

/// Makes the model's batch from a pack: copies pixels to `device` as uint8, without waiting, and normalises them there.
Step37Batch to_model_batch(const CaptionPack& pack, std::vector<ImageForInsert> images, const at::Device& device);

/// Packs samples on tensor-parallel rank 0, sends token ids and picture references to its group, and decodes pictures
/// in the background, one step ahead.
class CaptionLoader {
 public:
  struct Options {
    std::filesystem::path folder;
    SampleFormat format;
    PackingOptions packing;
    int64_t global_batch_size = 1;  ///< packs per step, over all data-parallel ranks
    int64_t micro_batch_size = 1;   ///< packs per micro-batch; times data-parallel size a divisor of global_batch_size
    uint64_t seed = 0;
    MmEncoderTpMode mm_encoder_tp_mode = MmEncoderTpMode::kData;  ///< which pictures a rank decodes
    c10::Device device = c10::Device(c10::kCPU);  ///< that the model runs on; for a GPU pixels are in pinned memory
    /// The number of pictures that may be unreadable; one more ends the run.
    int64_t max_unreadable = std::numeric_limits<int64_t>::max();
    /// The index file of the picture folder, removed if a picture has changed; may be empty.
    std::filesystem::path index;
  };
  /// What tensor-parallel rank 0 packs from; empty on the other ranks.
  struct Source {
    std::vector<PictureReference> pictures;
    std::vector<std::vector<int64_t>> captions;  ///< token ids, one per picture
  };

  /// @param start   state of the sampler before the first step that next() returns.
  /// @param faults  must outlive the loader.
  CaptionLoader(Options options, Source source, const parallel::ProcessGroups& groups, const SamplerState& start,
                PictureFaults& faults);
  ~CaptionLoader();
  CaptionLoader(const CaptionLoader&) = delete;
  CaptionLoader& operator=(const CaptionLoader&) = delete;

  /// The micro-batches of a step with this rank's decoded pictures, one entry per micro-batch. Collective over the
  /// world: shares the faults of pictures, and starts loading the next step, which is broadcast over tp.
  /// @throws c10::ValueError on every rank if more than max_unreadable pictures were unreadable.
  struct LoadedStep {
    CaptionStep step;
    std::vector<std::vector<ImageForInsert>> images;
  };
  LoadedStep next();

 private:
  void prefetch();
  CaptionStep make_step();

  Options options_;
  Source source_;
  parallel::ProcessGroups groups_;
  Sampler sampler_;
  SamplePacker packer_;
  std::vector<PictureReference> open_pictures_;  ///< pictures of the samples in packer_
  PictureFaults& faults_;
  std::future<LoadedStep> ahead_;
};

/// Packs `source` once, in order, into at most `max_packs` packs, for validation. Tensor-parallel rank 0 packs;
/// collective over tp. A micro-batch is one pack; pack i goes to data-parallel rank i % dp. Counts are of all packs.
/// If replicas share experts, ranks with a micro-batch less get one more, without loss: all must run as many.
CaptionStep pack_once(const CaptionLoader::Source& source, const std::optional<int64_t>& max_packs,
                      const CaptionLoader::Options& options, const parallel::ProcessGroups& groups);

}  // namespace megatron_cpp::step37
