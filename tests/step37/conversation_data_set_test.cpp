// Files of conversations: what is read, what is left out with which name, and samples against tokens put together by
// hand.
#include "step37/data/conversation_data_set.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "step37/data/caption_data_set.h"
#include "step37/data/json_lines.h"
#include "tests/step37/data_set_fixture.h"
#include "tests/step37/small_pictures.h"
#include "tests/support/errors.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp::step37 {
namespace {

namespace fs = std::filesystem;
using namespace test_support;
using namespace data_set_fixture;

TEST(JsonLines, LinesAsEditorsLeaveThem) {
  const TemporaryFolder folder;
  const std::string deep(65, '[');
  std::string text = "\xEF\xBB\xBF{\"n\": 1}\r\n\n  \r\n{\"n\": 2}\n[3]\nnonsense\n{\"n\": \"\xff\"}\n";
  text += std::string("{\"n\": 4}\0\n", 10) + "{\"n\": " + deep + "}\n{\"n\": -1}\n{\"n\": 5}";
  const auto file = folder.write("a.jsonl", text);
  const JsonLines lines(file, [](const auto& json) { TORCH_CHECK_VALUE(json.at("n") > 0, "n is negative"); });
  ASSERT_EQ(lines.size(), 3);
  std::vector<std::pair<int, std::string>> found;
  for (int64_t i = 0; i < lines.size(); ++i) {
    lines.with(i, [&](const auto& json) { found.emplace_back(json.at("n"), lines.name(i)); });
  }
  EXPECT_EQ(found,
            (std::vector<std::pair<int, std::string>>{
                {1, file.string() + " line 1"}, {2, file.string() + " line 4"}, {5, file.string() + " line 11"}}));
  EXPECT_EQ(lines.left_out(), (std::vector<std::string>{"6 of 9 lines are left out (first: " + file.string() +
                                                        " line 5: it isn't a JSON object)"}));
  for (const auto& [line, reason] : std::vector<std::pair<std::string, std::string>>{
           {"nonsense", "it isn't JSON"},
           {"{\"n\": \"\xff\"}", "it isn't UTF-8"},
           {std::string("{\"n\": 4}\0", 9), "NUL"},
           {"{\"n\": " + deep + std::string(65, ']') + "}", "nested more than 64 deep"},
           {"{\"n\": \"" + deep + "\\\"" + deep + "\"}", "nothing thrown"}}) {
    EXPECT_TRUE(contains(value_error([&] { json_object_in(line); }), reason));
  }
}

TEST(JsonLines, LongLinesAndFilesAtFault) {
  const TemporaryFolder folder;
  const std::string large(3 << 20, 'x');  // longer than what is read at once
  const auto file = folder.write("a.jsonl", "{\"a\": \"" + large + "\"}\n{\"a\": \"b\"}\n");
  const auto any = [](const auto&) {};
  const JsonLines lines(file, any);
  ASSERT_EQ(lines.size(), 2);
  lines.with(0, [&](const auto& json) { EXPECT_EQ(json.at("a"), large); });
  lines.with(1, [&](const auto& json) { EXPECT_EQ(json.at("a"), "b"); });
  // Changed in place behind our back.
  fs::resize_file(file, 5);
  EXPECT_TRUE(contains(value_error([&] { lines.with(0, any); }), "a.jsonl line 1: it isn't JSON"));
  EXPECT_TRUE(contains(value_error([&] { lines.with(1, any); }), "a.jsonl line 2: it isn't JSON"));

  const auto too_long = folder.write("long.jsonl", "{}\n" + std::string((size_t{1} << 26) + 1, ' ') + "\n{}");
  const JsonLines rest(too_long, any);
  EXPECT_EQ(rest.size(), 2);
  EXPECT_EQ(rest.name(1), too_long.string() + " line 3");
  EXPECT_TRUE(contains(rest.left_out().at(0), "line 2: it has more than 67108864 bytes"));

  for (const auto& path :
       {folder.path() / "none", folder.path(), folder.write("empty", ""), folder.write("b", "\n \n")}) {
    EXPECT_TRUE(contains(value_error([&] { JsonLines(path, any); }), path.string()));
  }
  EXPECT_TRUE(contains(value_error([&] { JsonLines(folder.write("bad", "\n1\n2"), any); }),
                       "bad has no line that can be used; the first: "));
}

TEST(CaptionDataSet, BeginPictureCaptionEnd) {
  const auto format = small_format(/*with_crops=*/true);
  const CaptionDataSet set("folder", {{"a/b.png", "A duck.", 56, 30, 99, 7}, {"c\n.png", "A bus.", 28, 28, 5, 8}});
  ASSERT_EQ(set.num_samples(), 2);
  EXPECT_EQ(set.name(1), "c\\x0a.png");
  EXPECT_EQ(set.texts(0), std::vector<std::string>{"A duck."});
  const auto sample = sample_of(set, 0, format);
  const auto picture = tokens_of(56, 30, format);
  const auto caption = tokenizer().encode("A duck.");
  EXPECT_GT(picture.size(), tokens_of(28, 28, format).size());
  EXPECT_EQ(sample.tokens, joined({{tokenizer().bos_id()}, picture, caption, {tokenizer().eos_id()}}));
  Mask mask(1 + picture.size(), 0);
  mask.resize(mask.size() + caption.size() + 1, 1);
  EXPECT_EQ(sample.loss_mask, mask);
  ASSERT_EQ(sample.pictures.size(), 1U);
  const auto& [path, width, height, bytes, modified, place] = sample.pictures[0];
  EXPECT_EQ(path, "folder/a/b.png");
  EXPECT_EQ((Ids{width, height, bytes, modified, place.offset, place.bytes}), (Ids{56, 30, 99, 7, 0, 0}));
  auto without_begin = format;
  without_begin.begin_id.reset();
  EXPECT_EQ(set.sample(0, without_begin).tokens.front(), picture.front());
}

TEST(ConversationDataSet, TwoPicturesASample) {
  const TemporaryFolder folder;
  small_run::write_picture(folder.path() / "wide.png", 60, 30, 1);
  fs::create_directories(folder.path() / "sub");
  small_run::write_picture(folder.path() / "sub/small.png", 20, 20, 2);
  const auto file = folder.write(
      "chats.jsonl",
      R"({"messages": [{"role": "user", "content": "<image><image>What is this?"}, {"role": "assistant", "content": "A duck."}], "images": ["wide.png", "sub/small.png"]})"
      "\n{}\n"
      R"({"messages": [{"role": "user", "content": [{"type": "image", "path": "none.png"}, {"type": "text", "text": "What?"}]}, {"role": "assistant", "content": "A bus."}]})"
      "\n");
  const ConversationDataSet set(file, {});
  ASSERT_EQ(set.num_samples(), 2);
  EXPECT_EQ(set.name(1), file.string() + " line 3");
  EXPECT_EQ(set.left_out(), (std::vector<std::string>{"1 of 3 lines are left out (first: " + file.string() +
                                                      " line 2: it has neither messages nor conversations)"}));
  EXPECT_EQ(set.texts(0),
            (std::vector<std::string>{"user\n", "What is this?", "\n", "assistant\n", "\n\n", "\nA duck.", "\n"}));
  const auto id = [](const char* symbol) { return Ids{tokenizer().id_of(symbol)}; };
  const auto text = [](const char* of) { return tokenizer().encode(of); };
  for (const bool with_crops : {false, true}) {
    const auto format = small_format(with_crops);
    const auto sample = sample_of(set, 0, format);
    EXPECT_EQ(sample.tokens, joined({{tokenizer().bos_id()},
                                     id("<|im_start|>"),
                                     text("user\n"),
                                     tokens_of(60, 30, format),
                                     tokens_of(20, 20, format),
                                     text("What is this?"),
                                     id("<|im_end|>"),
                                     text("\n"),
                                     id("<|im_start|>"),
                                     text("assistant\n"),
                                     id("<think>"),
                                     text("\n\n"),
                                     id("</think>"),
                                     text("\nA duck."),
                                     id("<|im_end|>"),
                                     text("\n")}));
    const auto answer = text("\n\n").size() - text("\n").size() + 2 + text("\nA duck.").size() + text("\n").size();
    EXPECT_EQ(num_in_loss(sample), static_cast<int64_t>(answer));
    EXPECT_EQ(sample.loss_mask.back(), 1);
    ASSERT_EQ(sample.pictures.size(), 2U);
    EXPECT_EQ(sample.pictures[0].path, folder.path() / "wide.png");
    EXPECT_EQ(sample.pictures[0].width, 60);
    EXPECT_EQ(sample.pictures[1].path, folder.path() / "sub/small.png");
    EXPECT_EQ(sample.pictures[1].height, 20);
    const auto broken = sample_of(set, 1, format);
    ASSERT_EQ(broken.pictures.size(), 1U);
    EXPECT_EQ(broken.pictures[0].width, 28);
    EXPECT_EQ(broken.pictures[0].height, 28);
  }

  const ConversationDataSet elsewhere(file, {.picture_folder = "/data"});
  EXPECT_EQ(elsewhere.sample(0, small_format(false)).pictures.at(1).path, "/data/sub/small.png");
  const ConversationDataSet plain(file, {.chat_template = ChatTemplate::named("plain")});
  EXPECT_EQ(plain.sample(1, small_format(false)).tokens.back(), tokenizer().eos_id());

  const auto captions_alone = Tokenizer::train({"A duck."}, 300);
  auto format = small_format(false);
  format.tokenizer = &captions_alone;
  EXPECT_TRUE(contains(value_error([&] { set.sample(0, format); }), "chats.jsonl line 1: tokenizer trained on 1 "));
  fs::resize_file(file, 100);
  EXPECT_TRUE(contains(value_error([&] { set.sample(0, small_format(false)); }), "chats.jsonl line 1: "));
}

}  // namespace
}  // namespace megatron_cpp::step37
