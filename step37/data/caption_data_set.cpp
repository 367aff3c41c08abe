#include "step37/data/caption_data_set.h"

#include <utility>

#include "step37/data/chat_sample.h"
#include "step37/data/utf8.h"

namespace megatron_cpp::step37 {

CaptionDataSet::CaptionDataSet(std::filesystem::path folder, std::vector<CaptionedPicture> pictures)
    : folder_(std::move(folder)), pictures_(std::move(pictures)) {}

std::string CaptionDataSet::name(int64_t index) const { return printable(picture(index).path); }

std::vector<std::string> CaptionDataSet::texts(int64_t index) const {
  if (picture(index).caption.empty()) return {};
  return {picture(index).caption};
}

std::vector<PictureReference> CaptionDataSet::pictures(int64_t index, const SampleFormat& /*format*/) const {
  const auto& [path, caption, width, height, bytes, modified] = picture(index);
  if (caption.empty()) return {};
  return {{(folder_ / path).string(), width, height, bytes, modified}};
}

PictureSample CaptionDataSet::sample(int64_t index, const SampleFormat& format) const {
  const auto& caption = picture(index).caption;
  if (caption.empty()) return {};
  return chat_sample(caption_parts(caption), pictures(index, format), format);
}

}  // namespace megatron_cpp::step37
