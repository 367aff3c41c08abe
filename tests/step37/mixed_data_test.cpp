// Runs on data sets of several kinds.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "step37/data/chat_template.h"
#include "step37/data/tokenizer.h"
#include "tests/step37/pretrain_fixture.h"
#include "tests/support/errors.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::step37 {
namespace {

namespace fs = std::filesystem;
using namespace small_run;
using namespace test_support;

class MixedData : public Pretrain {
 protected:
  void SetUp() override {
    Pretrain::SetUp();
    on_main([&] {
      std::string pairs;
      std::string texts;
      for (int i = 0; i < 12; ++i) {
        pairs +=
            fmt::format(R"({{"messages": [{{"role": "user", "content": "<image> or <image>?"}}, {{"role": "assistant",)"
                        R"( "content": "The {} one."}}], "images": ["picture{}.png", "picture{}.png"]}})"
                        "\n",
                        i % 2 == 0 ? "first" : "other", i, (i + 5) % 12);
        texts += fmt::format(R"({{"messages": [{{"role": "user", "content": "What is {}?"}}, {{"role": "assistant",)"
                             R"( "content": "A number."}}]}})"
                             "\n",
                             i);
      }
      write_file(pairs_file(), pairs);
      write_file(texts_file(), texts);
    });
  }

  fs::path pairs_file() const { return folder_.path() / "pairs.jsonl"; }
  fs::path texts_file() const { return folder_.path() / "texts.jsonl"; }

  /// Two pictures a sample, no pictures, and captions, 2:1:1.
  Overrides mix(const Overrides& more = {}) const {
    const auto sets = fmt::format(
        "{{pairs: {{kind: conversations, path: {}, pictures: {}, weight: 2}}, texts: {{kind: conversations, path: {}, "
        "chat_template: plain}}, captions: {{path: {}}}}}",
        pairs_file().string(), pictures().string(), texts_file().string(), pictures().string());
    return with({"data.directory=", "training.sequence_length=256", "data.sets=" + sets}, more);
  }

  /// One data set.
  static Overrides only(const std::string& section, const Overrides& more = {}) {
    return with({"data.directory=", fmt::format("data.sets={{it: {}}}", section)}, more);
  }
};

TEST_F(MixedData, TrainsAlikeInEveryLayout) {
  const int n = runtime().size();
  pretrain("reference", 1, mix({"report.pictures=2"}));
  for (int tp = 2; tp <= n; tp *= 2) {
    const auto run = "tp" + fmt::to_string(tp);
    pretrain(run, tp, mix());
    expect_same_run(files(run), files("reference"), 1e-3);
  }
}

TEST_F(MixedData, GoesOnAsIfItHadNotBeenInterrupted) {
  const int tp = runtime().size() == 4 ? 2 : runtime().size();
  const auto overrides = mix({"training.steps=4", "checkpoint.interval=2"});
  pretrain("whole", tp, overrides);
  copy_state("whole", "killed", 2);
  pretrain("killed", tp, overrides);
  expect_same_run(files("killed"), files("whole"), rounding());
}

TEST_F(MixedData, EveryKindTrains) {
  const int n = runtime().size();
  const auto tokenizer_file = folder_.path() / "tokenizer.model";
  on_main([&] {
    const auto tokenizer = Tokenizer::train({"A red ball. A blue bird."}, 300, ChatTemplate::named("chatml").symbols());
    tokenizer.save(tokenizer_file);
    write_file(folder_.path() / "ids.jsonl", "{\"tokens\": [1, 20, 21, 2]}\n{\"tokens\": [1, 22, 23, 24, 2]}\n");
    const std::string header{"MMIDIDX\0\0\1\0\0\0\0\0\0\0\4", 18};  // version 1, int32
    const auto number = [](auto value) { return std::string(reinterpret_cast<const char*>(&value), sizeof(value)); };
    std::string index = header + number(int64_t{2}) + number(int64_t{3});
    for (const int32_t length : {4, 3}) index += number(length);
    for (const int64_t first : {0, 16}) index += number(first);
    for (const int64_t document : {0, 1, 2}) index += number(document);
    std::string ids;
    for (const int32_t id : {1, 20, 21, 2, 22, 23, 2}) ids += number(id);
    write_file(folder_.path() / "text.idx", index);
    write_file(folder_.path() / "text.bin", ids);
    write_file(pictures() / "metadata.csv",
               "file_name,caption_0,caption_1\npicture0.png,A ball,One\npicture1.png,A bird,Two\n");
    const auto tar = "tar --format=ustar -C '" + pictures().string() + "' -cf '" +
                     (folder_.path() / "shard.tar").string() + "' picture0.png picture0.txt picture1.png picture1.txt";
    ASSERT_EQ(std::system(tar.c_str()), 0);
  });
  const Overrides one_step = {"training.steps=1", "data.held_out=0", "report.pictures=2"};
  const Overrides with_tokenizer = with(one_step, {"data.tokenizer=" + tokenizer_file.string()});
  const auto path = [&](const char* name) { return "path: " + (folder_.path() / name).string(); };
  pretrain("tokens", n, only("{kind: tokens, " + path("ids.jsonl") + "}", with_tokenizer));
  pretrain("indexed", n, only("{kind: indexed, " + path("text") + "}", with_tokenizer));
  pretrain("webdataset", n, only("{kind: webdataset, " + path("shard.tar") + "}", one_step));
  pretrain(
      "flickr8k", n,
      only("{kind: flickr8k, " + path("pictures") + ", caption: caption_1, chat_template: chatml}", with_tokenizer));
  EXPECT_EQ(read_file(files("flickr8k").tokenizer()), read_file(tokenizer_file));
  EXPECT_TRUE(contains(pretrain_error("none", n, only("{kind: tokens, " + path("ids.jsonl") + "}", one_step)),
                       "the data set it holds token ids: data.tokenizer must name their tokenizer"));
  EXPECT_TRUE(contains(pretrain_error("none", n, only("{kind: flickr8k, " + path("pictures") + "}", with_tokenizer)),
                       "the data set it: tokenizer model " + tokenizer_file.string() + " has no symbol <think>"));
  EXPECT_TRUE(contains(pretrain_error("none", n, only("{kind: conversations, " + path("nothing") + "}", one_step)),
                       (folder_.path() / "nothing").string()));
}

}  // namespace
}  // namespace megatron_cpp::step37
