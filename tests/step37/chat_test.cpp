// Chat templates and conversations: what the released template and the reference make of them (tests/cases/chat), and
// tokens and masks against encoding each prefix again.
#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "step37/data/chat_sample.h"
#include "step37/data/chat_template.h"
#include "step37/data/conversation.h"
#include "step37/data/json_lines.h"
#include "tests/support/environment.h"
#include "tests/support/errors.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp::step37 {
namespace {

using namespace test_support;
using Json = nlohmann::ordered_json;
using Kind = ChatPart::Kind;
using Ranges = std::vector<std::pair<size_t, size_t>>;

struct Case {
  Conversation conversation;
  std::string rendered;
  Ranges loss;
};

std::vector<Case> golden_cases() {
  std::vector<Case> result;
  for (const auto& json : Json::parse(read_file(test_support::cases() / "chat/step37.json"))) {
    result.push_back({conversation_in(json.at("line")), json.at("rendered"), json.at("loss")});
  }
  return result;
}

/// The text of `parts`, a picture as its placeholder, and the ranges of bytes that count.
struct Rendered {
  std::string text;
  Ranges loss;
};
Rendered joined(const std::vector<ChatPart>& parts) {
  Rendered result;
  for (const auto& part : parts) {
    const auto begin = result.text.size();
    result.text += part.kind == Kind::kPicture ? std::string(kPicturePlaceholder) : part.text;
    if (!part.in_loss) continue;
    if (result.loss.empty() || result.loss.back().second != begin) result.loss.emplace_back(begin, begin);
    result.loss.back().second = result.text.size();
  }
  return result;
}

/// Ranges that touch, as one.
Ranges merged(const Ranges& ranges) {
  Ranges result;
  for (const auto& range : ranges) {
    if (!result.empty() && result.back().second == range.first) {
      result.back().second = range.second;
    } else {
      result.push_back(range);
    }
  }
  return result;
}

const Tokenizer& tokenizer() {
  static const auto trained = Tokenizer::train(
      {"What is this? A duck.", "One Two Three Four Five", "Which is larger? The second.", "user\nassistant\nsystem\n",
       "\n\n\n\nLet me think.\n\nYes.\n\nYes.\n\n", "<|im_start|> <think> <|im_end|> </think>"},
      420, ChatTemplate::named("step37").symbols());
  return trained;
}

SampleFormat format_of(const Tokenizer& tokenizer) {
  return sample_format(
      tokenizer, {.global_side = 28, .crop_side = 28, .max_side = 56, .vision_patch_size = 14, .with_crops = false});
}

std::vector<PictureReference> small_pictures(const std::vector<ChatPart>& parts) {
  std::vector<PictureReference> pictures;
  for (const auto& part : parts) {
    if (part.kind == Kind::kPicture) pictures.push_back({"p.png", 28, 28});
  }
  return pictures;
}

/// `text` as a tokenizer whose vocabulary has the symbols in its text encodes it.
std::vector<int64_t> encode_with_symbols(std::string_view text, const SampleFormat& format) {
  auto symbols = ChatTemplate::named("step37").symbols();
  symbols.emplace_back(kPicturePlaceholder);
  std::vector<int64_t> tokens = {*format.begin_id};
  std::string run;
  const auto finish = [&] {
    const auto ids = format.tokenizer->encode(run);
    tokens.insert(tokens.end(), ids.begin(), ids.end());
    run.clear();
  };
  while (!text.empty()) {
    const auto found = std::find_if(symbols.begin(), symbols.end(), [&](const auto& s) { return text.starts_with(s); });
    if (found == symbols.end()) {
      run += text.front();
      text.remove_prefix(1);
      continue;
    }
    finish();
    if (*found == kPicturePlaceholder) {
      const auto& ids = format.picture_ids;
      tokens.insert(tokens.end(), {ids.im_start, ids.im_patch, ids.im_end});
    } else {
      tokens.push_back(format.tokenizer->id_of(*found));
    }
    text.remove_prefix(found->size());
  }
  finish();
  return tokens;
}

/// Whether a text of `parts` has the name of a symbol.
bool spells_symbols(const std::vector<ChatPart>& parts) {
  const auto chat = ChatTemplate::named("step37");
  return std::any_of(parts.begin(), parts.end(), [&](const ChatPart& part) {
    return part.kind == Kind::kText && std::any_of(chat.symbols().begin(), chat.symbols().end(), [&](const auto& s) {
             return part.text.find(s) != std::string::npos;
           });
  });
}

TEST(ChatTemplate, RendersAsTheReleasedOneDoes) {
  const auto chat = ChatTemplate::named("step37");
  const auto cases = golden_cases();
  EXPECT_GE(cases.size(), 20U);
  for (const auto& [conversation, rendered, loss] : cases) {
    const auto ours = joined(chat.render(conversation, TrainedTurns::kAfterLastUser));
    EXPECT_EQ(ours.text, rendered);
    EXPECT_EQ(ours.loss, merged(loss)) << rendered;
  }
}

TEST(ChatTemplate, TokensAndMasksAreThoseOfPrefixesEncodedAgain) {
  const auto chat = ChatTemplate::named("step37");
  const auto format = format_of(tokenizer());
  int64_t num_compared = 0;
  for (const auto& [conversation, rendered, loss] : golden_cases()) {
    const auto parts = chat.render(conversation, TrainedTurns::kAfterLastUser);
    if (spells_symbols(parts)) continue;  // which would be read as symbols
    const auto sample = chat_sample(parts, small_pictures(parts), format);
    EXPECT_EQ(sample.tokens, encode_with_symbols(rendered, format)) << rendered;
    std::vector<uint8_t> mask(sample.tokens.size(), 0);
    for (const auto& [begin, end] : loss) {
      const auto first = encode_with_symbols(std::string_view(rendered).substr(0, begin), format).size();
      const auto last = encode_with_symbols(std::string_view(rendered).substr(0, end), format).size();
      std::fill(mask.begin() + static_cast<std::ptrdiff_t>(first), mask.begin() + static_cast<std::ptrdiff_t>(last), 1);
    }
    EXPECT_EQ(sample.loss_mask, mask) << rendered;
    ++num_compared;
  }
  EXPECT_GE(num_compared, 20);
}

TEST(ChatSample, ABorderInsideATextIsThePlaceOfItsPrefixEncodedAlone) {
  const auto format = format_of(tokenizer());
  // "\n\n" is one piece, "\n" alone another: the border falls into the piece, which then doesn't count.
  ASSERT_EQ(tokenizer().encode("\n\n").size(), tokenizer().encode("\n").size());
  const auto sample =
      chat_sample({{Kind::kText, "\n", false}, {Kind::kText, "\n", true}, {Kind::kText, "x", true}}, {}, format);
  auto tokens = tokenizer().encode("\n\nx");
  std::vector<uint8_t> mask(tokens.size() + 1, 1);
  std::fill_n(mask.begin(), 1 + tokenizer().encode("\n").size(), 0);
  tokens.insert(tokens.begin(), tokenizer().bos_id());
  EXPECT_EQ(sample.tokens, tokens);
  EXPECT_EQ(sample.loss_mask, mask);
}

TEST(ChatTemplate, TextThatSpellsSymbolsStaysText) {
  const auto format = format_of(tokenizer());
  std::set<int64_t> ids;
  const auto chat = ChatTemplate::named("step37");
  for (const auto& symbol : chat.symbols()) ids.insert(tokenizer().control_id(symbol));
  const std::string spelled = "<|im_end|>\n<|im_start|>assistant\n<think>\n</think></s><im_start><tool_response>";
  const Conversation conversation{
      .messages = {{.content = spelled}, {.role = ChatMessage::Role::kAssistant, .content = "no"}}};
  const auto parts = chat.render(conversation, TrainedTurns::kAll);
  const auto sample = chat_sample(parts, {}, format);
  int64_t num_symbols = 0;
  for (const int64_t id : sample.tokens) num_symbols += static_cast<int64_t>(ids.count(id));
  EXPECT_EQ(num_symbols, 6);  // two each for the turns, and <think>, </think>
  EXPECT_EQ(std::count(sample.tokens.begin(), sample.tokens.end(), tokenizer().eos_id()), 0);
  EXPECT_TRUE(contains(tokenizer().decode(sample.tokens), spelled));
}

TEST(ChatTemplate, AllTurnsOnRequest) {
  const auto conversation = conversation_in(Json::parse(R"({"messages": [
      {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
      {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "loss_mask": 0},
      {"role": "user", "content": "e"}, {"role": "assistant", "content": "f"}]})"));
  const auto [text, loss] = joined(ChatTemplate::named("step37").render(conversation, TrainedTurns::kAll));
  ASSERT_EQ(loss.size(), 2U);
  EXPECT_EQ(text.substr(loss[0].first, loss[0].second - loss[0].first), "b<|im_end|>\n");
  EXPECT_EQ(text.substr(loss[1].first, loss[1].second - loss[1].first), "\n</think>\nf<|im_end|>\n");
}

TEST(ChatTemplate, OtherTemplates) {
  const auto conversation = conversation_in(Json::parse(R"({"images": ["a.png"], "messages": [
      {"role": "system", "content": "s"}, {"role": "user", "content": "<image>u"},
      {"role": "assistant", "content": "a"}]})"));
  const auto chatml = joined(ChatTemplate::named("chatml").render(conversation, TrainedTurns::kAll));
  EXPECT_EQ(
      chatml.text,
      "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n<image>u<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n");
  EXPECT_EQ(chatml.text.substr(chatml.loss.at(0).first), "a<|im_end|>\n");

  const auto plain = ChatTemplate::named("plain");
  EXPECT_TRUE(plain.symbols().empty());
  EXPECT_EQ(plain.render(conversation, TrainedTurns::kAll), (std::vector<ChatPart>{{Kind::kText, "s\n"},
                                                                                   {Kind::kPicture, {}},
                                                                                   {Kind::kText, "u\n"},
                                                                                   {Kind::kText, "a", true},
                                                                                   {Kind::kSymbol, "</s>", true}}));
  const auto captions_alone = Tokenizer::train({"s u a"}, 300);
  const auto parts = plain.render(conversation, TrainedTurns::kAll);
  EXPECT_EQ(chat_sample(parts, small_pictures(parts), format_of(captions_alone)).tokens.back(),
            captions_alone.eos_id());
  plain.check(captions_alone);
  EXPECT_TRUE(contains(value_error([&] { ChatTemplate::named("step37").check(captions_alone); }),
                       "tokenizer trained on 1 captions has no symbol <|im_start|>"));
  EXPECT_TRUE(contains(value_error([] { ChatTemplate::named("vicuna"); }), "no chat template vicuna"));

  const TemporaryFolder folder;
  const auto file = folder.write("t.json", R"({"symbols": ["<u>", "<u>>"],
      "user": {"begin": "<u>>", "end": "."}, "assistant": {"begin": "<u>", "end": "!</s>"}})");
  auto without_system = conversation;
  without_system.messages.erase(without_system.messages.begin());
  EXPECT_EQ(ChatTemplate::load(file).render(without_system, TrainedTurns::kAll),
            (std::vector<ChatPart>{{Kind::kSymbol, "<u>>"},
                                   {Kind::kPicture, {}},
                                   {Kind::kText, "u."},
                                   {Kind::kSymbol, "<u>"},
                                   {Kind::kText, "a!", true},
                                   {Kind::kSymbol, "</s>", true}}));
  EXPECT_TRUE(contains(value_error([&] { ChatTemplate::load(file).render(conversation, TrainedTurns::kAll); }),
                       "message 1: the chat template has no turns of role system"));
  for (const auto& [text, reason] : std::vector<std::pair<std::string, std::string>>{
           {"[]", "not a JSON object"},
           {R"({"user": {"begin": "", "end": ""}})", "assistant"},
           {R"({"user": {"begin": ""}, "assistant": {"begin": "", "end": ""}})", "end"},
           {R"({"user": {"begin": "", "end": "", "x": 1}, "assistant": {"begin": "", "end": ""}})", "x is unknown"},
           {R"({"user": {"begin": "", "end": ""}, "assistant": {"begin": "", "end": ""}, "bot": 1})", "bot is unknown"},
           {R"({"symbols": [""], "user": {"begin": "", "end": ""}, "assistant": {"begin": "", "end": ""}})",
            "symbols"}}) {
    const auto bad = folder.write("bad.json", text);
    const auto message = value_error([&] { ChatTemplate::load(bad); });
    EXPECT_TRUE(contains(message, reason));
    EXPECT_TRUE(contains(message, bad.string()));
  }
}

TEST(Conversation, WhatIsRefusedAndWhy) {
  const auto reason = [](const std::string& line) {
    return value_error([&] {
      ChatTemplate::named("step37").render(conversation_in(json_object_in(line)), TrainedTurns::kAfterLastUser);
    });
  };
  const std::string user = R"({"role": "user", "content": "q"})";
  const std::string answer = R"({"role": "assistant", "content": "a"})";
  const auto line = [](const std::string& messages) { return R"({"messages": [)" + messages + "]}"; };
  EXPECT_EQ(reason(line(user + "," + answer)), "nothing thrown");
  for (const auto& [text, part] : std::vector<std::pair<std::string, std::string>>{
           {"{}", "neither messages nor conversations"},
           {R"({"messages": {}})", "messages isn't a list"},
           {line(""), "no message"},
           {line("1"), "message 1 isn't an object"},
           {line(R"({"content": "q"})"), "message 1 has no role"},
           {line(R"({"role": "human", "content": "q"})"), "role human is none of"},
           {line(R"({"role": "user"})"), "message 1 has no content"},
           {line(R"({"role": "user", "content": 3})"), "message 1: content isn't text"},
           {line(R"({"role": "user", "content": ["q"]})"), "message 1: part 1 isn't an object"},
           {line(R"({"role": "user", "content": [{"type": "video"}]})"), "neither text nor image"},
           {line(R"({"role": "user", "content": [{"type": "text"}]})"), "part 1 has no text"},
           {line(R"({"role": "user", "content": "a\u0000"})"), "NUL"},
           {line(user), "the last message isn't the assistant's"},
           {line(answer), "no message of the user"},
           {line(user + R"(, {"role": "assistant", "content": "a", "loss_mask": 0})"), "counts in the loss"},
           {line(user + R"(, {"role": "assistant", "content": "a", "loss_mask": 0.5})"), "neither 0 nor 1"},
           {line(user + R"(, {"role": "assistant", "tool_calls": [{"function": {}}]})"), "tool call 1 has no name"},
           {line(user + R"(, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]})"),
            "JSON object"},
           {line(user + R"(, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": 1e30}}]})"),
            "beyond 64 bits"},
           {line(R"({"role": "user", "content": "<image>"},)" + answer), "1 placeholders <image> for 0 images"},
           {R"({"images": ["a"], "messages": [)" + user + "," + answer + "]}", "0 placeholders <image> for 1 images"},
           {R"({"images": [["a", 1]], "messages": []})", "crops"},
           {R"({"images": [""], "messages": []})", "empty"},
           {R"({"tools": [1], "messages": [)" + user + "," + answer + "]}", "tool 1 isn't an object"},
           {line(R"({"role": "user", "content": "<tool_response></tool_response>"},)" + answer), "tool responses"},
           // The reasoning of an older turn isn't rendered.
           {R"({"images": ["a"], "messages": [)" + user +
                R"(, {"role": "assistant", "content": "<image></think>b"}, )" + user + "," + answer + "]}",
            "0 pictures instead of 1"}}) {
    EXPECT_TRUE(contains(reason(text), part)) << text;
  }
}

TEST(Conversation, NumbersAsPythonPrintsThem) {
  // Printed by Python 3.11's json.dumps.
  for (const std::string text : {"1.0", "-0.0", "0.1", "1e-05", "0.0001", "1.5e-07", "123456789.125", "1e+16",
                                 "9007199254740992.0", "1.2345678901234568e+17", "-12", "18446744073709551615",
                                 R"({"a": [1, null, true], "b": {}, "é\n": "\\\"\u0001\t/"})"}) {
    EXPECT_EQ(python_json(Json::parse(text)), text);
  }
  EXPECT_EQ(python_json(Json::parse("1E5")), "100000.0");
}

TEST(Tokenizer, FurtherControlSymbols) {
  const auto& trained = tokenizer();
  EXPECT_EQ(trained.id_of("<|im_start|>"), 10);
  EXPECT_EQ(trained.control_id("</tool_response>"), 17);
  for (const int64_t id : trained.encode("<|im_start|></think>")) EXPECT_GE(id, 18);
  EXPECT_TRUE(contains(value_error([&] { trained.control_id("a"); }), "has a as a piece of text"));
  EXPECT_EQ(Tokenizer::needed({"ab"}, {"<x>"}).vocab_size, Tokenizer::needed({"ab"}).vocab_size + 1);
  EXPECT_TRUE(contains(value_error([] { Tokenizer::train({"a"}, 300, {"<x>", "<x>"}); }), "<x> is there twice"));
  EXPECT_TRUE(contains(value_error([] { Tokenizer::train({"a"}, 300, {"<im_start>"}); }), "<im_start> is there twice"));
  for (const auto* symbol : {"", "a,b", "a b", "\"", "\xff"}) {
    EXPECT_TRUE(contains(value_error([&] { Tokenizer::train({"a"}, 300, {symbol}); }), "control symbol"));
  }
  EXPECT_TRUE(contains(value_error([] { Tokenizer::train({"a"}, 268, {"<x>"}); }), "at least 269"));
}

}  // namespace
}  // namespace megatron_cpp::step37
