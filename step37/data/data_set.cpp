#include "step37/data/data_set.h"

#include <nlohmann/json.hpp>

#include "step37/data/picture_features.h"

namespace megatron_cpp::step37 {

void to_json(nlohmann::json& json, const PictureReference& picture) {
  const auto& [path, width, height, bytes, modified, place] = picture;
  json = {path, width, height, bytes, modified, place.offset, place.bytes};
}

void from_json(const nlohmann::json& json, PictureReference& picture) {
  picture = {json[0], json[1], json[2], json[3], json[4], {json[5], json[6]}};
}

SampleFormat sample_format(const Tokenizer& tokenizer, const CropOptions& crops) {
  SampleFormat format;
  format.tokenizer = &tokenizer;
  format.crops = crops;
  format.picture_ids = {tokenizer.id_of("<im_start>"),  tokenizer.id_of("<im_patch>"),
                        tokenizer.id_of("<im_end>"),    tokenizer.id_of("<patch_start>"),
                        tokenizer.id_of("<patch_end>"), tokenizer.id_of("<patch_newline>")};
  format.begin_id = tokenizer.bos_id();
  format.end_id = tokenizer.eos_id();
  return format;
}

std::vector<int64_t> prompt_tokens(const std::vector<PictureReference>& pictures, const SampleFormat& format) {
  std::vector<int64_t> tokens;
  if (format.begin_id) tokens.push_back(*format.begin_id);
  for (const auto& picture : pictures) {
    const auto plan = plan_crops(picture.width, picture.height, format.crops);
    const auto of_picture = picture_tokens(plan, format.crops, format.picture_ids);
    tokens.insert(tokens.end(), of_picture.begin(), of_picture.end());
  }
  return tokens;
}

PictureReference reference_to(const std::filesystem::path& file, const SampleFormat& format,
                              const PicturePlace& place) {
  PictureReference reference{.path = file.string(), .place = place};
  const auto* stored = format.features == nullptr ? nullptr : format.features->find(reference);
  PictureSize size{format.crops.global_side, format.crops.global_side};
  if (stored != nullptr) {
    size = stored->size;
  } else if (const auto header = read_picture_header(file, place); header.ok()) {
    size = header.size;
  }
  reference.width = size.width;
  reference.height = size.height;
  return reference;
}

}  // namespace megatron_cpp::step37
