#include "step37/data/conversation_data_set.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "step37/data/chat_sample.h"
#include "step37/data/conversation.h"

namespace megatron_cpp::step37 {

ConversationDataSet::ConversationDataSet(std::filesystem::path file, ConversationOptions options)
    : options_(std::move(options)), lines_(std::move(file), [this](const auto& json) {
        options_.chat_template.render(conversation_in(json), options_.trained);
      }) {
  if (options_.picture_folder.empty()) options_.picture_folder = lines_.file().parent_path();
}

std::vector<std::string> ConversationDataSet::texts(int64_t index) const {
  std::vector<std::string> result;
  lines_.with(index, [&](const auto& json) {
    result = texts_of(options_.chat_template.render(conversation_in(json), options_.trained));
  });
  return result;
}

PictureSample ConversationDataSet::sample(int64_t index, const SampleFormat& format) const {
  PictureSample result;
  lines_.with(index, [&](const auto& json) {
    const auto conversation = conversation_in(json);
    const auto parts = options_.chat_template.render(conversation, options_.trained);
    std::vector<PictureReference> pictures;
    for (const auto& path : conversation.pictures) {
      pictures.push_back(reference_to(options_.picture_folder / path, format.crops.global_side));
    }
    result = chat_sample(parts, std::move(pictures), format);
  });
  return result;
}

}  // namespace megatron_cpp::step37
