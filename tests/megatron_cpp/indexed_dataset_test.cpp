// Megatron's indexed data sets, from bytes put together here by the published layout.
#include "megatron_cpp/data/indexed_dataset.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/support/errors.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp {
namespace {

using namespace test_support;
using Ids = std::vector<int64_t>;

/// A number in little-endian bytes.
std::string bytes_of(int64_t value, int count) {
  std::string bytes;
  for (int i = 0; i < count; ++i) bytes.push_back(static_cast<char>(static_cast<uint64_t>(value) >> (8 * i) & 0xff));
  return bytes;
}

/// Sequences of ids, and which begin documents.
struct Content {
  int code = 8;
  int id_bytes = 2;
  std::vector<Ids> sequences = {{1, 2, 3}, {}, {4}, {5, 60000}};
  Ids documents = {0, 2, 2, 4};
  bool has_modes = false;

  std::string ids() const {
    std::string bytes;
    for (const auto& sequence : sequences) {
      for (const int64_t id : sequence) bytes += bytes_of(id, id_bytes);
    }
    return bytes;
  }
  std::string index() const {
    std::string bytes = std::string("MMIDIDX\0\0", 9) + bytes_of(1, 8) + bytes_of(code, 1);
    bytes += bytes_of(static_cast<int64_t>(sequences.size()), 8) + bytes_of(static_cast<int64_t>(documents.size()), 8);
    for (const auto& sequence : sequences) bytes += bytes_of(static_cast<int64_t>(sequence.size()), 4);
    int64_t pointer = 0;
    for (const auto& sequence : sequences) {
      bytes += bytes_of(pointer, 8);
      pointer += static_cast<int64_t>(sequence.size()) * id_bytes;
    }
    for (const int64_t document : documents) bytes += bytes_of(document, 8);
    if (has_modes) bytes += std::string(sequences.size(), '\1');
    return bytes;
  }
};

class Indexed : public testing::Test {
 protected:
  std::string write(const std::string& index, const std::string& ids) const {
    folder_.write("text.idx", index);
    folder_.write("text.bin", ids);
    return (folder_.path() / "text").string();
  }
  std::string write(const Content& content) const { return write(content.index(), content.ids()); }
  std::string refusal(const std::string& index, const std::string& ids) const {
    return value_error([&] { IndexedDataset{write(index, ids)}; });
  }
  TemporaryFolder folder_;
};

TEST_F(Indexed, EveryIntegerType) {
  struct Type {
    int code;
    int bytes;
    int64_t lowest;
    int64_t highest;
  };
  for (const auto& [code, bytes, lowest, highest] : std::vector<Type>{{1, 1, 0, 255},
                                                                      {2, 1, -128, 127},
                                                                      {3, 2, -32768, 32767},
                                                                      {4, 4, INT32_MIN, INT32_MAX},
                                                                      {5, 8, INT64_MIN, INT64_MAX},
                                                                      {8, 2, 0, 65535}}) {
    const Content content{code, bytes, {{1, lowest}, {highest, 7, 8}}, {0, 2}};
    const IndexedDataset set(write(content));
    ASSERT_EQ(set.num_documents(), 1);
    EXPECT_EQ(set.length(0), 5);
    EXPECT_EQ(set.tokens(0, 0, 5), (Ids{1, lowest, highest, 7, 8})) << code;
    EXPECT_EQ(set.tokens(0, 1, 4), (Ids{lowest, highest, 7}));
    EXPECT_EQ(set.tokens(0, 3, 3), Ids{});
  }
}

TEST_F(Indexed, DocumentsOfSeveralSequencesAndOfNone) {
  for (const bool has_modes : {false, true}) {
    Content content;
    content.has_modes = has_modes;
    const auto prefix = write(content);
    for (const auto& path : {prefix, prefix + ".bin", prefix + ".idx"}) {
      const IndexedDataset set(path);
      ASSERT_EQ(set.num_documents(), 3);
      EXPECT_EQ(set.tokens(0, 0, set.length(0)), (Ids{1, 2, 3}));
      EXPECT_EQ(set.length(1), 0);
      EXPECT_EQ(set.tokens(2, 0, set.length(2)), (Ids{4, 5, 60000}));
      EXPECT_EQ(set.prefix(), prefix);
    }
  }
  Content empty{.sequences = {}, .documents = {0}};
  EXPECT_EQ(IndexedDataset(write(empty)).num_documents(), 0);
  empty.documents.clear();
  EXPECT_EQ(IndexedDataset(write(empty)).num_documents(), 0);
}

TEST_F(Indexed, OutsideOfADocument) {
  const IndexedDataset set(write(Content{}));
  EXPECT_TRUE(contains(value_error([&] { set.tokens(0, 0, 4); }), "ids [0, 4) of document 0"));
  EXPECT_TRUE(contains(value_error([&] { set.tokens(0, -1, 2); }), "ids [-1, 2)"));
  EXPECT_TRUE(contains(value_error([&] { set.tokens(0, 2, 1); }), "ids [2, 1)"));
  EXPECT_TRUE(contains(value_error([&] { set.length(3); }), "document 3 of 3"));
  EXPECT_TRUE(contains(value_error([&] { set.length(-1); }), "document -1 of 3"));
}

TEST_F(Indexed, FilesAtFaultAreNamed) {
  const Content good;
  const auto index = good.index();
  const auto ids = good.ids();
  EXPECT_EQ(refusal(index, ids), "nothing thrown");
  for (size_t size = 0; size < index.size(); ++size) {
    EXPECT_TRUE(contains(refusal(index.substr(0, size), ids), "text.idx")) << size;
  }
  for (size_t size = 0; size < ids.size(); ++size) {
    EXPECT_TRUE(contains(refusal(index, ids.substr(0, size)), "isn't inside ")) << size;
  }
  EXPECT_TRUE(contains(refusal(index + "1", ids), "bytes behind its header"));
  EXPECT_TRUE(contains(refusal(index, ids + "12"), "they don't belong together"));
  EXPECT_TRUE(contains(refusal(ids, index), "text.idx isn't an index of Megatron's"));

  const auto changed = [&](size_t at, int64_t value, int count) {
    auto bytes = index;
    return refusal(bytes.replace(at, static_cast<size_t>(count), bytes_of(value, count)), ids);
  };
  EXPECT_TRUE(contains(changed(0, 'X', 1), "isn't an index"));
  EXPECT_TRUE(contains(changed(9, 2, 8), "has version 2"));
  for (const int code : {0, 6, 7, 9, 255}) EXPECT_TRUE(contains(changed(17, code, 1), "ids of type"));
  EXPECT_TRUE(contains(changed(17, 5, 1), "isn't inside "));  // eight bytes an id
  EXPECT_TRUE(contains(changed(17, 1, 1), "don't belong together"));
  for (const int64_t count :
       {int64_t{0}, int64_t{3}, int64_t{5}, int64_t{-1}, INT64_MIN, INT64_MAX, int64_t{1} << 61}) {
    EXPECT_TRUE(contains(changed(18, count, 8), "bytes behind its header")) << count;
    EXPECT_TRUE(contains(changed(26, count, 8), "bytes behind its header")) << count;
  }
  const size_t lengths = 34;
  const size_t pointers = lengths + 4 * 4;
  const size_t documents = pointers + 4 * 8;
  EXPECT_TRUE(contains(changed(lengths, -1, 4), "sequence 0, -1 ids"));
  EXPECT_TRUE(contains(changed(lengths, INT32_MAX, 4), "sequence 0, 2147483647 ids"));
  EXPECT_TRUE(contains(changed(pointers + 8, -2, 8), "sequence 1, 0 ids from byte -2"));
  EXPECT_TRUE(contains(changed(pointers, INT64_MAX, 8), "from byte 9223372036854775807"));
  EXPECT_TRUE(contains(changed(documents + 8, 5, 8), "document index 1 is 5"));
  EXPECT_TRUE(contains(changed(documents + 16, 1, 8), "document index 2 is 1, not in [2, 4]"));
  EXPECT_TRUE(contains(changed(documents, -1, 8), "document index 0 is -1"));
  EXPECT_TRUE(contains(value_error([&] { IndexedDataset(folder_.path() / "none"); }), "none.idx isn't a file"));
}

}  // namespace
}  // namespace megatron_cpp
