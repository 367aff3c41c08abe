// A packed sequence with its pictures: which rank decodes which, and the model's batch.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "megatron_cpp/data/packed_batch.h"
#include "parallel/group.h"
#include "step37/data/crop_plan.h"
#include "step37/data/data_set.h"
#include "step37/data/picture_faults.h"
#include "step37/step37_model.h"

namespace megatron_cpp::step37 {

/// A packed sequence, or several concatenated, and its pictures in the order of their tokens.
struct PicturePack {
  PackedBatch packed;
  std::vector<PictureReference> pictures;
  std::vector<std::string> samples;  ///< DataSet::name of each
};

/// A SamplePacker that keeps the pictures and names of the samples beside their tokens.
class PicturePacker {
 public:
  /// @throws c10::ValueError as PackingOptions::validate().
  explicit PicturePacker(const PackingOptions& options) : packer_(options) {}

  /// As SamplePacker::add. A sample without tokens is dropped.
  SamplePacker::Result add(const PictureSample& sample, const std::string& name);

  /// Whether no sample was added since the last finish().
  bool empty() const { return packer_.empty(); }

  /// As SamplePacker::finish.
  PicturePack finish();

 private:
  SamplePacker packer_;
  PicturePack open_;  ///< pictures and names of the samples in packer_
};

/// The tensor-parallel rank that decodes each picture and runs the tower on all its views: balanced by patches.
std::vector<int64_t> assign_pictures(const std::vector<PictureReference>& pictures, const CropOptions& crops, int t);

/// Decodes this rank's pictures into groups for the model: crops, then global views; pixels are uint8 on the CPU. With
/// SampleFormat::features no picture is opened: groups have image_features, bfloat16 on the CPU. With
/// MmEncoderTpMode::kData these are the pictures that assign_pictures gives to the rank of `tp`, and groups are `held`;
/// with kWeights all of them. A broken picture becomes a black one. Broken, damaged and changed files are noted in
/// `faults`. Thread-safe; not collective.
/// @param num_threads  that decode or read at the same time, this one included
/// @throws c10::ValueError as PictureFeatures::read.
std::vector<ImageForInsert> load_pictures(const std::vector<PictureReference>& pictures, const SampleFormat& format,
                                          MmEncoderTpMode mode, const parallel::GroupPtr& tp, PictureFaults& faults,
                                          int64_t num_threads = 1);

/// Calls action(tensor) for the pixels or the features of each group of load_pictures.
template <class Action>
void for_each_tensor(std::vector<ImageForInsert>& groups, const Action& action) {
  for (auto& group : groups)
    action(group.images.defined() ? group.images : std::get<at::Tensor>(*group.image_features));
}

/// Makes the model's batch from a pack: copies pixels to `device` as uint8, without waiting, and normalises them there;
/// features as they are.
Step37Batch to_model_batch(const PackedBatch& packed, std::vector<ImageForInsert> images, const at::Device& device);

}  // namespace megatron_cpp::step37
