// The input is a file of conversations.
#include <optional>

#include "step37/data/conversation_data_set.h"
#include "step37/data/utf8.h"
#include "tests/fuzz/fuzz.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp {
namespace {

using step37::ChatTemplate;

const step37::Tokenizer& tokenizer() {
  static const auto tokenizer = step37::Tokenizer::train({"user\nassistant\n", "What is this? A duck.", "<think>"}, 310,
                                                         ChatTemplate::named("step37").symbols());
  return tokenizer;
}

step37::SampleFormat format() {
  return step37::sample_format(tokenizer(),
                               {.global_side = 28, .crop_side = 14, .max_side = 112, .vision_patch_size = 14});
}

void check_sample(const step37::ConversationDataSet& set, int64_t index) {
  const auto sample = set.sample(index, format());
  FUZZ_CHECK(sample.tokens.size() >= 2 && sample.tokens.size() == sample.loss_mask.size());
  size_t num_pictures = 0;
  int64_t num_ends = 0;
  int64_t in_loss = 0;
  for (size_t i = 0; i < sample.tokens.size(); ++i) {
    const auto id = sample.tokens[i];
    FUZZ_CHECK(id >= 0 && id < tokenizer().vocab_size(), "id ", id);
    num_pictures += id == format().picture_ids.im_start ? 1U : 0U;
    num_ends += id == tokenizer().eos_id() ? 1 : 0;
    in_loss += sample.loss_mask[i];
  }
  FUZZ_CHECK(num_pictures == sample.pictures.size(), num_pictures, " pictures, or text turned into their symbol");
  FUZZ_CHECK(num_ends == 0, "text turned into the end token");
  FUZZ_CHECK(in_loss >= 1, "nothing counts");
  for (const auto& picture : sample.pictures) FUZZ_CHECK(picture.width == 28 && picture.height == 28);
  for (const auto& text : set.texts(index)) FUZZ_CHECK(!text.empty() && step37::is_utf8(text));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const test_support::TemporaryFolder folder;
  const auto file = folder.write("chats.jsonl", fuzz::text_of(data, size));
  for (const auto trained : {step37::TrainedTurns::kAfterLastUser, step37::TrainedTurns::kAll}) {
    std::optional<step37::ConversationDataSet> set;
    const auto reason = fuzz::refusal(
        [&] { set.emplace(file, step37::ConversationOptions{.trained = trained, .picture_folder = "/none"}); });
    if (reason) {
      FUZZ_CHECK(fuzz::contains(*reason, file.string()), *reason, " names no file");
      FUZZ_CHECK(step37::is_utf8(*reason) && !fuzz::contains(*reason, "\n"), *reason);
      continue;
    }
    for (const auto& sentence : set->left_out()) FUZZ_CHECK(step37::is_utf8(sentence), sentence);
    for (int64_t i = 0; i < set->num_samples(); ++i) check_sample(*set, i);
  }
  return 0;
}

}  // namespace megatron_cpp
