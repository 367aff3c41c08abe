// The input is a metadata.csv.
#include <optional>

#include "step37/data/flickr8k_data_set.h"
#include "step37/data/utf8.h"
#include "tests/fuzz/fuzz.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp {
namespace {

/// Every field in quotes.
std::string written(const std::vector<std::vector<std::string>>& records) {
  std::string text;
  for (const auto& record : records) {
    for (size_t i = 0; i < record.size(); ++i) {
      text += i == 0 ? "\"" : ",\"";
      for (const char c : record[i]) text += c == '"' ? std::string("\"\"") : std::string(1, c);
      text += '"';
    }
    text += "\r\n";
  }
  return text;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const test_support::TemporaryFolder folder;
  const auto text = fuzz::text_of(data, size);
  const auto malformed = fuzz::refusal([&] {
    const auto records = step37::csv_records(text);
    FUZZ_CHECK(step37::csv_records(written(records)) == records, "what was read is written otherwise");
  });
  if (malformed) FUZZ_CHECK(malformed->starts_with("line "), *malformed);
  const auto file = folder.write("metadata.csv", text);
  std::optional<step37::Flickr8kDataSet> set;
  const auto reason = fuzz::refusal([&] { set.emplace(folder.path(), step37::ConversationOptions{}); });
  if (reason) {
    FUZZ_CHECK(fuzz::contains(*reason, file.string()) && step37::is_utf8(*reason), *reason, " names no file");
    return 0;
  }
  for (int64_t i = 0; i < set->num_samples(); ++i) {
    FUZZ_CHECK(fuzz::contains(set->name(i), " row "));
    for (const auto& part : set->texts(i)) FUZZ_CHECK(step37::is_utf8(part));
  }
  for (const auto& sentence : set->left_out()) FUZZ_CHECK(step37::is_utf8(sentence), sentence);
  return 0;
}

}  // namespace megatron_cpp
