#include "step37/data/caption_data_set.h"

#include <utility>

#include "step37/data/utf8.h"

namespace megatron_cpp::step37 {

CaptionDataSet::CaptionDataSet(std::filesystem::path folder, std::vector<CaptionedPicture> pictures)
    : folder_(std::move(folder)), pictures_(std::move(pictures)) {}

std::string CaptionDataSet::name(int64_t index) const { return printable(picture(index).path); }

std::vector<std::string> CaptionDataSet::texts(int64_t index) const {
  if (picture(index).caption.empty()) return {};
  return {picture(index).caption};
}

PictureSample CaptionDataSet::sample(int64_t index, const SampleFormat& format) const {
  const auto& [path, caption, width, height, bytes, modified] = picture(index);
  PictureSample sample;
  if (caption.empty()) return sample;
  sample.pictures = {{(folder_ / path).string(), width, height, bytes, modified}};
  sample.tokens = prompt_tokens(sample.pictures, format);
  sample.loss_mask.assign(sample.tokens.size(), 0);
  const auto ids = format.tokenizer->encode(caption);
  sample.tokens.insert(sample.tokens.end(), ids.begin(), ids.end());
  sample.tokens.push_back(format.end_id);
  sample.loss_mask.resize(sample.tokens.size(), 1);
  return sample;
}

}  // namespace megatron_cpp::step37
