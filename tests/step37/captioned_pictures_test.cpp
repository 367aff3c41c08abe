// The caption in a text, the captioned pictures of a folder, and which of them are held out.
#include "step37/data/captioned_pictures.h"

#include <gtest/gtest.h>

#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "step37/data/utf8.h"
#include "tests/support/errors.h"
#include "tests/support/temporary_folder.h"

namespace step37 {
namespace {

using test_support::contains;
using test_support::TemporaryFolder;
using test_support::value_error;

TEST(Captions, FirstLineThatIsNotBlank) {
  EXPECT_EQ(caption_from_text("A duck."), "A duck.");
  EXPECT_EQ(caption_from_text("A duck.\nfr.utf8=Un canard.\n"), "A duck.");
  EXPECT_EQ(caption_from_text("\xEF\xBB\xBF  A duck. \t\r\nmore\r\n"), "A duck.");
  EXPECT_EQ(caption_from_text("\r\n \t \n\n\xC3\x89t\xC3\xA9  2 \n"), "\xC3\x89t\xC3\xA9  2");
  EXPECT_EQ(caption_from_text(""), "");
  EXPECT_EQ(caption_from_text("\xEF\xBB\xBF"), "");
  EXPECT_EQ(caption_from_text(" \r\n\n\t"), "");
  EXPECT_EQ(caption_from_text("\xC9t\xE9 \n"), "\uFFFDt\uFFFD") << "Latin-1 isn't UTF-8";
}

TEST(Utf8, WellFormedAndNot) {
  using namespace std::string_view_literals;
  for (const auto text : {""sv, "a\0b"sv, "\xC2\x80"sv, "\xDF\xBF"sv, "\xE0\xA0\x80"sv, "\xED\x9F\xBF"sv,
                          "\xEE\x80\x80"sv, "\xEF\xBF\xBF"sv, "\xF0\x90\x80\x80"sv, "\xF4\x8F\xBF\xBF"sv}) {
    EXPECT_TRUE(is_utf8(text)) << text;
    EXPECT_EQ(to_utf8(text), text);
  }
  // Alone, cut, overlong, surrogates, beyond U+10FFFF.
  for (const auto text :
       {"\x80"sv, "\xC2"sv, "\xC0\x80"sv, "\xC1\xBF"sv, "\xE0\x9F\xBF"sv, "\xE1\x80"sv, "\xED\xA0\x80"sv,
        "\xF0\x8F\xBF\xBF"sv, "\xF4\x90\x80\x80"sv, "\xF5\x80\x80\x80"sv, "\xFF"sv}) {
    EXPECT_FALSE(is_utf8(text)) << text;
    std::string replaced;
    for (size_t i = 0; i < text.size(); ++i) replaced += "\uFFFD";
    EXPECT_EQ(to_utf8(std::string("a").append(text).append("b")), std::string("a").append(replaced).append("b"));
  }
}

TEST(CaptionedPictures, SortedByBytesAndCounted) {
  const TemporaryFolder folder;
  for (const auto* name : {"b.png", "a/z.PNG", "B.jpg", "a.jpeg", "a/b/c.png", "none.png", "empty.png", "note.gif"}) {
    folder.write(name, "not opened by the scan");
  }
  for (const auto* name : {"b.txt", "a/z.txt", "B.txt", "a.txt", "a/b/c.txt", "note.txt"}) {
    folder.write(name, std::string("Caption of ") + name + "\r\nrest");
  }
  folder.write("empty.txt", "\xEF\xBB\xBF\r\n  \n");

  const auto found = scan_captioned_pictures(folder.path());
  std::vector<std::string> paths;
  for (const auto& picture : found.pictures) paths.push_back(picture.path);
  EXPECT_EQ(paths, (std::vector<std::string>{"B.jpg", "a.jpeg", "a/b/c.png", "a/z.PNG", "b.png"}));
  EXPECT_EQ(found.pictures.at(2).caption, "Caption of a/b/c.txt");
  EXPECT_EQ(found.num_without_caption_file, 1);
  EXPECT_EQ(found.num_with_empty_caption, 1);
  EXPECT_EQ(found.folder, folder.path());
}

TEST(CaptionedPictures, FolderAtFaultIsNamed) {
  const TemporaryFolder folder;
  const auto missing = folder.path() / "missing";
  EXPECT_TRUE(contains(value_error([&] { scan_captioned_pictures(missing); }), missing.string()));

  const auto file = folder.write("file", "x");
  EXPECT_TRUE(contains(value_error([&] { scan_captioned_pictures(file); }), file.string()));

  folder.write("lonely/one.png", "x");
  const auto message = value_error([&] { scan_captioned_pictures(folder.path() / "lonely"); });
  EXPECT_TRUE(contains(message, (folder.path() / "lonely").string()));
  EXPECT_TRUE(contains(message, "of 1 pictures"));
}

TEST(HeldOut, DependsOnThePathAlone) {
  std::vector<CaptionedPicture> pictures;
  pictures.reserve(2000);
  for (int i = 0; i < 2000; ++i) pictures.push_back({"animals/picture" + std::to_string(i) + ".png", "x"});
  const auto split = split_held_out(pictures);
  EXPECT_EQ(split.training.size() + split.held_out.size(), pictures.size());
  // 100 expected, standard deviation 10.
  EXPECT_GT(split.held_out.size(), 60U);
  EXPECT_LT(split.held_out.size(), 140U);

  std::set<std::string> held_out;
  for (const auto& picture : split.held_out) held_out.insert(picture.path);
  pictures.erase(pictures.begin(), pictures.begin() + 700);
  for (const auto& picture : split_held_out(pictures).held_out) EXPECT_TRUE(held_out.count(picture.path));
  for (const auto& picture : split_held_out(pictures).training) EXPECT_FALSE(held_out.count(picture.path));
}

TEST(HeldOut, IsTheSameOnEveryMachineAndGrowsWithTheFraction) {
  // From a second implementation, in Python: a change of the hash would move pictures between the sets of runs that
  // already exist.
  std::vector<int> held_out;
  for (int i = 0; i < 400; ++i) {
    const auto path = std::to_string(i) + ".png";
    if (is_held_out(path, 0.05)) held_out.push_back(i);
    EXPECT_FALSE(is_held_out(path, 0.0));
    EXPECT_TRUE(is_held_out(path, 1.0));
    EXPECT_TRUE(!is_held_out(path, 0.05) || is_held_out(path, 0.1));
  }
  EXPECT_EQ(held_out, (std::vector<int>{109, 110, 191, 199, 232, 283, 323, 339, 342}));
  EXPECT_TRUE(contains(value_error([] { is_held_out("a", 1.5); }), "1.5"));
  EXPECT_TRUE(contains(value_error([] { is_held_out("a", -0.1); }), "-0.1"));
}

}  // namespace
}  // namespace step37
