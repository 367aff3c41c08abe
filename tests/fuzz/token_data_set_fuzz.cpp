// The input is a file of token ids. Those of picture symbols are 1 to 6.
#include <optional>

#include "step37/data/token_data_set.h"
#include "step37/data/utf8.h"
#include "tests/fuzz/fuzz.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp {

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const test_support::TemporaryFolder folder;
  const auto file = folder.write("tokens.jsonl", fuzz::text_of(data, size));
  for (const bool with_crops : {false, true}) {
    step37::SampleFormat format;
    format.crops = {
        .global_side = 28, .crop_side = 14, .max_side = 112, .vision_patch_size = 14, .with_crops = with_crops};
    format.picture_ids = {1, 2, 3, 4, 5, 6};
    const step37::TokenOptions options{20, format.picture_ids, format.crops, "/none"};
    std::optional<step37::TokenDataSet> set;
    const auto reason = fuzz::refusal([&] { set.emplace(file, options); });
    if (reason) {
      FUZZ_CHECK(fuzz::contains(*reason, file.string()), *reason, " names no file");
      FUZZ_CHECK(step37::is_utf8(*reason) && !fuzz::contains(*reason, "\n"), *reason);
      continue;
    }
    for (int64_t i = 0; i < set->num_samples(); ++i) {
      step37::PictureSample sample;
      const auto misfit = fuzz::refusal([&] { sample = set->sample(i, format); });
      if (misfit) {
        // No picture is there: each counts as one without crops.
        FUZZ_CHECK(with_crops && misfit->starts_with(set->name(i)), *misfit);
        continue;
      }
      FUZZ_CHECK(sample.tokens.size() >= 2 && sample.tokens.size() == sample.loss_mask.size());
      size_t num_pictures = 0;
      for (size_t k = 0; k < sample.tokens.size(); ++k) {
        FUZZ_CHECK(sample.tokens[k] >= 0 && sample.tokens[k] < 20 && sample.loss_mask[k] <= 1);
        num_pictures += sample.tokens[k] == format.picture_ids.im_start ? 1U : 0U;
      }
      FUZZ_CHECK(num_pictures == sample.pictures.size());
    }
  }
  return 0;
}

}  // namespace megatron_cpp
