// The tokenizer, trained on a few captions: text comes back whole, no text turns into a special id, and files at fault
// are named.
#include "step37/data/tokenizer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <iterator>
#include <set>
#include <string>
#include <vector>

#include "tests/support/errors.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp::step37 {
namespace {

namespace fs = std::filesystem;
using namespace test_support;

const std::vector<std::string>& captions() {
  static const std::vector<std::string> list = {
      "A US 25 cent piece ($.25) called a quarter.",
      "A US “Sacagawea” dollar ($1.00).",
      "A yellow rubber duck.",
      "A yellow school bus.",
      "A red school house on a green hill.",
      "The letter A, painted in red.",
      "A crème brûlée - a French dessert.",
      "An orange; it’s a fruit!",
      "A penguin from the south: the king penguin.",
      "A green tree frog on a green leaf.",
      "Two  spaces, a\ttab and a trailing space ",
      " A leading space",
      "the quick brown fox jumps over the lazy dog 0123456789",
  };
  return list;
}

constexpr int64_t kVocabSize = 400;

TEST(Tokenizer, RoundTrip) {
  const auto tokenizer = Tokenizer::train(captions(), kVocabSize);
  EXPECT_LE(tokenizer.vocab_size(), kVocabSize);
  for (const auto& caption : captions()) {
    const auto ids = tokenizer.encode(caption);
    EXPECT_EQ(tokenizer.decode(ids), caption);
    EXPECT_LT(ids.size(), caption.size()) << caption;  // pairs were merged
    EXPECT_EQ(std::count(ids.begin(), ids.end(), tokenizer.unk_id()), 0) << caption;
  }
  EXPECT_TRUE(tokenizer.encode("").empty());
  EXPECT_EQ(tokenizer.decode({}), "");
}

TEST(Tokenizer, UnknownCharactersAreSpelledInBytes) {
  const auto tokenizer = Tokenizer::train(captions(), kVocabSize);
  for (const std::string text : {"日本語", "🦆 duck", "naïve Ωμέγα", "½\n²\r\n", "ﬁ ﬀ Å"}) {
    const auto ids = tokenizer.encode(text);
    EXPECT_EQ(tokenizer.decode(ids), text);
    EXPECT_EQ(std::count(ids.begin(), ids.end(), tokenizer.unk_id()), 0) << text;
  }
}

TEST(Tokenizer, SpecialIds) {
  const auto tokenizer = Tokenizer::train(captions(), kVocabSize);
  std::set<int64_t> ids = {tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()};
  EXPECT_EQ(ids, (std::set<int64_t>{0, 1, 2, 3}));
  for (const auto symbol : kPictureSymbols) ids.insert(tokenizer.id_of(symbol));
  EXPECT_EQ(ids.size(), 10U);
  EXPECT_EQ(*ids.rbegin(), 9);
  EXPECT_EQ(tokenizer.id_of("<unk>"), tokenizer.unk_id());

  // They leave no trace in text.
  auto sequence = tokenizer.encode("A duck.");
  sequence.insert(sequence.begin(), {tokenizer.bos_id(), tokenizer.id_of("<im_start>"), tokenizer.id_of("<im_patch>"),
                                     tokenizer.id_of("<im_end>")});
  sequence.insert(sequence.end(), {tokenizer.eos_id(), tokenizer.pad_id()});
  EXPECT_EQ(tokenizer.decode(sequence), "A duck.");
  EXPECT_TRUE(contains(value_error([&] { tokenizer.id_of("<video>"); }), "<video>"));
  EXPECT_TRUE(contains(value_error([&] { tokenizer.decode({tokenizer.vocab_size()}); }), "isn't in [0, "));
  EXPECT_TRUE(contains(value_error([&] { tokenizer.decode({-1}); }), "id -1"));
}

TEST(Tokenizer, TextNeverTurnsIntoASpecialId) {
  // Even captions that are full of the symbols don't teach it to.
  auto list = captions();
  for (const auto symbol : kPictureSymbols) list.insert(list.end(), 20, std::string(symbol));
  for (const auto& tokenizer : {Tokenizer::train(captions(), kVocabSize), Tokenizer::train(list, kVocabSize)}) {
    std::string all;
    std::vector<std::string> texts = {"<s>",   "</s>", "<unk>", "<pad>", "a<im_start>b", "<im_<im_start>start>",
                                      "<0x41>"};
    for (const auto symbol : kPictureSymbols) texts.emplace_back(symbol);
    for (const auto& text : texts) all += text;
    texts.push_back(all);
    for (const auto& text : texts) {
      const auto ids = tokenizer.encode(text);
      EXPECT_EQ(tokenizer.decode(ids), text);
      for (const int64_t id : ids) EXPECT_GE(id, 10) << text;
    }
  }
}

TEST(Tokenizer, TrainingTwiceGivesTheSameModel) {
  const TemporaryFolder folder;
  const auto first = Tokenizer::train(captions(), kVocabSize);
  const auto second = Tokenizer::train(captions(), kVocabSize);
  for (const auto& caption : captions()) EXPECT_EQ(first.encode(caption), second.encode(caption));
  first.save(folder.path() / "first.model");
  second.save(folder.path() / "second.model");
  EXPECT_EQ(read_file(folder.path() / "first.model"), read_file(folder.path() / "second.model"));
}

TEST(Tokenizer, SaveAndLoad) {
  const TemporaryFolder folder;
  const auto path = folder.path() / "captions.model";
  const auto trained = Tokenizer::train(captions(), kVocabSize);
  trained.save(path);
  const auto loaded = Tokenizer::load(path);
  EXPECT_EQ(loaded.vocab_size(), trained.vocab_size());
  EXPECT_EQ(loaded.pad_id(), trained.pad_id());
  EXPECT_EQ(loaded.id_of("<patch_newline>"), trained.id_of("<patch_newline>"));
  for (const auto& caption : captions()) EXPECT_EQ(loaded.encode(caption), trained.encode(caption));
  EXPECT_EQ(std::distance(fs::directory_iterator(folder.path()), {}), 1);  // no temporary file is left
}

TEST(Tokenizer, ModelFileAtFaultIsNamed) {
  const TemporaryFolder folder;
  for (const auto& path : {folder.path() / "missing.model", folder.path(), folder.write("empty.model", ""),
                           folder.write("text.model", "this is no model")}) {
    EXPECT_TRUE(contains(value_error([&] { Tokenizer::load(path); }), path.string()));
  }

  const auto good = folder.path() / "good.model";
  Tokenizer::train(captions(), kVocabSize).save(good);
  // In the file a piece is its text, 0x15 and four bytes of score, then 0x18 and its type: 3 control, 4 user-defined.
  auto bytes_of_model = read_file(good);
  const auto symbol = bytes_of_model.find("<im_start>");
  const auto type = symbol + 10 + 5 + 1;
  ASSERT_EQ(bytes_of_model.at(type), 3);

  auto user_defined = bytes_of_model;
  user_defined.at(type) = 4;
  const auto unsafe = folder.write("unsafe.model", user_defined);
  const auto message = value_error([&] { Tokenizer::load(unsafe); });
  EXPECT_TRUE(contains(message, unsafe.string()));
  EXPECT_TRUE(contains(message, "<im_start>"));

  bytes_of_model.replace(symbol, 10, "<xx_start>");
  const auto renamed = folder.write("renamed.model", bytes_of_model);
  const auto tokenizer = Tokenizer::load(renamed);
  const auto missing = value_error([&] { tokenizer.id_of("<im_start>"); });
  EXPECT_TRUE(contains(missing, "<im_start>"));
  EXPECT_TRUE(contains(missing, renamed.string()));
}

TEST(Tokenizer, WrongTrainingArguments) {
  EXPECT_TRUE(contains(value_error([] { Tokenizer::train({}, kVocabSize); }), "no captions"));
  EXPECT_TRUE(
      contains(value_error([] { Tokenizer::train(captions(), 266); }), "data.vocabulary_size 266 is too small"));
  EXPECT_TRUE(contains(value_error([] { Tokenizer::train({"", ""}, kVocabSize); }), "2 captions"));
}

TEST(Tokenizer, TheRarestCharactersAreSpelledInBytesWhereThereIsNoRoom) {
  // 2000 different characters, each once, and the space before each caption.
  std::vector<std::string> list;
  for (int caption = 0; caption < 200; ++caption) {
    std::string text;
    for (int i = 0; i < 10; ++i) {
      const int code = 0x4e00 + 10 * caption + i;
      text += {static_cast<char>(0xe0 | code >> 12), static_cast<char>(0x80 | (code >> 6 & 0x3f)),
               static_cast<char>(0x80 | (code & 0x3f))};
    }
    list.push_back(text);
  }
  const auto needed = Tokenizer::needed(list);
  EXPECT_EQ(needed.num_characters, 2000);  // 99.95 % of 2200
  EXPECT_EQ(needed.vocab_size, 2266);
  EXPECT_EQ(Tokenizer::train(list, needed.vocab_size).vocab_size(), needed.vocab_size);
  for (const int64_t size : {268, 300, 1000, 2265}) {
    const auto tokenizer = Tokenizer::train(list, size);
    EXPECT_LE(tokenizer.vocab_size(), size);
    for (const auto& caption : {list.front(), list.back(), std::string("a duck")}) {
      const auto ids = tokenizer.encode(caption);
      EXPECT_EQ(tokenizer.decode(ids), caption) << size;
      EXPECT_EQ(std::count(ids.begin(), ids.end(), tokenizer.unk_id()), 0) << size;
    }
  }
  // The letters that there is room for are the most frequent ones.
  const auto tokenizer = Tokenizer::train({"aaaab", "aaaac", "aaaad"}, 268);
  EXPECT_EQ(tokenizer.encode("ab").size(), 3U) << "a space, a, and b in bytes";
  EXPECT_EQ(tokenizer.encode("bb").size(), 3U) << "a space, and b twice in bytes";
}

TEST(Tokenizer, FewCaptionsGiveFewPieces) {
  const auto tokenizer = Tokenizer::train({"a duck", "a bus"}, 5000);
  EXPECT_LT(tokenizer.vocab_size(), 300);
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("a duck")), "a duck");
}

}  // namespace
}  // namespace megatron_cpp::step37
