// `step37 features`, and runs that train from its folder.
#include "step37/program/features.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "megatron_cpp/checkpoint/safetensors.h"
#include "step37/data/crop_plan.h"
#include "step37/data/picture.h"
#include "step37/data/picture_features.h"
#include "step37/program/run_config.h"
#include "step37/step37_model.h"
#include "tests/step37/pretrain_fixture.h"
#include "tests/support/errors.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::step37 {
namespace {

namespace fs = std::filesystem;
using namespace small_run;
using namespace test_support;

const Overrides kFrozen = {"vision.freeze=true", "vision.heads=4"};  // heads for four ranks

class FeaturesOfARun : public Pretrain {
 protected:
  void SetUp() override {
    Pretrain::SetUp();
    on_main([&] { write_pairs(12); });
  }

  fs::path output() const { return folder_.path() / "features"; }
  fs::path pairs_file() const { return folder_.path() / "pairs.jsonl"; }

  /// Conversations about two of the pictures each.
  void write_pairs(int count) const {
    std::string pairs;
    for (int i = 0; i < count; ++i) {
      pairs += fmt::format(R"({{"messages": [{{"role": "user", "content": "<image> or <image>?"}}, {{"role": )"
                           R"("assistant", "content": "The {} one."}}], "images": ["picture{}.png", "picture{}.png"]}})"
                           "\n",
                           i % 2 == 0 ? "first" : "other", i, (i + 5) % 12);
    }
    write_file(pairs_file(), pairs);
  }

  /// Two pictures a sample, and captions; each picture is in both.
  Overrides mix(const Overrides& more = {}) const {
    const auto sets =
        fmt::format("{{pairs: {{kind: conversations, path: {}, pictures: {}, weight: 2}}, captions: {{path: {}}}}}",
                    pairs_file().string(), pictures().string(), pictures().string());
    return with({"data.directory=", "training.sequence_length=256", "data.sets=" + sets}, with(kFrozen, more));
  }
  Overrides from_features(const Overrides& overrides) const {
    return with(overrides, {"data.features=" + output().string()});
  }

  int run_features(const Overrides& overrides) const {
    parallel::Runtime own;
    return step37::features(own, {config_file(), output(), overrides_of("none", 1, overrides)});
  }
  /// What rank 0 prints.
  std::string features(const Overrides& overrides) const {
    parallel::barrier(world_tp());
    testing::internal::CaptureStdout();
    EXPECT_EQ(run_features(overrides), 0);
    const auto printed = testing::internal::GetCapturedStdout();
    parallel::barrier(world_tp());
    return parallel::broadcast_text(printed, 0, world_tp());
  }
  std::string features_error(const Overrides& overrides) const {
    return agreed_error([&] { run_features(overrides); });
  }

  RunConfig config_of(const Overrides& overrides) const {
    return load_run_config(config_file(), overrides_of("none", 1, overrides));
  }

  std::vector<fs::path> chunks() const {
    std::vector<fs::path> files;
    for (const auto& entry : fs::directory_iterator(output())) {
      if (entry.path().extension() == ".safetensors") files.push_back(entry.path());
    }
    return files;
  }
};

TEST_F(FeaturesOfARun, AreWhatTheTowerMakesOfEachView) {
  const auto overrides = mix();
  const auto printed = features(overrides);
  EXPECT_TRUE(contains(printed, "wrote the features of 12 pictures: "));
  EXPECT_TRUE(contains(printed, "; 0 pictures were there already"));
  const auto config = config_of(overrides);
  // The whole model's tower, in float64 from float32 weights.
  Step37Model model(model_config(config, config.data.vocabulary_size), single());
  initialize_parameters(parameter_shards(*model), static_cast<uint64_t>(config.training.seed));
  model->vision_model->to(at::kDouble);
  const c10::NoGradGuard no_grad;
  std::map<std::string, at::Tensor> stored;
  for (const auto& file : chunks()) {
    const SafetensorsFile chunk(file);
    for (const auto& [name, entry] : chunk.entries()) {
      EXPECT_EQ(entry.dtype, at::kBFloat16);
      EXPECT_TRUE(stored.emplace(name, chunk.read(name)).second) << name;
    }
  }
  EXPECT_EQ(stored.size(), 12U);
  const auto crops = crop_options(config);
  int64_t num_crops = 0;
  for (int i = 0; i < 12; ++i) {
    const auto file = fmt::format("picture{}.png", i);
    const auto pixels = decode_picture(pictures() / file).pixels;
    const auto plan = plan_crops(pixels.size(2), pixels.size(1), crops);
    const auto views = cut_views(pixels, plan, crops);
    std::vector<at::Tensor> rows;
    for (int64_t crop = 0; crop < plan.num_crops(); ++crop) {
      rows.push_back(model->vision_model->forward(normalize(views.crops.narrow(0, crop, 1)).to(at::kDouble))[0]);
    }
    rows.push_back(model->vision_model->forward(normalize(views.global).to(at::kDouble))[0]);
    const auto expected = at::cat(rows);
    const auto found = stored.find("captions:" + file);
    ASSERT_NE(found, stored.end()) << file;
    // Half a unit in the last of bfloat16's 8 bits, and the rounding of float32.
    ASSERT_EQ(found->second.sizes(), expected.sizes());
    EXPECT_TRUE(at::allclose(found->second.to(at::kDouble), expected, 1.01 / 256, 1e-5)) << file;
    num_crops += plan.num_crops();
  }
  EXPECT_GT(num_crops, 0);
}

// Only what the tower's rounding to bfloat16 changes.
TEST_F(FeaturesOfARun, TrainAsTheTowerDoes) {
  const int n = runtime().size();
  for (const auto& overrides : {kFrozen, mix()}) {
    on_main([&] { fs::remove_all(output()); });
    features(overrides);
    pretrain("tower", 1, with(overrides, {"run.fresh=true"}));
    pretrain("reference", 1, with(from_features(overrides), {"run.fresh=true", "report.pictures=2"}));
    expect_same_run(files("reference"), files("tower"), 4e-3);
    for (int tp = 2; tp <= n; tp *= 2) {
      for (const std::string mode : {"data", "weights"}) {
        const auto run = fmt::format("tp{}-{}", tp, mode);
        pretrain(run, tp, with(from_features(overrides), {"run.fresh=true", "parallel.mm_encoder_tp_mode=" + mode}));
        expect_same_run(files(run), files("reference"), 1e-3);
      }
    }
  }
}

// There the tower's output is of bfloat16 anyway: the folder changes no bit. (But for which replica gets which pack:
// without the tower they cost something else.)
TEST_F(FeaturesOfARun, TrainInBfloat16AsTheTowerDoes) {
  const auto overrides = mix({"training.precision=bfloat16", "data.balance=false"});
  features(overrides);
  for (const int tp : divisors_of_world()) {
    pretrain("tower", tp, with(overrides, {"run.fresh=true"}));
    pretrain("features", tp, with(from_features(overrides), {"run.fresh=true"}));
    expect_same_run(files("features"), files("tower"), rounding());
  }
}

}  // namespace
}  // namespace megatron_cpp::step37
