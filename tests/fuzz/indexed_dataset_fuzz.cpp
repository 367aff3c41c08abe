// The input is the length of the index in two bytes, the index, and then the ids.
#include <algorithm>
#include <optional>

#include "megatron_cpp/data/indexed_dataset.h"
#include "tests/fuzz/fuzz.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp {

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const test_support::TemporaryFolder folder;
  auto input = fuzz::text_of(data, size);
  if (size < 2) return 0;
  const auto length = static_cast<size_t>(data[0]) | static_cast<size_t>(data[1]) << 8U;
  input.remove_prefix(2);
  folder.write("text.idx", input.substr(0, length));
  folder.write("text.bin", input.substr(std::min(length, input.size())));
  std::optional<IndexedDataset> set;
  const auto reason = fuzz::refusal([&] { set.emplace(folder.path() / "text"); });
  if (reason) {
    FUZZ_CHECK(fuzz::contains(*reason, folder.path().string()), *reason, " names no file");
    return 0;
  }
  int64_t num_ids = 0;
  for (int64_t i = 0; i < set->num_documents(); ++i) {
    const auto count = set->length(i);
    FUZZ_CHECK(count >= 0);
    num_ids += count;
    if (num_ids > 1 << 20) return 0;  // sequences may overlap
    const auto all = set->tokens(i, 0, count);
    FUZZ_CHECK(static_cast<int64_t>(all.size()) == count);
    const auto half = set->tokens(i, count / 2, count);
    FUZZ_CHECK(std::equal(half.begin(), half.end(), all.begin() + count / 2, all.end()));
  }
  return 0;
}

}  // namespace megatron_cpp
