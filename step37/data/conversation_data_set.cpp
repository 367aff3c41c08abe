#include "step37/data/conversation_data_set.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "step37/data/chat_sample.h"
#include "step37/data/conversation.h"

namespace megatron_cpp::step37 {

ConversationDataSet::ConversationDataSet(std::filesystem::path file, ConversationOptions options)
    : JsonLinesDataSet(
          std::move(file), options.picture_folder,
          [&options](const auto& json) { options.chat_template.render(conversation_in(json), options.trained); }),
      options_(std::move(options)) {}

std::vector<std::string> ConversationDataSet::texts(int64_t index) const {
  std::vector<std::string> result;
  lines().with(index, [&](const auto& json) {
    result = texts_of(options_.chat_template.render(conversation_in(json), options_.trained));
  });
  return result;
}

std::vector<PictureReference> ConversationDataSet::pictures(int64_t index, const SampleFormat& format) const {
  std::vector<PictureReference> result;
  lines().with(index, [&](const auto& json) { result = references_to(conversation_in(json).pictures, format); });
  return result;
}

PictureSample ConversationDataSet::sample(int64_t index, const SampleFormat& format) const {
  PictureSample result;
  lines().with(index, [&](const auto& json) {
    const auto conversation = conversation_in(json);
    const auto parts = options_.chat_template.render(conversation, options_.trained);
    result = chat_sample(parts, references_to(conversation.pictures, format), format);
  });
  return result;
}

}  // namespace megatron_cpp::step37
