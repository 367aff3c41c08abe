// Ready-made token ids: what is refused, and samples.
#include "step37/data/token_data_set.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>
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

std::string list_of(const Ids& ids) { return nlohmann::json(ids).dump(); }

TEST(TokenDataSet, TokensMasksAndPictures) {
  const TemporaryFolder folder;
  small_run::write_picture(folder.path() / "wide.png", 60, 30, 1);
  for (const bool with_crops : {false, true}) {
    const auto format = small_format(with_crops);
    const auto picture = tokens_of(60, 30, format);
    const auto with_picture = joined({{1, 20}, picture, {21, 22}});
    const auto twice = joined({picture, picture, {21}});
    auto wrong = picture;
    wrong.erase(wrong.begin() + 1);
    auto unfinished = picture;
    unfinished.pop_back();
    const auto line = [](const Ids& tokens, const std::string& rest) {
      return R"({"tokens": )" + list_of(tokens) + rest + "}\n";
    };
    const std::string one = R"(, "images": ["wide.png"])";
    std::vector<std::pair<std::string, std::string>> bad = {
        {"{}\n", "it has no tokens"},
        {"{\"tokens\": [1.5, 2]}\n", "tokens isn't a list of integers"},
        {line({1}, ""), "1 tokens; at least 2"},
        {line({1, -1}, ""), "id -1 isn't in the vocabulary of"},
        {line({1, tokenizer().vocab_size()}, ""), "isn't in the vocabulary of"},
        {line({1, 20}, R"(, "loss_mask": [1])"), "loss_mask has 1 values for 2 tokens"},
        {line({1, 20}, R"(, "loss_mask": [1, 2])"), "loss_mask has 2, which"},
        {line({1, 20}, R"(, "loss_mask": 1)"), "loss_mask isn't a list"},
        {line({1, 20}, R"(, "images": "a")"), "images isn't a list"},
        {line({1, 20}, R"(, "images": [""])"), "empty"},
        {line({1, 20}, one), "tokens of 0 pictures for 1 images"},
        {line(with_picture, ""), "tokens of 1 pictures for 0 images"},
        {line(twice, one), "tokens of 2 pictures for 1 images"},
        {line(joined({{1}, wrong}), one), "patches instead of 1"},
        {line(joined({{1}, unfinished}), one), "doesn't end"},
        {line({1, format.picture_ids.im_patch}, ""), "token 1 is a picture's, outside"}};
    if (with_crops) {
      const Ids crop(picture.begin(), picture.begin() + 3);
      bad.emplace_back(line(joined({crop, {20}, picture}), one), "token 3 stands between the views");
      bad.emplace_back(line(joined({{20}, crop}), ""), "the tokens end between the views");
    } else {
      bad.emplace_back(line(joined({tokens_of(60, 30, small_format(true)), {20}}), one), "begins a crop");
    }
    const TokenOptions options{tokenizer().vocab_size(), format.picture_ids, format.crops};
    for (const auto& [text, reason] : bad) {
      const auto file = folder.write("bad.jsonl", text);
      const auto message = value_error([&] { TokenDataSet(file, options); });
      EXPECT_TRUE(contains(message, reason)) << text;
      EXPECT_TRUE(contains(message, file.string() + " line 1: "));
    }

    const auto file = folder.write("tokens.jsonl", line({1, 20, 21}, "") + bad[0].first + line(with_picture, one) +
                                                       line({1, 20}, R"(, "loss_mask": [1, 0], "images": [])"));
    const TokenDataSet set(file, options);
    ASSERT_EQ(set.num_samples(), 3);
    EXPECT_EQ(set.left_out().size(), 1U);
    EXPECT_EQ(set.sample(0, format).loss_mask, (Mask{0, 1, 1}));
    EXPECT_EQ(set.sample(2, format).loss_mask, (Mask{1, 0}));
    const auto sample = sample_of(set, 1, format);
    EXPECT_EQ(sample.tokens, with_picture);
    ASSERT_EQ(sample.pictures.size(), 1U);
    EXPECT_EQ(sample.pictures[0].path, folder.path() / "wide.png");
    EXPECT_EQ(set.name(1), file.string() + " line 3");
    EXPECT_TRUE(set.texts(1).empty());

    // A picture that isn't there counts as one of global_side, which has no crops.
    const auto elsewhere = folder.write("elsewhere.jsonl", line(with_picture, R"(, "images": ["none.png"])"));
    const auto message = value_error([&] { TokenDataSet(elsewhere, options).sample(0, format); });
    if (with_crops) {
      EXPECT_TRUE(
          contains(message, "elsewhere.jsonl line 1: the tokens of none.png are not those of a picture of 28 x 28"));
    } else {
      EXPECT_EQ(message, "nothing thrown");
    }
    auto no_pictures = options;
    no_pictures.picture_ids.reset();
    EXPECT_EQ(TokenDataSet(file, no_pictures).num_samples(), 2);
  }
}

}  // namespace
}  // namespace megatron_cpp::step37
