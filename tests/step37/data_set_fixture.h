// A small tokenizer and format for tests of data sets.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <vector>

#include "step37/data/chat_template.h"
#include "step37/data/crop_plan.h"
#include "step37/data/data_set.h"
#include "step37/data/tokenizer.h"

namespace megatron_cpp::data_set_fixture {

using Ids = std::vector<int64_t>;
using Mask = std::vector<uint8_t>;

inline const step37::Tokenizer& tokenizer() {
  static const auto trained = step37::Tokenizer::train({"A duck and a bus.", "What is this?", "Describe this image."},
                                                       330, step37::ChatTemplate::named("step37").symbols());
  return trained;
}

/// Global views of 1 row of features, crops of 1.
inline step37::SampleFormat small_format(bool with_crops) {
  return step37::sample_format(
      tokenizer(),
      {.global_side = 28, .crop_side = 14, .max_side = 112, .vision_patch_size = 14, .with_crops = with_crops});
}

/// The tokens of a picture of these sides.
inline Ids tokens_of(int64_t width, int64_t height, const step37::SampleFormat& format) {
  return step37::picture_tokens(step37::plan_crops(width, height, format.crops), format.crops, format.picture_ids);
}

inline Ids joined(const std::vector<Ids>& parts) {
  Ids all;
  for (const auto& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

/// A sample. Its pictures are those that the data set lists without a tokenizer.
inline step37::PictureSample sample_of(const step37::DataSet& set, int64_t index, const step37::SampleFormat& format) {
  auto without_tokenizer = format;
  without_tokenizer.tokenizer = nullptr;
  auto sample = set.sample(index, format);
  EXPECT_EQ(nlohmann::json(set.pictures(index, without_tokenizer)), nlohmann::json(sample.pictures));
  return sample;
}

inline int64_t num_in_loss(const Sample& sample) {
  return std::count(sample.loss_mask.begin(), sample.loss_mask.end(), 1);
}

}  // namespace megatron_cpp::data_set_fixture
