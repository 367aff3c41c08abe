// Captioned pictures as training samples.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "step37/data/captioned_pictures.h"
#include "step37/data/data_set.h"

namespace megatron_cpp::step37 {

/// One sample per picture: begin token, picture tokens, caption, end token. The loss counts the caption and the end
/// token. The name of a sample is the picture's path relative to the folder.
class CaptionDataSet : public DataSet {
 public:
  /// @param folder    that the pictures' paths are relative to
  /// @param pictures  one without a caption gives an empty sample: it was removed from the folder
  CaptionDataSet(std::filesystem::path folder, std::vector<CaptionedPicture> pictures);

  int64_t num_samples() const override { return static_cast<int64_t>(pictures_.size()); }
  std::string name(int64_t index) const override;
  std::vector<std::string> texts(int64_t index) const override;
  std::vector<PictureReference> pictures(int64_t index, const SampleFormat& format) const override;
  PictureSample sample(int64_t index, const SampleFormat& format) const override;

 private:
  const CaptionedPicture& picture(int64_t index) const { return pictures_.at(static_cast<size_t>(index)); }

  std::filesystem::path folder_;
  std::vector<CaptionedPicture> pictures_;
};

}  // namespace megatron_cpp::step37
