#include "step37/data/token_data_set.h"

#include <c10/util/Exception.h>

#include <nlohmann/json.hpp>
#include <utility>

#include "megatron_cpp/checkpoint/json_integer.h"
#include "step37/data/chat_sample.h"

namespace megatron_cpp::step37 {
namespace {

/// A line that has been checked, but for the sizes of its pictures.
struct TokenLine {
  Sample sample;
  std::vector<std::string> images;
  std::vector<std::vector<int64_t>> pictures;  ///< the tokens of each
};

/// Splits off the tokens of pictures: crops, each with the line feed that may follow it, then the global view.
class PictureScan {
 public:
  PictureScan(const std::vector<int64_t>& tokens, const TokenOptions& options) : tokens_(tokens), options_(options) {}

  std::vector<std::vector<int64_t>> run() {
    if (!options_.picture_ids) return {};
    const auto& ids = *options_.picture_ids;
    std::vector<std::vector<int64_t>> pictures;
    std::vector<int64_t> crops;  // of a picture whose global view comes
    while (at_ < tokens_.size()) {
      const auto begin = at_;
      const auto id = tokens_[at_];
      if (id == ids.patch_start) {
        TORCH_CHECK_VALUE(options_.crops.with_crops, "token ", at_, " begins a crop, and there are no crops");
        view(options_.crops.crop_tokens(), ids.patch_end);
        if (at_ < tokens_.size() && tokens_[at_] == ids.patch_newline) ++at_;
        append(crops, begin);
      } else if (id == ids.im_start) {
        view(options_.crops.global_tokens(), ids.im_end);
        append(crops, begin);
        pictures.push_back(std::exchange(crops, {}));
      } else {
        TORCH_CHECK_VALUE(crops.empty(), "token ", at_, " stands between the views of a picture");
        const bool is_of_view =
            id == ids.im_patch || id == ids.im_end || id == ids.patch_end || id == ids.patch_newline;
        TORCH_CHECK_VALUE(!is_of_view, "token ", at_, " is a picture's, outside of its views");
        ++at_;
      }
    }
    TORCH_CHECK_VALUE(crops.empty(), "the tokens end between the views of a picture");
    return pictures;
  }

 private:
  /// A start token, patches, an end token.
  void view(int64_t num_patches, int64_t end_id) {
    const auto begin = at_++;
    while (at_ < tokens_.size() && tokens_[at_] == options_.picture_ids->im_patch) ++at_;
    const auto found = static_cast<int64_t>(at_ - begin) - 1;
    TORCH_CHECK_VALUE(found == num_patches, "the view at token ", begin, " has ", found, " patches instead of ",
                      num_patches);
    TORCH_CHECK_VALUE(at_ < tokens_.size() && tokens_[at_] == end_id, "the view at token ", begin, " doesn't end");
    ++at_;
  }

  void append(std::vector<int64_t>& list, size_t begin) const {
    list.insert(list.end(), tokens_.begin() + static_cast<std::ptrdiff_t>(begin),
                tokens_.begin() + static_cast<std::ptrdiff_t>(at_));
  }

  const std::vector<int64_t>& tokens_;
  const TokenOptions& options_;
  size_t at_ = 0;
};

std::vector<int64_t> integers_at(const nlohmann::ordered_json& json, const char* key) {
  const auto found = json.find(key);
  TORCH_CHECK_VALUE(found != json.end(), "it has no ", key);
  auto values = megatron_cpp::internal::integers_of(*found);
  TORCH_CHECK_VALUE(values.has_value(), key, " isn't a list of integers");
  return *std::move(values);
}

TokenLine line_in(const nlohmann::ordered_json& json, const TokenOptions& options) {
  TokenLine line;
  auto& tokens = line.sample.tokens;
  tokens = integers_at(json, "tokens");
  TORCH_CHECK_VALUE(tokens.size() >= 2, "it has ", tokens.size(), " tokens; at least 2 are needed");
  for (const int64_t id : tokens) {
    TORCH_CHECK_VALUE(id >= 0 && id < options.vocab_size, "id ", id, " isn't in the vocabulary of ",
                      options.vocab_size);
  }
  if (json.contains("loss_mask")) {
    const auto mask = integers_at(json, "loss_mask");
    TORCH_CHECK_VALUE(mask.size() == tokens.size(), "loss_mask has ", mask.size(), " values for ", tokens.size(),
                      " tokens");
    for (const int64_t value : mask) {
      TORCH_CHECK_VALUE(value == 0 || value == 1, "loss_mask has ", value, ", which is neither 0 nor 1");
      line.sample.loss_mask.push_back(static_cast<uint8_t>(value));
    }
  } else {
    line.sample.loss_mask.assign(tokens.size(), 1);
    line.sample.loss_mask.front() = 0;
  }
  if (const auto images = json.find("images"); images != json.end()) {
    TORCH_CHECK_VALUE(images->is_array(), "images isn't a list");
    for (const auto& image : *images) {
      TORCH_CHECK_VALUE(image.is_string() && !image.empty(), "images isn't a list of paths");
      line.images.push_back(image.get<std::string>());
      TORCH_CHECK_VALUE(!line.images.back().empty() && line.images.back().find('\0') == std::string::npos,
                        "a path in images is empty or has a NUL character");
    }
  }
  line.pictures = PictureScan(tokens, options).run();
  TORCH_CHECK_VALUE(line.pictures.size() == line.images.size(), "it has the tokens of ", line.pictures.size(),
                    " pictures for ", line.images.size(), " images");
  return line;
}

}  // namespace

TokenDataSet::TokenDataSet(std::filesystem::path file, TokenOptions options)
    : JsonLinesDataSet(std::move(file), options.picture_folder,
                       [&options](const auto& json) { line_in(json, options); }),
      options_(std::move(options)) {}

std::vector<std::string> TokenDataSet::texts(int64_t /*index*/) const { return {}; }

std::vector<PictureReference> TokenDataSet::pictures(int64_t index, const SampleFormat& format) const {
  std::vector<PictureReference> result;
  lines().with(index, [&](const auto& json) { result = references_to(line_in(json, options_).images, format); });
  return result;
}

PictureSample TokenDataSet::sample(int64_t index, const SampleFormat& format) const {
  PictureSample result;
  lines().with(index, [&](const auto& json) {
    auto line = line_in(json, options_);
    static_cast<Sample&>(result) = std::move(line.sample);
    result.pictures = references_to(line.images, format);
    for (size_t i = 0; i < line.images.size(); ++i) {
      const auto& reference = result.pictures[i];
      const auto plan = plan_crops(reference.width, reference.height, format.crops);
      TORCH_CHECK_VALUE(line.pictures[i] == picture_tokens(plan, format.crops, format.picture_ids), "the tokens of ",
                        line.images[i], " are not those of a picture of ", reference.width, " x ", reference.height,
                        " pixels, which has ", plan.num_crops(), " crops");
    }
  });
  return result;
}

}  // namespace megatron_cpp::step37
