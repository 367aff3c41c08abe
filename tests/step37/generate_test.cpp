// `step37 generate`: the cache, the choice of tokens, and captions of the golden model "wide", whose vocabulary has no
// text: ids are compared.
#include "step37/program/generate.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "parallel/agree.h"
#include "parallel/collectives.h"
#include "step37/data/tokenizer.h"
#include "step37/published_checkpoint.h"
#include "tests/support/environment.h"
#include "tests/support/errors.h"
#include "tests/support/stb_image_write.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::step37 {
namespace {

namespace fs = std::filesystem;
using namespace test_support;

using Ids = std::vector<int64_t>;

const fs::path kWide = test_support::cases() / "models" / "wide";  // window 5; experts in layers 1 and 2

// ---- the cache ----

/// [S, B, V] of S positions of `ids`, given to the decoder in pieces of these lengths.
at::Tensor logits_in_pieces(Step37Model& model, const at::Tensor& ids, const Ids& pieces,
                            const parallel::GroupPtr& tp) {
  const bool sequence_parallel = model->config().execution.sequence_parallel;
  const int64_t t = sequence_parallel ? tp->getSize() : 1;
  auto& language_model = *model->language_model;
  KeyValueCache cache;
  std::vector<at::Tensor> logits;
  int64_t begin = 0;
  for (const int64_t n : pieces) {
    const int64_t padding = (t - n % t) % t;
    const auto input = at::constant_pad_nd(ids.narrow(1, begin, n), {0, padding}, 7);
    AttentionInput attention{at::cat({at::arange(begin, begin + n), at::arange(padding)}).unsqueeze(0), {}};
    if (padding > 0) attention.cu_seqlens = at::tensor({int64_t{0}, n, n + padding}, at::kInt);
    const auto embeddings = language_model.embedding->forward(input, attention.position_ids);
    const auto hidden = language_model.decoder->forward(embeddings, attention, pieces.size() > 1 ? &cache : nullptr);
    logits.push_back(language_model.output_layer->forward(hidden).narrow(0, 0, n));
    begin += n;
  }
  return at::cat(logits);
}

TEST(KeyValueCacheTest, GivesTheLogitsOfTheWholeSequence) {
  const at::NoGradGuard no_grad;
  const PublishedCheckpoint checkpoint(kWide);
  const auto generator = at::detail::createCPUGenerator(3);
  for (const int t : divisors_of_world()) {
    for (const int ep : divisors_of_world()) {
      if (t % ep != 0) continue;
      const auto& groups = test_support::groups({.tp = t, .dp = runtime().size() / t, .ep = ep, .etp = t / ep});
      for (const bool sequence_parallel : {false, true}) {
        SCOPED_TRACE(testing::Message() << "tp " << t << " ep " << ep << " sequence_parallel " << sequence_parallel);
        auto config = step37_config(checkpoint.config(), false);
        config.execution.sequence_parallel = sequence_parallel;
        Step37Model model(config, groups);
        checkpoint.load(parameter_shards(*model));
        model->to(runtime().device());
        // Padding, which sequence parallelism needs, goes with one batch row only.
        const auto ids = at::randint(3, 60, {sequence_parallel ? 1 : 2, 20}, generator, at::kLong);
        const auto expected = logits_in_pieces(model, ids, {20}, groups.tp);
        for (const Ids& pieces : {Ids{9, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, Ids{2, 1, 8, 1, 3, 5}, Ids{19, 1}}) {
          EXPECT_TRUE(near(logits_in_pieces(model, ids, pieces, groups.tp), expected, 1e-5));
        }
      }
    }
  }
}

TEST(KeyValueCacheTest, RefusesGradientsAndAnotherBlocksCache) {
  Step37Model model(step37_config(PublishedCheckpoint(kWide).config(), false), world_tp());
  auto& decoder = model->language_model->decoder;
  KeyValueCache cache;
  const auto forward = [&] { decoder->forward(at::zeros({1, 1, 32}), {at::zeros({1, 1}, at::kLong), {}}, &cache); };
  EXPECT_TRUE(throws(forward, "a KeyValueCache goes without gradients"));
  const at::NoGradGuard no_grad;
  cache.layers.resize(2);
  EXPECT_TRUE(throws(forward, "the KeyValueCache is of 2 layers, the block of 3"));
}

// ---- the choice of a token ----

std::map<int64_t, double> frequencies(const std::vector<double>& probabilities, const SamplingOptions& options) {
  constexpr int kDraws = 4000;
  const auto logits = at::tensor(probabilities, at::kDouble).log().to(at::kFloat);
  std::mt19937_64 random(options.seed);
  std::map<int64_t, double> result;
  for (int i = 0; i < kDraws; ++i) result[choose_token(logits, options, random)] += 1.0 / kDraws;
  return result;
}

TEST(ChooseToken, DrawsFromTheNucleus) {
  const std::vector<double> probabilities{0.05, 0.5, 0.0, 0.15, 0.3};
  const auto drawn = [&](double top_p, double temperature = 1.0) {
    std::set<int64_t> ids;
    for (const auto& [id, frequency] : frequencies(probabilities, {temperature, top_p, 5})) ids.insert(id);
    return ids;
  };
  EXPECT_EQ(drawn(1.0), (std::set<int64_t>{0, 1, 3, 4}));
  EXPECT_EQ(drawn(0.96), (std::set<int64_t>{0, 1, 3, 4}));
  EXPECT_EQ(drawn(0.94), (std::set<int64_t>{1, 3, 4}));
  EXPECT_EQ(drawn(0.79), (std::set<int64_t>{1, 4}));
  EXPECT_EQ(drawn(0.51), (std::set<int64_t>{1, 4}));
  EXPECT_EQ(drawn(0.49), (std::set<int64_t>{1}));
  EXPECT_EQ(drawn(1e-9), (std::set<int64_t>{1}));
  EXPECT_EQ(drawn(1.0, 1e-300), (std::set<int64_t>{1}));
}

TEST(ChooseToken, DrawsInProportion) {
  const auto whole = frequencies({0.1, 0.6, 0.3}, {1.0, 1.0, 1});
  EXPECT_NEAR(whole.at(0), 0.1, 0.03);
  EXPECT_NEAR(whole.at(1), 0.6, 0.03);
  const auto nucleus = frequencies({0.1, 0.6, 0.3}, {1.0, 0.8, 2});
  EXPECT_NEAR(nucleus.at(1), 0.6 / 0.9, 0.03);
  const auto warm = frequencies({0.1, 0.6, 0.3}, {2.0, 1.0, 3});
  EXPECT_NEAR(warm.at(0), std::sqrt(0.1) / (std::sqrt(0.1) + std::sqrt(0.6) + std::sqrt(0.3)), 0.03);
}

TEST(ChooseToken, GreedyTakesTheLowestOfEqualOnes) {
  std::mt19937_64 random(1);
  EXPECT_EQ(choose_token(at::tensor({1.0, 3.0, 2.0, 3.0}), {}, random), 1);
}

// ---- the program ----

void write_picture(const fs::path& file, int64_t width, int64_t height) {
  std::vector<unsigned char> pixels;
  for (int64_t i = 0; i < width * height * 3; ++i) pixels.push_back(static_cast<unsigned char>(i * i % 251));
  const auto sides = std::pair(static_cast<int>(width), static_cast<int>(height));
  EXPECT_NE(stbi_write_png(file.c_str(), sides.first, sides.second, 3, pixels.data(), 3 * sides.first), 0);
}

constexpr std::string_view kTokenizer = R"({"added_tokens": [{"id": 2, "content": "<im_start>"},
  {"id": 3, "content": "<im_end>"}, {"id": 4, "content": "<patch_start>"}, {"id": 5, "content": "<patch_end>"},
  {"id": 6, "content": "<patch_newline>"}]})";

class Generate : public testing::Test {
 protected:
  void SetUp() override {
    on_main([&] {
      fs::copy(kWide, model());
      write_file(model() / "tokenizer.json", kTokenizer);
      write_picture(picture("small.png"), 60, 48);
      write_picture(picture("wide.png"), 200, 100);  // 5 x 3 crops
    });
  }

  static void on_main(const std::function<void()>& action) {
    parallel::barrier(world_tp());
    if (runtime().rank() == 0) action();
    parallel::barrier(world_tp());
  }

  fs::path model() const { return folder_.path() / "model"; }
  fs::path picture(const std::string& name) const { return folder_.path() / name; }

  GenerateArguments arguments(const std::vector<std::string>& pictures = {"small.png"}) const {
    GenerateArguments arguments;
    arguments.model = model();
    for (const auto& name : pictures) arguments.images.push_back(picture(name));
    arguments.max_new_tokens = 12;
    arguments.ids = true;
    return arguments;
  }

  /// What is printed, on every rank.
  static std::string output_of(const GenerateArguments& arguments) {
    const bool is_first = runtime().rank() == 0;
    if (is_first) testing::internal::CaptureStdout();
    const auto error = message_of([&] { generate(runtime(), arguments); });
    const auto printed = is_first ? testing::internal::GetCapturedStdout() : std::string();
    EXPECT_EQ(error, "");
    return parallel::broadcast_text(printed, 0, world_tp());
  }

  /// The message of the error that every rank ends in.
  static std::string error_of_all(const GenerateArguments& arguments) {
    const auto message = message_of([&] { generate(runtime(), arguments); });
    EXPECT_TRUE(on_all_ranks(!message.empty()));
    return message;
  }

  test_support::SharedFolder folder_;
};

// The expected ids are the largest logits of transformers 5.24, whole sequences at a time; the closest second is 0.007
// away.
TEST_F(Generate, ChoosesWhatTransformersChooses) {
  const std::map<std::vector<std::string>, std::string> expected{
      {{"small.png"}, "24 6 58 30 30 30 30 30 27 27 27 27\n"},
      {{"wide.png"}, "55 47 50 29 4 49 17 47 36 27 49 17\n"},
      {{"small.png", "wide.png"}, "55 47 50 29 4 49 45 36 47 10 29 17\n"}};
  for (const auto& [pictures, ids] : expected) {
    auto given = arguments(pictures);
    for (const int ep : divisors_of_world()) {
      given.expert_parallel = ep;
      EXPECT_EQ(output_of(given), ids) << ep;
    }
    given.cache = false;
    EXPECT_EQ(output_of(given), ids);
  }
}

// Equal at every number of ranks: these ids stand here for all of them.
TEST_F(Generate, DrawsAlikeWithAndWithoutCache) {
  auto given = arguments();
  given.sampling = {.temperature = 1.0, .top_p = 0.9, .seed = 3};
  const auto ids = output_of(given);
  EXPECT_EQ(ids, "44 6 33 13 53 53 23 48 22 34 60 26\n");
  given.cache = false;
  EXPECT_EQ(output_of(given), ids);
  given.cache = true;
  given.sampling.seed = 4;
  EXPECT_NE(output_of(given), ids);
  given.sampling.top_p = 1e-6;
  EXPECT_EQ(output_of(given), "24 6 58 30 30 30 30 30 27 27 27 27\n");
}

TEST_F(Generate, EndsAtTheEndOfTheConfigurations) {
  const auto write = [&](const std::string& generation, const std::string& config) {
    on_main([&] {
      write_file(model() / "generation_config.json", generation);
      auto text = read_file(kWide / "config.json");
      if (!config.empty()) text.insert(text.find('{') + 1, "\"eos_token_id\": " + config + ",");
      write_file(model() / "config.json", text);
    });
  };
  write(R"({"eos_token_id": [9, 58]})", "6");
  EXPECT_EQ(output_of(arguments()), "24 6\n");
  write(R"({"eos_token_id": 6})", "58");
  EXPECT_EQ(output_of(arguments()), "24\n");
  write(R"({"eos_token_id": null})", "[58, 24]");
  EXPECT_EQ(output_of(arguments()), "\n");
  write("{}", "27");
  EXPECT_EQ(output_of(arguments()), "24 6 58 30 30 30 30 30\n");
}

TEST_F(Generate, PrintsTextWhereThereIsATokenizer) {
  auto given = arguments();
  given.ids = false;
  EXPECT_EQ(output_of(given), "24 6 58 30 30 30 30 30 27 27 27 27\n");  // there is none
  on_main([&] { Tokenizer::train({"a cat", "a dog"}, 270).save(model() / "tokenizer.model"); });
  const auto tokenizer = Tokenizer::load(model() / "tokenizer.model");
  const auto text = output_of(given);
  given.ids = true;
  std::istringstream printed(output_of(given));
  std::vector<int64_t> ids;
  for (int64_t id = 0; printed >> id;) ids.push_back(id);
  EXPECT_EQ(text, tokenizer.decode(ids) + "\n");
  const std::set<int64_t> chosen(ids.begin(), ids.end());
  for (const auto symbol : kPictureSymbols) EXPECT_FALSE(chosen.contains(tokenizer.id_of(symbol))) << symbol;
}

TEST_F(Generate, AsksTheProgramOfTheEnvironment) {
  auto given = arguments();
  const auto program = folder_.path() / "tokenize it.sh";
  on_main([&] {
    write_file(program,
               "#!/bin/sh\n[ -d \"$2\" ] || exit 1\nread -r given\n[ $1 = encode ] && printf '24 6' && "
               "exit\nprintf 'text of %s' \"$given\"\n");
    fs::permissions(program, fs::perms::owner_all);
  });
  setenv("STEP37_TOKENIZER", program.c_str(), 1);
  given.ids = false;
  given.prompt = "it's $HOME";
  given.max_new_tokens = 2;
  EXPECT_EQ(output_of(given), "text of 24 6 58 30\n");
  setenv("STEP37_TOKENIZER", "false", 1);
  given.model = model();
  EXPECT_TRUE(contains(error_of_all(given), "STEP37_TOKENIZER=false failed"));
  unsetenv("STEP37_TOKENIZER");
}

TEST_F(Generate, TakesSidesFromThePreprocessorsConfiguration) {
  const auto with_crops = output_of(arguments({"wide.png"}));
  on_main([&] {
    write_file(model() / "preprocessor_config.json",
               R"({"size": {"height": 70, "width": 70}, "patch_size": 42, "max_image_size": 3024})");
  });
  EXPECT_EQ(output_of(arguments({"wide.png"})), with_crops);
  on_main([&] { write_file(model() / "preprocessor_config.json", R"({"patch_size": 84})"); });
  EXPECT_NE(output_of(arguments({"wide.png"})), with_crops);
}

// ---- errors, on every rank ----

TEST_F(Generate, RefusesOptionsOutOfRange) {
  const auto error = [&](const std::function<void(GenerateArguments&)>& change) {
    auto given = arguments();
    change(given);
    return error_of_all(given);
  };
  const auto contains_error = [&](const std::string& text, const std::function<void(GenerateArguments&)>& change) {
    EXPECT_TRUE(contains(error(change), text));
  };
  contains_error("--temperature -1: expected 0 or more", [](auto& given) { given.sampling.temperature = -1.0; });
  contains_error("--temperature nan", [](auto& given) { given.sampling.temperature = std::nan(""); });
  contains_error("--top-p 0: expected above 0 and at most 1", [](auto& given) { given.sampling.top_p = 0.0; });
  contains_error("--top-p 1.5", [](auto& given) { given.sampling.top_p = 1.5; });
  contains_error("--max-new-tokens 0: expected 1 or more", [](auto& given) { given.max_new_tokens = 0; });
  contains_error("--expert-parallel 3 does not divide the", [](auto& given) { given.expert_parallel = 3; });
  contains_error("give either --checkpoint or --model", [](auto& given) { given.checkpoint = "x"; });
  contains_error("give either --checkpoint or --model", [](auto& given) { given.model.clear(); });
  contains_error("--image is missing", [](auto& given) { given.images.clear(); });
  contains_error("absent.png", [&](auto& given) { given.images.push_back(picture("absent.png")); });
  contains_error("--prompt needs a tokenizer: " + model().string() + " has no tokenizer.model",
                 [](auto& given) { given.prompt = "A"; });
}

TEST_F(Generate, RefusesModelsThatLackSomething) {
  on_main([&] { write_file(model() / "tokenizer.json", R"({"added_tokens": [{"id": 2, "content": "<im_start>"}]})"); });
  EXPECT_TRUE(contains(error_of_all(arguments()), "the id of <im_end> is neither in config.json nor among"));
  on_main([&] {
    write_file(model() / "tokenizer.json", kTokenizer);
    auto text = read_file(kWide / "config.json");
    const std::string limit = "\"max_position_embeddings\": ";
    text.replace(text.find(limit), limit.size() + 3, limit + "52");
    write_file(model() / "config.json", text);
  });
  EXPECT_EQ(output_of(arguments()), "24 6 58 30 30 30 30 30 27 27 27 27\n");
  EXPECT_TRUE(contains(error_of_all(arguments({"wide.png"})),
                       "pictures and prompt take 53 positions, the model was made for 52"));
  on_main([&] { fs::remove(model() / "model.safetensors"); });
  EXPECT_TRUE(contains(error_of_all(arguments()), "has neither model.safetensors nor"));
}

}  // namespace
}  // namespace megatron_cpp::step37
