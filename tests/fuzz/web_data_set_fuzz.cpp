// The input is a tar archive.
#include <optional>

#include "step37/data/utf8.h"
#include "step37/data/web_data_set.h"
#include "tests/fuzz/fuzz.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp {
namespace {

const step37::Tokenizer& tokenizer() {
  static const auto tokenizer =
      step37::Tokenizer::train({"What is this? A duck."}, 300, step37::ChatTemplate::named("step37").symbols());
  return tokenizer;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const test_support::TemporaryFolder folder;
  const auto file = folder.write("0.tar", fuzz::text_of(data, size));
  std::optional<step37::WebDataSet> set;
  const auto reason = fuzz::refusal([&] {
    const auto listing = step37::list_tar(file);
    int64_t end = 0;
    for (const auto& [name, offset, bytes] : listing.members) {
      FUZZ_CHECK(offset >= end + 512 && bytes >= 0 && bytes <= static_cast<int64_t>(size) - offset);
      FUZZ_CHECK(name.find('\0') == std::string::npos);
      end = offset + bytes;
    }
    set.emplace(file.string(), step37::ConversationOptions{});
  });
  if (reason) {
    FUZZ_CHECK(fuzz::contains(*reason, file.string()), *reason, " names no file");
    FUZZ_CHECK(step37::is_utf8(*reason) && !fuzz::contains(*reason, "\n"), *reason);
    return 0;
  }
  const auto format = step37::sample_format(
      tokenizer(), {.global_side = 28, .crop_side = 14, .max_side = 112, .vision_patch_size = 14, .with_crops = false});
  for (const auto& sentence : set->left_out()) FUZZ_CHECK(step37::is_utf8(sentence), sentence);
  for (int64_t i = 0; i < set->num_samples(); ++i) {
    const auto sample = set->sample(i, format);
    FUZZ_CHECK(sample.tokens.size() >= 2 && sample.tokens.size() == sample.loss_mask.size());
    for (const auto& picture : sample.pictures) {
      FUZZ_CHECK(picture.place.bytes > 0 && picture.place.offset + picture.place.bytes <= static_cast<int64_t>(size));
    }
    FUZZ_CHECK(step37::is_utf8(set->name(i)));
  }
  return 0;
}

}  // namespace megatron_cpp
