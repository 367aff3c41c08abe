// Flickr8k's layout: metadata.csv and pictures.
#include "step37/data/flickr8k_data_set.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <vector>

#include "tests/step37/data_set_fixture.h"
#include "tests/step37/small_pictures.h"
#include "tests/support/errors.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp::step37 {
namespace {

namespace fs = std::filesystem;
using namespace test_support;
using namespace data_set_fixture;

TEST(Csv, QuotesAndLineEnds) {
  using Records = std::vector<std::vector<std::string>>;
  EXPECT_EQ(csv_records(""), Records{});
  EXPECT_EQ(csv_records("a,b\r\n1,2\n\n3,"), (Records{{"a", "b"}, {"1", "2"}, {"3", ""}}));
  EXPECT_EQ(csv_records("\"a,\"\"b\"\"\n\",c\n,\n"), (Records{{"a,\"b\"\n", "c"}, {"", ""}}));
  EXPECT_EQ(csv_records("a\"b, \"c\"\rd"), (Records{{"a\"b", " \"c\""}, {"d"}}));
  EXPECT_EQ(csv_records("\"\"\n\"\",1"), (Records{{"", "1"}}));
  EXPECT_TRUE(contains(value_error([] { csv_records("a\n\"b\n\nc"); }), "line 2: quotes aren't closed"));
  EXPECT_TRUE(contains(value_error([] { csv_records("\"a\nb\"c"); }), "line 2: text follows closed quotes"));
}

TEST(Flickr8kDataSet, AsTheReferenceReadsIt) {
  const TemporaryFolder folder;
  small_run::write_picture(folder.path() / "a.jpg", 60, 30, 1);
  const auto file = folder.write("metadata.csv",
                                 "\xEF\xBB\xBF"
                                 "file_name,caption_0,caption_1\n"
                                 "a.jpg, A duck. ,\"A bus, \"\"the\"\" bus.\"\n"
                                 "b.jpg,,\"Two\nlines\"\n"
                                 " ,A,B\n"
                                 "c.jpg,A bus.\n"
                                 "d.jpg,\xff,\xff\n"
                                 "e.jpg,<image>,An <im_start>\n");
  const Flickr8kDataSet set(folder.path(), {});
  ASSERT_EQ(set.num_samples(), 1);
  EXPECT_EQ(set.name(0), file.string() + " row 1");
  EXPECT_EQ(set.left_out(), std::vector<std::string>{"5 of 6 rows are left out (first: " + file.string() +
                                                     " row 2: it has no caption)"});
  for (const bool with_crops : {false, true}) {
    const auto format = small_format(with_crops);
    const auto sample = sample_of(set, 0, format);
    const auto lines = folder.write(
        "chats.jsonl",
        R"({"conversations": [{"role": "user", "content": "<image>\nDescribe this image in one sentence."}, {"role": "assistant", "content": "A duck."}], "images": ["a.jpg"]})");
    const auto wanted = ConversationDataSet(lines, {}).sample(0, format);
    EXPECT_EQ(sample.tokens, wanted.tokens);
    EXPECT_EQ(sample.loss_mask, wanted.loss_mask);
    ASSERT_EQ(sample.pictures.size(), 1U);
    EXPECT_EQ(sample.pictures[0].path, folder.path() / "a.jpg");
    EXPECT_EQ(sample.pictures[0].width, 60);
  }
  const Flickr8kDataSet other(folder.path(), {.chat_template = ChatTemplate::named("plain"), .picture_folder = "/p"},
                              "caption_1", "What?");
  ASSERT_EQ(other.num_samples(), 3);
  EXPECT_EQ(other.texts(0), (std::vector<std::string>{"\nWhat?\nA bus, \"the\" bus."}));
  EXPECT_EQ(other.texts(1).at(0), "\nWhat?\nTwo\nlines");
  EXPECT_EQ(other.name(2), file.string() + " row 6");
  EXPECT_EQ(other.sample(0, small_format(false)).pictures.at(0).path, "/p/a.jpg");
}

TEST(Flickr8kDataSet, FilesAtFaultAreNamed) {
  const TemporaryFolder folder;
  const auto reason = [&](const std::string& text) {
    folder.write("metadata.csv", text);
    return value_error([&] { Flickr8kDataSet(folder.path(), {}); });
  };
  const auto file = (folder.path() / "metadata.csv").string();
  EXPECT_TRUE(contains(value_error([&] { Flickr8kDataSet(folder.path(), {}); }), file + " isn't a file"));
  EXPECT_TRUE(contains(reason(""), file + " is empty"));
  EXPECT_TRUE(contains(reason("name,caption_0\n"), file + " has no column file_name"));
  EXPECT_TRUE(contains(reason("file_name,caption\n"), file + " has no column caption_0"));
  EXPECT_TRUE(contains(reason("file_name,caption_0\n"), file + " has no row that can be used"));
  EXPECT_TRUE(contains(reason("file_name,caption_0\na,\n"), "; the first: " + file + " row 1: it has no caption"));
  EXPECT_TRUE(contains(reason("file_name,caption_0\n\"a"), file + ": line 2: quotes aren't closed"));
}

}  // namespace
}  // namespace megatron_cpp::step37
