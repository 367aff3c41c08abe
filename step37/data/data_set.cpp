#include "step37/data/data_set.h"

namespace megatron_cpp::step37 {

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

PictureReference reference_to(const std::filesystem::path& file, int64_t side, const PicturePlace& place) {
  const auto header = read_picture_header(file, place);
  return {.path = file.string(),
          .width = header.ok() ? header.size.width : side,
          .height = header.ok() ? header.size.height : side,
          .place = place};
}

}  // namespace megatron_cpp::step37
