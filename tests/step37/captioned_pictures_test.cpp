// The caption in a text, the captioned pictures of a folder, and which of them are held out.
#include "step37/data/captioned_pictures.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "step37/data/utf8.h"
#include "tests/support/errors.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp::step37 {
namespace {

namespace fs = std::filesystem;
using namespace test_support;

/// The caption, or its fault in brackets.
std::string caption_of(std::string_view text) {
  const auto [caption, fault] = caption_from_text(text);
  switch (fault) {
    case Caption::Fault::kNone:
      return caption;
    case Caption::Fault::kEmpty:
      return "(empty)";
    case Caption::Fault::kNotUtf8:
      return "(not UTF-8)";
    case Caption::Fault::kControlCharacter:
      return "(control)";
  }
  return "(?)";
}

TEST(Captions, FirstLineThatIsNotBlank) {
  EXPECT_EQ(caption_of("A duck."), "A duck.");
  EXPECT_EQ(caption_of("A duck.\nfr.utf8=Un canard.\n"), "A duck.");
  EXPECT_EQ(caption_of("A duck.\rfr.utf8=Un canard.\r"), "A duck.");
  EXPECT_EQ(caption_of("\xEF\xBB\xBF  A duck. \t\r\nmore\r\n"), "A duck.");
  EXPECT_EQ(caption_of("\r\n \t \n\n\xC3\x89t\xC3\xA9  2 \n"), "\xC3\x89t\xC3\xA9  2");
  EXPECT_EQ(caption_of("a\tduck"), "a\tduck");
  EXPECT_EQ(caption_of(""), "(empty)");
  EXPECT_EQ(caption_of("\xEF\xBB\xBF"), "(empty)");
  EXPECT_EQ(caption_of(" \r\n\n\t"), "(empty)");
}

TEST(Captions, OtherEncodings) {
  using namespace std::string_view_literals;
  EXPECT_EQ(caption_of("\xff\xfe"
                       "a\0 \0\x0a\x4e\n\0b\0"sv),
            "a \xE4\xB8\x8A");
  EXPECT_EQ(caption_of("\xfe\xff\0a\xd8\x3e\xdd\x86"sv), "a\U0001F986");
  EXPECT_EQ(caption_of("\xff\xfe\0\0a\0\0\0\x86\xf9\1\0"sv), "a\U0001F986");
  EXPECT_EQ(caption_of("\0\0\xfe\xff\0\0\0a"sv), "a");
  EXPECT_EQ(caption_of("\xff\xfe"
                       "a\0b"sv),
            "a\uFFFD")
      << "cut";
  EXPECT_EQ(caption_of("\xff\xfe\x3e\xd8"
                       "a\0"sv),
            "\uFFFDa")
      << "half a pair";
  EXPECT_EQ(caption_of("a\0 \0d\0"sv), "(control)") << "UTF-16 without its mark";
  EXPECT_EQ(caption_of("\xC9t\xE9 \n"), "(not UTF-8)") << "Latin-1";
  EXPECT_EQ(caption_of("\xEF\xBB\xBF\xC9t\xE9"), "(not UTF-8)");
  EXPECT_EQ(caption_of("\0\0\0\n"sv), "(control)");
  EXPECT_EQ(caption_of("\x1b[31mred"), "(control)");
  EXPECT_EQ(caption_of("a\u0085b"), "(control)");
}

TEST(Utf8, PrintableNames) {
  using namespace std::string_view_literals;
  EXPECT_EQ(printable("Ente \xF0\x9F\xA6\x86.png"), "Ente \xF0\x9F\xA6\x86.png");
  EXPECT_EQ(printable("\xE9.png"), "\\xe9.png");
  EXPECT_EQ(printable("a\n\x1b[2J\0\x7f"sv), "a\\x0a\\x1b[2J\\x00\\x7f");
  EXPECT_EQ(printable("a\u202Egnp"), "a\\xe2\\x80\\xaegnp");
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

/// A picture of one pixel.
constexpr std::string_view kGif("GIF89a\1\0\1\0\x80\0\0\xff\xff\xff\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0;", 35);

std::vector<std::string> paths_of(const CaptionedPictures& found) {
  std::vector<std::string> paths;
  for (const auto& picture : found.pictures) paths.push_back(picture.path);
  return paths;
}
std::vector<std::string> paths_in(const fs::path& folder) { return paths_of(scan_captioned_pictures(folder)); }
using Paths = std::vector<std::string>;

void write_pair(const TemporaryFolder& folder, const std::string& picture, const std::string& caption) {
  folder.write(picture, kGif);
  folder.write(caption, "Caption of " + printable(caption) + "\r\nrest");
}

TEST(CaptionedPictures, SortedByBytesAndCounted) {
  const TemporaryFolder folder;
  for (const auto* name : {"b.png", "a/z.PNG", "B.jpg", "a.jpeg", "a/b/c.png", "none.png", "empty.png", "note.xcf"}) {
    folder.write(name, kGif);
  }
  for (const auto* name : {"b.txt", "a/z.txt", "B.txt", "a.txt", "a/b/c.txt"}) {
    folder.write(name, std::string("Caption of ") + name + "\r\nrest");
  }
  folder.write("empty.txt", "\xEF\xBB\xBF\r\n  \n");

  const auto found = scan_captioned_pictures(folder.path());
  EXPECT_EQ(paths_of(found), (Paths{"B.jpg", "a.jpeg", "a/b/c.png", "a/z.PNG", "b.png"}));
  EXPECT_EQ(found.pictures.at(2).caption, "Caption of a/b/c.txt");
  EXPECT_EQ(found.pictures.at(2).width, 1);
  EXPECT_EQ(found.pictures.at(2).bytes, 35);
  EXPECT_EQ(found.left_out.without_caption_file.count, 1);
  EXPECT_EQ(found.left_out.empty_captions.count, 1);
  EXPECT_EQ(found.folder, folder.path());
}

TEST(CaptionedPictures, ExtensionsInAnyCaseAndOtherNamesByContent) {
  const TemporaryFolder folder;
  write_pair(folder, "A.PNG", "A.TXT");
  write_pair(folder, "b.Jpe", "b.Txt");
  write_pair(folder, "c.webp", "c.txt");
  folder.write("c.TXT", "not this one");
  write_pair(folder, "d.image", "d.txt");  // by its first bytes
  write_pair(folder, "e", "e.txt");
  write_pair(folder, "f.tiff", "f.txt");
  folder.write("f.json", "{}");  // f has its picture
  folder.write("g.heic", "\x01\x02");
  folder.write("g.txt", "a goose");
  const auto found = scan_captioned_pictures(folder.path());
  EXPECT_EQ(paths_of(found), (Paths{"A.PNG", "b.Jpe", "c.webp", "d.image", "e", "f.tiff"}));
  EXPECT_EQ(found.pictures.at(2).caption, "Caption of c.txt");
  EXPECT_EQ(found.left_out.other_files.count, 1);
  EXPECT_EQ(found.left_out.other_files.first, (folder.path() / "g.heic").string());
}

TEST(CaptionedPictures, HiddenAndSystemFoldersAreLeftOut) {
  const TemporaryFolder folder;
  for (const std::string below : {".Trash-1000/files", "@eaDir", "__MACOSX/a", "lost+found", "$RECYCLE.BIN/x", ".git",
                                  "System Volume Information", "a/#recycle"}) {
    write_pair(folder, ".hidden/p/" + below + "/old.png", ".hidden/p/" + below + "/old.txt");
  }
  write_pair(folder, ".hidden/p/a.png", ".hidden/p/a.txt");
  write_pair(folder, ".hidden/p/._a.png", ".hidden/p/._a.txt");
  const auto found = scan_captioned_pictures(folder.path() / ".hidden/p");
  EXPECT_EQ(paths_of(found), Paths{"a.png"});
  EXPECT_EQ(found.left_out.hidden.count, 9);
}

TEST(CaptionedPictures, LinkedFoldersAreFollowedOnce) {
  const TemporaryFolder folder;
  write_pair(folder, "p/a.png", "p/a.txt");
  write_pair(folder, "p/sub/b.png", "p/sub/b.txt");
  write_pair(folder, "far/c.png", "far/c.txt");
  write_pair(folder, "outside.png", "outside.txt");
  fs::create_directory_symlink("../far", folder.path() / "p/far");
  fs::create_directory_symlink("../far", folder.path() / "p/once_more");
  fs::create_directory_symlink(".", folder.path() / "p/self");
  fs::create_directory_symlink("sub", folder.path() / "p/another_sub");
  fs::create_directory_symlink("..", folder.path() / "p/up");
  fs::create_directory_symlink("../p", folder.path() / "far/back");
  fs::create_directory_symlink("nowhere", folder.path() / "p/broken");
  fs::create_symlink("a.png", folder.path() / "p/linked.png");
  fs::create_symlink("a.txt", folder.path() / "p/linked.txt");
  EXPECT_EQ(paths_in(folder.path() / "p"), (Paths{"a.png", "far/c.png", "linked.png", "sub/b.png"}));
  // Through a link to it, too.
  EXPECT_EQ(paths_in(folder.path() / "p/far/back").size(), 4U);
}

TEST(CaptionedPictures, WhatCantBeReadIsNamed) {
  const TemporaryFolder folder;
  write_pair(folder, "a.png", "a.txt");
  folder.write("heif.jpg", std::string("\0\0\0\x18"
                                       "ftypheic",
                                       12));
  folder.write("heif.txt", "a horse");
  fs::create_symlink("nowhere", folder.path() / "link.png");
  folder.write("link.txt", "a link");
  folder.write("latin.png", kGif);
  folder.write("latin.txt", "\xC9t\xE9");
  folder.write("nul.png", kGif);
  folder.write("nul.txt", std::string_view("\0\n", 2));
  folder.write("gone.png", kGif);
  fs::create_symlink("nowhere", folder.path() / "gone.txt");
  const auto found = scan_captioned_pictures(folder.path());
  EXPECT_EQ(paths_of(found), Paths{"a.png"});
  const auto name = [&](const std::string& file) { return "(first: " + (folder.path() / file).string(); };
  EXPECT_EQ(sentences(found),
            (std::vector<std::string>{
                "2 of 3 pictures can't be read " + name("heif.jpg") + ": it is HEIF, which isn't read)",
                "1 picture whose caption can't be read " + name("gone.txt") + ": No such file or directory)",
                "1 picture whose caption is neither UTF-8 nor marked as UTF-16 or UTF-32 " + name("latin.txt") + ")",
                "1 picture whose caption has control characters " + name("nul.txt") + ")"}));
}

TEST(CaptionedPictures, NamesOfAnyBytesArePrintable) {
  const TemporaryFolder folder;
  write_pair(folder, "\xE9\n.png", "\xE9\n.txt");
  folder.write("\xE8\x1b.png", kGif);
  const auto found = scan_captioned_pictures(folder.path());
  EXPECT_EQ(paths_of(found), Paths{"\xE9\n.png"});
  EXPECT_EQ(found.left_out.without_caption_file.first, (folder.path() / "\\xe8\\x1b.png").string());
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
  EXPECT_TRUE(contains(message, "1 picture without a .txt beside them (first: "));

  folder.write("broken/one.png", "x");
  folder.write("broken/one.txt", "x");
  EXPECT_TRUE(contains(value_error([&] { scan_captioned_pictures(folder.path() / "broken"); }),
                       "1 of 1 pictures can't be read (first: "));
}

/// `index` as if its folders had been searched long ago: those that were changed a moment before aren't trusted.
PictureIndex settled(PictureIndex index, const fs::path& folder) {
  for (auto& part : index.folders) {
    struct stat status {};
    EXPECT_EQ(stat((folder / part.path).c_str(), &status), 0);
    part.changed = int64_t{status.st_ctim.tv_sec} * 1'000'000'000 + status.st_ctim.tv_nsec;
  }
  return index;
}

TEST(PictureIndex, ComesBackFromItsBytes) {
  const TemporaryFolder folder;
  write_pair(folder, "a.png", "a.txt");
  write_pair(folder, "sub/\xE9.png", "sub/\xE9.txt");
  folder.write("none.png", kGif);
  const auto bytes = to_bytes(scan_folder(folder.path()));
  const auto index = index_from_bytes(bytes);
  ASSERT_TRUE(index.has_value());
  EXPECT_EQ(to_bytes(*index), bytes);
  EXPECT_EQ(paths_of(pictures_of(*index, folder.path())), (Paths{"a.png", "sub/\xE9.png"}));
  for (size_t size = 0; size < bytes.size(); size += 7) EXPECT_FALSE(index_from_bytes(bytes.substr(0, size)));
  for (size_t at = 0; at < bytes.size(); at += 3) {
    auto broken = bytes;
    broken[at] = static_cast<char>(broken[at] ^ 1);
    EXPECT_FALSE(index_from_bytes(broken)) << at;
  }
  EXPECT_FALSE(index_from_bytes(bytes + "x"));
}

TEST(PictureIndex, FoldersThatHaveNotChangedAreNotReadAgain) {
  const TemporaryFolder folder;
  write_pair(folder, "a.png", "a.txt");
  write_pair(folder, "sub/b.png", "sub/b.txt");
  auto index = settled(scan_folder(folder.path()), folder.path());
  // What only the index says shows where it is believed: the folder's time is the same, the caption file isn't looked
  // at.
  for (auto& part : index.folders) part.pictures.at(0).caption = "from the index";
  const auto captions = [&] {
    std::vector<std::string> list;
    for (auto& picture : pictures_of(scan_folder(folder.path(), index), folder.path()).pictures) {
      list.push_back(picture.caption);
    }
    return list;
  };
  EXPECT_EQ(captions(), (Paths{"from the index", "from the index"}));
  // A new file changes the folder; the others in it are looked at, but not read.
  write_pair(folder, "sub/c.png", "sub/c.txt");
  EXPECT_EQ(captions(), (Paths{"from the index", "from the index", "Caption of sub/c.txt"}));
  folder.write("sub/b.txt", "another caption");
  EXPECT_EQ(captions(), (Paths{"from the index", "another caption", "Caption of sub/c.txt"}));
  index.folder = "/elsewhere";
  EXPECT_EQ(captions(), (Paths{"Caption of a.txt", "another caption", "Caption of sub/c.txt"}));
}

TEST(PictureIndex, FoldersWithFaultyFilesAreLookedAtAgain) {
  const TemporaryFolder folder;
  write_pair(folder, "a.png", "a.txt");
  folder.write("b.png", kGif);
  folder.write("b.txt", "");
  const auto index = settled(scan_folder(folder.path()), folder.path());
  EXPECT_EQ(pictures_of(index, folder.path()).left_out.empty_captions.count, 1);
  folder.write("b.txt", "mended in place, so that the folder's time stays");
  EXPECT_EQ(paths_of(pictures_of(scan_folder(folder.path(), index), folder.path())), (Paths{"a.png", "b.png"}));
}

TEST(PictureIndex, AFolderChangedAMomentAgoIsNotTrusted) {
  const TemporaryFolder folder;
  write_pair(folder, "a.png", "a.txt");
  EXPECT_EQ(scan_folder(folder.path()).folders.at(0).changed, 0);
}

TEST(HeldOut, DependsOnThePathAlone) {
  std::vector<CaptionedPicture> pictures;
  pictures.reserve(2000);
  for (int i = 0; i < 2000; ++i) pictures.push_back({"animals/picture" + std::to_string(i) + ".png", "x", 1, 1, 1, 1});
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
}  // namespace megatron_cpp::step37
