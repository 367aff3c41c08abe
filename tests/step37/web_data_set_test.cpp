// Tar archives, put together here by the published layout, and the samples in them.
#include "step37/data/web_data_set.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include "step37/data/picture.h"
#include "tests/step37/data_set_fixture.h"
#include "tests/step37/small_pictures.h"
#include "tests/support/errors.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp::step37 {
namespace {

namespace fs = std::filesystem;
using namespace test_support;
using namespace data_set_fixture;

/// A block of a tar archive, by POSIX's table of fields.
std::string header(const std::string& name, int64_t bytes, char type, bool is_posix = true) {
  std::string block(512, '\0');
  const auto put = [&](size_t at, const std::string& text) { block.replace(at, text.size(), text); };
  const auto octal = [](int64_t value, int digits) {
    std::string text;
    for (int i = 0; i < digits; ++i, value /= 8) text.insert(text.begin(), static_cast<char>('0' + value % 8));
    return text;
  };
  const auto slash = name.size() > 100 ? name.rfind('/', 155) : std::string::npos;
  put(0, slash == std::string::npos ? name.substr(0, 100) : name.substr(slash + 1));
  put(100, "0000644");
  put(124, octal(bytes, 11));
  put(156, std::string(1, type));
  put(257, is_posix ? std::string("ustar\00000", 8) : std::string("ustar  \0", 8));
  if (slash != std::string::npos) put(345, name.substr(0, slash));
  put(148, std::string(8, ' '));
  int64_t sum = 0;
  for (const char c : block) sum += static_cast<unsigned char>(c);
  put(148, octal(sum, 6) + std::string("\0 ", 2));
  return block;
}

std::string padded(std::string bytes) {
  bytes.resize((bytes.size() + 511) / 512 * 512);
  return bytes;
}

std::string member(const std::string& name, const std::string& bytes, char type = '0') {
  return header(name, static_cast<int64_t>(bytes.size()), type) + padded(bytes);
}

const std::string kEnd(1024, '\0');

TEST(Tar, NamesAndPlaces) {
  const TemporaryFolder folder;
  const std::string long_name = "folder/" + std::string(120, 'n') + ".txt";
  const std::string deep_name = std::string(90, 'd') + "/" + std::string(60, 'e') + ".txt";
  const std::string record = "path=" + long_name + "\n";
  const std::string pax = fmt::to_string(record.size() + 4) + " " + record + "12 size=700\n";
  ASSERT_EQ(fmt::to_string(record.size() + 4).size(), 3U);
  const std::string large(700, 'x');
  const auto file = folder.write(
      "a.tar", member("pax_global", "22 comment=of an author\n", 'g') + member("folder/", "", '5') +
                   member("a.txt", "one") + header("link", 9, '2') + member("././@LongLink", long_name + '\0', 'L') +
                   header("cut", 3, '0', false) + padded("two") + member(deep_name, "three") + member("x", pax, 'x') +
                   header("short", 0, '0') + padded(large) + member("b.txt", "", '7') + kEnd + "behind the end");
  const auto [members, damage] = list_tar(file);
  EXPECT_EQ(damage, "");
  const auto bytes = read_file(file);
  std::vector<std::pair<std::string, std::string>> found;
  for (const auto& [name, offset, size] : members) {
    found.emplace_back(name, bytes.substr(static_cast<size_t>(offset), static_cast<size_t>(size)));
  }
  EXPECT_EQ(found, (std::vector<std::pair<std::string, std::string>>{
                       {"a.txt", "one"}, {long_name, "two"}, {deep_name, "three"}, {long_name, large}, {"b.txt", ""}}));

  // A size in bytes instead of octal digits, and an archive that ends with its last member.
  auto binary = header("b", 0, '0');
  binary.replace(124, 12, std::string("\x80\0\0\0\0\0\0\0\0\0\2\xbc", 12));
  int64_t sum = 0;
  for (size_t i = 0; i < binary.size(); ++i) sum += i >= 148 && i < 156 ? ' ' : static_cast<unsigned char>(binary[i]);
  char digits[8];
  std::snprintf(digits, sizeof(digits), "%06o", static_cast<unsigned>(sum));
  binary.replace(148, 7, std::string(digits, 7));
  const auto without_end = list_tar(folder.write("b.tar", binary + large));
  EXPECT_EQ(without_end.damage, "it has no end mark, so it may be cut");
  ASSERT_EQ(without_end.members.size(), 1U);
  EXPECT_EQ(without_end.members[0].bytes, 700);
}

TEST(Tar, CutAndBrokenArchives) {
  const TemporaryFolder folder;
  const auto whole = member("a.txt", std::string(600, 'a')) + member("b.txt", "b");
  const std::string no_end = "it has no end mark, so it may be cut";
  for (const auto& [size, damage] : std::vector<std::pair<size_t, std::string>>{{1400, no_end},
                                                                                {1536, no_end},
                                                                                {1537, "it ends inside of a header"},
                                                                                {2047, "it ends inside of a header"},
                                                                                {2048, "it ends inside of b.txt"},
                                                                                {2049, no_end}}) {
    const auto listing = list_tar(folder.write("a.tar", whole.substr(0, size)));
    EXPECT_EQ(listing.damage, damage) << size;
    EXPECT_EQ(listing.members.size(), size > 2048 ? 2U : 1U) << size;
  }
  auto broken = whole;
  broken[1536] = 'c';
  EXPECT_EQ(list_tar(folder.write("a.tar", broken)).damage, "there is no header at byte 1536");
  const auto first = member("a.txt", "a");
  for (const auto& [next, damage] : std::vector<std::pair<std::string, std::string>>{
           {member("s", "", 'S'), "s is stored with holes, which isn't read"},
           {member("x", "no record", 'x'), "the header at byte 1024 is wrong"},
           {member("x", "12 size=-12\n", 'x'), "the header at byte 1024 is wrong"},
           {member("x", std::string("11 path=a\0\n", 11), 'x'), "the header at byte 1024 is wrong"},
           {member("x", std::string(70000, ' '), 'x'), "there is a name of 70000 bytes"}}) {
    const auto listing = list_tar(folder.write("a.tar", first + next + kEnd));
    EXPECT_EQ(listing.damage, damage);
    EXPECT_EQ(listing.members.size(), 1U);
  }
  const auto reason = [&](const std::string& bytes) {
    return value_error([&] { list_tar(folder.write("bad.tar", bytes)); });
  };
  EXPECT_TRUE(contains(reason(""), "bad.tar is empty"));
  EXPECT_TRUE(contains(reason("text"), "bad.tar isn't a tar archive: it ends inside of a header"));
  EXPECT_TRUE(contains(reason(std::string(600, 'x')), "bad.tar isn't a tar archive: there is no header at byte 0"));
  EXPECT_TRUE(contains(reason("\x1f\x8b" + whole), "bad.tar is compressed by gzip"));
  EXPECT_TRUE(contains(reason("\x28\xb5\x2f\xfd" + whole), "bad.tar is compressed by zstd"));
  EXPECT_TRUE(contains(value_error([&] { list_tar(folder.path()); }), "isn't a file"));
  EXPECT_TRUE(contains(value_error([&] { list_tar(folder.path() / "none.tar"); }), "none.tar isn't a file"));
}

TEST(Tar, Shards) {
  using Paths = std::vector<fs::path>;
  EXPECT_EQ(shards_of("a.tar"), Paths{"a.tar"});
  EXPECT_EQ(shards_of("s-{008..011}.tar"), (Paths{"s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar"}));
  EXPECT_EQ(shards_of("{1..2}/{9..10}.tar"), (Paths{"1/9.tar", "2/9.tar", "1/10.tar", "2/10.tar"}));
  for (const std::string bad :
       {"{}", "{1}", "{1..}", "{a..b}", "{2..1}", "{1..2", "{0..1000000}", "{-1..2}", "{1..2x}"}) {
    EXPECT_TRUE(contains(value_error([&] { shards_of(bad); }), "shards " + bad));
  }
  const TemporaryFolder folder;
  EXPECT_TRUE(contains(value_error([&] { shards_of(folder.path()); }), "has no file *.tar"));
  for (const auto* name : {"b.tar", "B.tar", "a.tar", "index.txt"}) folder.write(name, "");
  EXPECT_EQ(shards_of(folder.path()),
            (Paths{folder.path() / "B.tar", folder.path() / "a.tar", folder.path() / "b.tar"}));
  folder.write("c.tar.gz", "");
  EXPECT_TRUE(contains(value_error([&] { shards_of(folder.path()); }), "c.tar.gz is compressed"));
}

TEST(WebDataSet, CaptionsAndConversations) {
  const TemporaryFolder folder;
  small_run::write_picture(folder.path() / "wide.png", 60, 30, 1);
  small_run::write_picture(folder.path() / "small.png", 20, 20, 2);
  const auto wide = read_file(folder.path() / "wide.png");
  const auto small = read_file(folder.path() / "small.png");
  const std::string chat =
      R"({"messages": [{"role": "user", "content": "<image><image>What is this?"}, {"role": "assistant", "content": "A duck."}])";
  const auto second =
      member("x/3.left.png", small) + member("x/3.right.png", wide) +
      member("x/3.json", chat + R"(, "images": ["3.right.png", "3.left.png"]})") + member("4.jpg", wide) +
      member("4.json", R"({"caption": "A bus."})") +
      member("5.json", R"({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})");
  const auto first = folder.write(
      "shards/0.tar", member("readme", "not a sample") + member("1.PNG", wide) + member("1.txt", "A duck.\nmore") +
                          member("1.json", "not read") + member("2.a.png", wide) + member("2.b.png", small) +
                          member("2.json", chat + "}") + member("lost.png", wide) + member("words.txt", "A bus.") +
                          member("both.txt", "A bus.") + member("both.a.png", wide) + member("both.b.png", wide) +
                          member("empty.png", "") + member("empty.txt", "A") + member("blank.png", wide) +
                          member("blank.txt", " ") + member("none.png", wide) + member("none.json", "{}") +
                          member("other.png", wide) +
                          member("other.json", chat + R"(, "images": ["a.png", "other.png"]})") + kEnd);
  const auto cut = folder.write("shards/1.tar", second + member("6.png", wide).substr(0, 530));
  const WebDataSet set(folder.path() / "shards", {});
  std::vector<std::string> names;
  for (int64_t i = 0; i < set.num_samples(); ++i) names.push_back(set.name(i));
  EXPECT_EQ(names, (std::vector<std::string>{first.string() + ": 1", first.string() + ": 2", cut.string() + ": x/3",
                                             cut.string() + ": 4", cut.string() + ": 5"}));
  EXPECT_EQ(set.left_out(),
            (std::vector<std::string>{
                "7 of 12 samples are left out (first: " + first.string() + ": lost: it has neither .txt nor .json)",
                "1 of 2 archives are cut or broken, and what comes before is used (first: " + cut.string() +
                    ": it ends inside of 6.png)"}));
  for (const bool with_crops : {false, true}) {
    const auto format = small_format(with_crops);
    const auto caption = tokenizer().encode("A duck.");
    const auto captioned = sample_of(set, 0, format);
    EXPECT_EQ(captioned.tokens,
              joined({{tokenizer().bos_id()}, tokens_of(60, 30, format), caption, {tokenizer().eos_id()}}));
    EXPECT_EQ(num_in_loss(captioned), static_cast<int64_t>(caption.size()) + 1);
    EXPECT_EQ(set.texts(0), std::vector<std::string>{"A duck."});
    EXPECT_EQ(set.texts(3), std::vector<std::string>{"A bus."});

    // The order of the pictures is that of the placeholders, and their bytes are in the archive.
    for (const auto& [index, pictures] : std::vector<std::pair<int64_t, std::vector<std::string>>>{
             {0, {wide}}, {1, {wide, small}}, {2, {wide, small}}}) {
      const auto sample = sample_of(set, index, format);
      ASSERT_EQ(sample.pictures.size(), pictures.size());
      for (size_t i = 0; i < pictures.size(); ++i) {
        const auto& [path, width, height, bytes, modified, place] = sample.pictures[i];
        EXPECT_EQ(read_file(path).substr(static_cast<size_t>(place.offset), static_cast<size_t>(place.bytes)),
                  pictures[i]);
        EXPECT_EQ(width, pictures[i] == wide ? 60 : 20);
        const auto decoded = decode_picture(path, place);
        const auto alone = decode_picture(folder.path() / (pictures[i] == wide ? "wide.png" : "small.png"));
        EXPECT_TRUE(decoded.ok() && decoded.pixels.equal(alone.pixels)) << decoded.error;
      }
    }
    EXPECT_TRUE(set.sample(4, format).pictures.empty());
    // As the same conversation in a file.
    const auto lines = folder.write("chats.jsonl", chat + R"(, "images": ["wide.png", "small.png"]})");
    const auto from_lines = ConversationDataSet(lines, {}).sample(0, format);
    EXPECT_EQ(set.sample(1, format).tokens, from_lines.tokens);
    EXPECT_EQ(set.sample(1, format).loss_mask, from_lines.loss_mask);
  }
  fs::resize_file(first, 1500);
  EXPECT_TRUE(
      contains(value_error([&] { set.sample(1, small_format(false)); }), first.string() + ": 2: 2.json can't be read"));
}

TEST(WebDataSet, NothingToRead) {
  const TemporaryFolder folder;
  const auto file = folder.write("a.tar", member("a.png", "p") + kEnd);
  EXPECT_TRUE(contains(value_error([&] { WebDataSet(file, {}); }), "has no sample that can be used; the first: "));
  EXPECT_TRUE(
      contains(value_error([&] { WebDataSet((folder.path() / "{0..1}.tar").string(), {}); }), "0.tar isn't a file"));
}

TEST(Picture, InsideOfAFile) {
  const TemporaryFolder folder;
  small_run::write_picture(folder.path() / "a.png", 9, 5, 1);
  const auto bytes = read_file(folder.path() / "a.png");
  const auto size = static_cast<int64_t>(bytes.size());
  const auto file = folder.write("b", "before" + bytes + "behind");
  EXPECT_EQ(read_picture_header(file, {6, size}).size.width, 9);
  EXPECT_TRUE(decode_picture(file, {6, size}).pixels.equal(decode_picture(folder.path() / "a.png").pixels));
  EXPECT_TRUE(contains(decode_picture(file, {7, size}).error, "picture " + file.string() + ", byte 7 can't be read"));
  EXPECT_TRUE(contains(decode_picture(file, {6, size + 7}).error, "its file is cut"));
  EXPECT_TRUE(contains(read_picture_header(file, {size + 12, 0}).error, "it is empty"));
  EXPECT_TRUE(contains(read_picture_header(file, {size + 99, 1}).error, "its file is cut"));
}

}  // namespace
}  // namespace megatron_cpp::step37
