#include "step37/data/web_data_set.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>

#include "step37/data/chat_sample.h"
#include "step37/data/conversation.h"
#include "step37/data/json_lines.h"
#include "step37/data/utf8.h"

namespace megatron_cpp::step37 {
namespace {

constexpr int64_t kLongestText = int64_t{1} << 26;

/// The name of a member without its folder.
std::string file_name(const TarMember& member) { return member.name.substr(member.name.rfind('/') + 1); }

/// The path up to the first dot of the file name.
std::string key_of(const TarMember& member) {
  const auto begin = member.name.rfind('/') + 1;  // npos + 1 is 0
  return member.name.substr(0, member.name.find('.', begin));
}

std::string text_in(const std::filesystem::path& shard, const TarMember& member) {
  TORCH_CHECK_VALUE(member.bytes <= kLongestText, file_name(member), " has more than ", kLongestText, " bytes");
  std::ifstream stream(shard, std::ios::binary);
  std::string text(static_cast<size_t>(member.bytes), '\0');
  stream.seekg(member.offset);
  stream.read(text.data(), member.bytes);
  TORCH_CHECK_VALUE(stream, file_name(member), " can't be read");
  return text;
}

bool is_conversation(const nlohmann::ordered_json& json) {
  return json.contains("messages") || json.contains("conversations");
}

/// Whether a member is JSON with a conversation: beside a caption, .json may be anything.
bool has_conversation(const std::filesystem::path& shard, const TarMember& member) {
  try {
    return is_conversation(json_object_in(text_in(shard, member)));
  } catch (const c10::ValueError&) {
    return false;
  }
}

std::string caption_in(const std::string& text) {
  auto [caption, fault] = caption_from_text(text);
  TORCH_CHECK_VALUE(fault != Caption::Fault::kEmpty, "its caption is empty");
  TORCH_CHECK_VALUE(fault != Caption::Fault::kNotUtf8, "its caption isn't UTF-8");
  TORCH_CHECK_VALUE(fault != Caption::Fault::kControlCharacter, "its caption has control characters");
  return std::move(caption);
}

}  // namespace

/// What a sample's text says.
struct WebDataSet::Content {
  std::vector<ChatPart> parts;
  std::vector<TarMember> pictures;  ///< in the order of their parts
};

WebDataSet::WebDataSet(const std::string& shards, ConversationOptions options)
    : shards_(shards_of(shards)), options_(std::move(options)) {
  for (size_t shard = 0; shard < shards_.size(); ++shard) add_shard(shard);
  const auto& first = samples_left_out_.count > 0 ? samples_left_out_.first : damaged_shards_.first;
  TORCH_CHECK_VALUE(!entries_.empty(), printable(shards), " has no sample that can be used",
                    first.empty() ? "" : "; the first: " + first);
}

void WebDataSet::add_shard(size_t shard) {
  auto [members, damage] = list_tar(shards_[shard]);
  if (!damage.empty()) damaged_shards_.add(fmt::format("{}: {}", printable(shards_[shard].string()), damage));
  for (size_t begin = 0; begin < members.size();) {
    const auto key = key_of(members[begin]);
    std::vector<TarMember> group;
    for (; begin < members.size() && key_of(members[begin]) == key; ++begin) group.push_back(std::move(members[begin]));
    add_group(shard, key, group);
  }
}

void WebDataSet::add_group(size_t shard, const std::string& key, const std::vector<TarMember>& members) {
  Entry entry{shard, key, {}, {}};
  const TarMember* text = nullptr;
  const TarMember* json = nullptr;
  for (const auto& member : members) {
    const auto name = file_name(member);
    if (has_picture_extension(name)) entry.pictures.push_back({name, member.offset, member.bytes});
    if (name.ends_with(".txt")) text = &member;
    if (name.ends_with(".json")) json = &member;
  }
  if (text == nullptr && json == nullptr && entry.pictures.empty()) return;  // no sample
  try {
    TORCH_CHECK_VALUE(text != nullptr || json != nullptr, "it has neither .txt nor .json");
    for (const auto& picture : entry.pictures) TORCH_CHECK_VALUE(picture.bytes > 0, picture.name, " is empty");
    const bool prefers_json = text == nullptr || (json != nullptr && has_conversation(shards_[shard], *json));
    entry.text = prefers_json ? *json : *text;
    content_of(entry);
    entry.text.name = file_name(entry.text);
    entries_.push_back(std::move(entry));
  } catch (const c10::ValueError& error) {
    samples_left_out_.add(fmt::format("{}: {}", name_of(entry), printable(error.what_without_backtrace())));
  }
}

WebDataSet::Content WebDataSet::content_of(const Entry& entry) const {
  const auto text = text_in(shards_[entry.shard], entry.text);
  const auto json = entry.text.name.ends_with(".json") ? json_object_in(text) : nlohmann::ordered_json();
  Content content;
  if (!is_conversation(json)) {
    TORCH_CHECK_VALUE(entry.pictures.size() == 1, "a caption for ", entry.pictures.size(), " pictures");
    const auto caption = json.find("caption");
    TORCH_CHECK_VALUE(json.is_null() || (caption != json.end() && caption->is_string()),
                      "its .json has neither messages nor a caption");
    content.parts = caption_parts(caption_in(json.is_null() ? text : caption->get<std::string>()));
    content.pictures = entry.pictures;
    return content;
  }
  std::vector<std::string> names;
  for (const auto& picture : entry.pictures) names.push_back(picture.name);
  const auto conversation = conversation_in(json, names);
  content.parts = options_.chat_template.render(conversation, options_.trained);
  for (const auto& path : conversation.pictures) {
    const auto found = std::find(names.begin(), names.end(), path);
    TORCH_CHECK_VALUE(found != names.end(), "it has no picture ", path);
    content.pictures.push_back(entry.pictures[static_cast<size_t>(found - names.begin())]);
  }
  return content;
}

WebDataSet::Content WebDataSet::content_at(int64_t index) const {
  const auto& entry = entries_.at(static_cast<size_t>(index));
  try {
    return content_of(entry);
  } catch (const c10::ValueError& error) {
    TORCH_CHECK_VALUE(false, name_of(entry), ": ", error.what_without_backtrace());
  }
}

std::string WebDataSet::name_of(const Entry& entry) const {
  return fmt::format("{}: {}", printable(shards_[entry.shard].string()), printable(entry.key));
}

std::string WebDataSet::name(int64_t index) const { return name_of(entries_.at(static_cast<size_t>(index))); }

std::vector<std::string> WebDataSet::texts(int64_t index) const { return texts_of(content_at(index).parts); }

std::vector<PictureReference> WebDataSet::references_to(const std::vector<TarMember>& pictures, int64_t index,
                                                        const SampleFormat& format) const {
  const auto& shard = shards_[entries_[static_cast<size_t>(index)].shard];
  std::vector<PictureReference> references;
  for (const auto& [member, offset, bytes] : pictures)
    references.push_back(reference_to(shard, format, {offset, bytes}));
  return references;
}

std::vector<PictureReference> WebDataSet::pictures(int64_t index, const SampleFormat& format) const {
  return references_to(content_at(index).pictures, index, format);
}

PictureSample WebDataSet::sample(int64_t index, const SampleFormat& format) const {
  const auto content = content_at(index);
  return chat_sample(content.parts, references_to(content.pictures, index, format), format);
}

std::vector<std::string> WebDataSet::left_out() const {
  auto result = sentences(samples_left_out_, num_samples(), "samples");
  if (damaged_shards_.count > 0) {
    result.push_back(fmt::format("{} of {} archives are cut or broken, and what comes before is used (first: {})",
                                 damaged_shards_.count, shards_.size(), damaged_shards_.first));
  }
  return result;
}

}  // namespace megatron_cpp::step37
