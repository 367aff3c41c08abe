#include "step37/data/chat_sample.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <utility>

namespace megatron_cpp::step37 {
namespace {

using Kind = ChatPart::Kind;

void append_tokens(PictureSample& sample, const std::vector<int64_t>& tokens, bool in_loss) {
  sample.tokens.insert(sample.tokens.end(), tokens.begin(), tokens.end());
  sample.loss_mask.resize(sample.tokens.size(), in_loss ? 1 : 0);
}

/// The tokens of a picture never count in the loss.
void append_picture(PictureSample& sample, PictureReference picture, const SampleFormat& format) {
  const auto plan = plan_crops(picture.width, picture.height, format.crops);
  append_tokens(sample, picture_tokens(plan, format.crops, format.picture_ids), /*in_loss=*/false);
  sample.pictures.push_back(std::move(picture));
}

/// Encodes adjacent texts as one.
class TextRun {
 public:
  TextRun(PictureSample& sample, const Tokenizer& tokenizer) : sample_(sample), tokenizer_(tokenizer) {}

  void add(const ChatPart& part) {
    if (part.in_loss) answers_.push_back({text_.size(), text_.size() + part.text.size()});
    text_ += part.text;
  }

  void finish() {
    if (text_.empty()) return;
    const auto tokens = tokenizer_.encode(text_);
    const auto begin = sample_.tokens.size();
    append_tokens(sample_, tokens, /*in_loss=*/false);
    for (const auto& answer : answers_) {
      const auto first = position(answer.begin, tokens.size());
      const auto last = std::max(first, position(answer.end, tokens.size()));
      std::fill(sample_.loss_mask.begin() + static_cast<std::ptrdiff_t>(begin + first),
                sample_.loss_mask.begin() + static_cast<std::ptrdiff_t>(begin + last), 1);
    }
    text_.clear();
    answers_.clear();
  }

 private:
  struct Range {
    size_t begin;
    size_t end;
  };

  /// The tokens of the first `bytes` bytes alone.
  size_t position(size_t bytes, size_t num_tokens) const {
    if (bytes == text_.size()) return num_tokens;
    return bytes == 0 ? 0 : std::min(tokenizer_.encode(text_.substr(0, bytes)).size(), num_tokens);
  }

  PictureSample& sample_;
  const Tokenizer& tokenizer_;
  std::string text_;
  std::vector<Range> answers_;
};

}  // namespace

std::vector<ChatPart> caption_parts(std::string caption) {
  return {{Kind::kPicture, {}},
          {Kind::kText, std::move(caption), /*in_loss=*/true},
          {Kind::kSymbol, std::string(kEndSymbol), /*in_loss=*/true}};
}

PictureSample chat_sample(const std::vector<ChatPart>& parts, std::vector<PictureReference> pictures,
                          const SampleFormat& format) {
  TORCH_CHECK_VALUE(format.tokenizer != nullptr, "a conversation needs a tokenizer");
  PictureSample sample;
  if (format.begin_id) append_tokens(sample, {*format.begin_id}, false);
  TextRun run(sample, *format.tokenizer);
  size_t next_picture = 0;
  for (const auto& part : parts) {
    if (part.kind == Kind::kText) {
      run.add(part);
      continue;
    }
    run.finish();
    if (part.kind == Kind::kPicture) {
      append_picture(sample, std::move(pictures.at(next_picture++)), format);
    } else {
      append_tokens(sample, {part.text == kEndSymbol ? format.end_id : format.tokenizer->control_id(part.text)},
                    part.in_loss);
    }
  }
  run.finish();
  return sample;
}

std::vector<std::string> texts_of(const std::vector<ChatPart>& parts) {
  std::vector<std::string> texts;
  bool goes_on = false;
  for (const auto& part : parts) {
    const bool is_text = part.kind == Kind::kText;
    if (is_text && goes_on) {
      texts.back() += part.text;
    } else if (is_text) {
      texts.push_back(part.text);
    }
    goes_on = is_text;
  }
  return texts;
}

}  // namespace megatron_cpp::step37
