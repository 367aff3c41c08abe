// Documents of Megatron's indexed data sets, cut into samples.
#include "step37/data/document_data_set.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <vector>

#include "tests/step37/data_set_fixture.h"
#include "tests/support/errors.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp::step37 {
namespace {

namespace fs = std::filesystem;
using namespace test_support;
using namespace data_set_fixture;

/// Documents of 16-bit ids, as Megatron writes them.
void write_documents(const fs::path& prefix, const std::vector<std::vector<uint16_t>>& documents) {
  const auto bytes_of = [](auto value) { return std::string(reinterpret_cast<const char*>(&value), sizeof(value)); };
  const auto count = static_cast<int64_t>(documents.size());
  auto index = std::string("MMIDIDX\0\0", 9) + bytes_of(int64_t{1}) + '\x8' + bytes_of(count) + bytes_of(count + 1);
  std::string ids;
  std::string pointers;
  for (const auto& document : documents) {
    index += bytes_of(static_cast<int32_t>(document.size()));
    pointers += bytes_of(static_cast<int64_t>(ids.size()));
    for (const auto id : document) ids += bytes_of(id);
  }
  index += pointers;
  for (int64_t i = 0; i <= count; ++i) index += bytes_of(i);
  test_support::write_file(fs::path(prefix) += ".idx", index);
  test_support::write_file(fs::path(prefix) += ".bin", ids);
}

TEST(DocumentDataSet, EachIdButTheFirstIsPredictedOnce) {
  const TemporaryFolder folder;
  const auto prefix = folder.path() / "text";
  const std::vector<std::vector<uint16_t>> documents = {{7, 8, 9}, {1}, {10, 11, 12, 13, 14, 15, 16, 17}, {}, {20, 21}};
  write_documents(prefix, documents);
  for (const int64_t max_tokens : {2, 3, 4, 5, 8, 9}) {
    const DocumentDataSet set(prefix, max_tokens);
    std::vector<std::pair<int64_t, int64_t>> predicted;
    for (int64_t i = 0; i < set.num_samples(); ++i) {
      const auto sample = set.sample(i, {});
      EXPECT_TRUE(sample.pictures.empty() && set.texts(i).empty());
      ASSERT_GE(sample.tokens.size(), 2U);
      EXPECT_LE(static_cast<int64_t>(sample.tokens.size()), max_tokens);
      Mask mask(sample.tokens.size(), 1);
      mask[0] = 0;
      EXPECT_EQ(sample.loss_mask, mask);
      for (size_t k = 1; k < sample.tokens.size(); ++k) predicted.emplace_back(sample.tokens[k - 1], sample.tokens[k]);
    }
    std::vector<std::pair<int64_t, int64_t>> wanted;
    for (const auto& document : documents) {
      for (size_t k = 1; k < document.size(); ++k) wanted.emplace_back(document[k - 1], document[k]);
    }
    EXPECT_EQ(predicted, wanted) << max_tokens;
  }
  const DocumentDataSet set(prefix, 4);
  ASSERT_EQ(set.num_samples(), 5);
  const auto of = prefix.string();
  EXPECT_EQ(set.name(0), of + " document 0");
  EXPECT_EQ(set.name(1), of + " document 2, part 1 of 3");
  EXPECT_EQ(set.name(3), of + " document 2, part 3 of 3");
  EXPECT_EQ(set.name(4), of + " document 4");
  EXPECT_EQ(set.left_out(),
            std::vector<std::string>{"2 of 5 documents are left out (first: " + of + " document 1: it has 1 ids)"});

  write_documents(prefix, {{3, 60000}});
  EXPECT_TRUE(contains(value_error([&] { DocumentDataSet(prefix, 4).sample(0, small_format(false)); }),
                       "document 0: id 60000 isn't in the vocabulary"));
  EXPECT_TRUE(contains(value_error([&] { DocumentDataSet(prefix, 1); }), "at least 2"));
  write_documents(prefix, {{3}, {}});
  EXPECT_TRUE(contains(value_error([&] { DocumentDataSet(prefix, 4); }), of + " has no document of two ids"));
}

}  // namespace
}  // namespace megatron_cpp::step37
