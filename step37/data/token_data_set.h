// Ready-made token ids in a file of JSON lines, as a data set.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "step37/data/json_lines_data_set.h"

namespace megatron_cpp::step37 {

/// What the ids of a file must be like.
struct TokenOptions {
  int64_t vocab_size = 0;                           ///< ids are in [0, vocab_size)
  std::optional<PictureTokenIds> picture_ids = {};  ///< as SampleFormat's; nullopt: no line has images
  CropOptions crops = {};                           ///< as SampleFormat's
  std::filesystem::path picture_folder = {};  ///< that relative paths are relative to; empty: the folder of the file
};

/// One sample a line: {"tokens": [1, 5, 7], "loss_mask": [0, 1, 1], "images": ["a.png"]}, as
/// scripts/tokenize_conversations.py writes it. Without "loss_mask" all but the first token count; "images" may be left
/// out. The tokens of each picture stand in "tokens", in the order of the images: what picture_tokens gives. No begin
/// and end token is added.
class TokenDataSet final : public JsonLinesDataSet {
 public:
  /// Reads every line once; no picture is opened. Left out are lines whose ids are outside of the vocabulary, whose
  /// mask has another length or other values than 0 and 1, or whose pictures' tokens aren't as many and as long as the
  /// views of the images.
  /// @throws c10::ValueError as JsonLines.
  TokenDataSet(std::filesystem::path file, TokenOptions options);

  std::vector<std::string> texts(int64_t index) const override;
  std::vector<PictureReference> pictures(int64_t index, const SampleFormat& format) const override;
  /// @throws also if the crops in the tokens aren't those of the picture, whose header is read.
  PictureSample sample(int64_t index, const SampleFormat& format) const override;

 private:
  TokenOptions options_;
};

}  // namespace megatron_cpp::step37
