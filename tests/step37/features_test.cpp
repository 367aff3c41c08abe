// `step37 features`, and runs that train from its folder.
#include "step37/program/features.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "megatron_cpp/checkpoint/safetensors.h"
#include "step37/data/crop_plan.h"
#include "step37/data/picture.h"
#include "step37/data/picture_features.h"
#include "step37/program/run_config.h"
#include "step37/program/run_data.h"
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

constexpr size_t kPicturesOfChunk = 2;                               // so that ranks write several chunks
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
    return step37::features(own, {config_file(), output(), overrides_of("none", 1, overrides), kPicturesOfChunk});
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
  EXPECT_GE(chunks().size(), 6U);
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

// Only what rounding features to bfloat16 changes; then the same in each layout.
TEST_F(FeaturesOfARun, TrainAsTheTowerDoes) {
  const int n = runtime().size();
  const auto overrides = mix();
  features(overrides);
  pretrain("tower", 1, overrides);
  pretrain("reference", 1, with(from_features(overrides), {"report.pictures=2"}));
  expect_same_run(files("reference"), files("tower"), 4e-3);
  for (int tp = 2; tp <= n; tp *= 2) {
    const auto run = fmt::format("tp{}", tp);
    pretrain(run, tp, from_features(overrides));
    expect_same_run(files(run), files("reference"), 1e-3);
  }
  pretrain("weights", n, with(from_features(overrides), {"parallel.mm_encoder_tp_mode=weights"}));
  expect_same_run(files("weights"), files("reference"), 1e-3);
}

TEST_F(FeaturesOfARun, GoOnWhereACommandWasKilled) {
  features(kFrozen);
  // As if more ranks had worked, one of which had finished nothing.
  const auto kept = output() / "chunk-00000-rank-0009.safetensors";
  const auto unfinished = output() / "chunk-00000-rank-0008.safetensors.1a2b.partial";
  on_main([&] {
    for (const auto& file : chunks()) {
      if (file.filename() != "chunk-00000-rank-0000.safetensors") fs::remove(file);
    }
    fs::rename(output() / "chunk-00000-rank-0000.safetensors", kept);
    write_file(unfinished, "half");
  });
  const auto there = static_cast<int64_t>(SafetensorsFile(kept).entries().size());
  const auto printed = features(kFrozen);
  EXPECT_TRUE(contains(printed, fmt::format("wrote the features of {} pictures: ", 12 - there)));
  EXPECT_TRUE(contains(printed, fmt::format("; {} pictures were there already", there)));
  EXPECT_FALSE(fs::exists(unfinished));
  EXPECT_TRUE(contains(features(kFrozen), "wrote the features of 0 pictures: 0 rows, 0 bytes in "));
  pretrain("run", runtime().size(), from_features(kFrozen));
}

// Conversations name their pictures, which are gone; those of captions are looked for when a run starts.
TEST_F(FeaturesOfARun, NeedNoPictures) {
  const int n = runtime().size();
  const auto only_pairs = mix({fmt::format("data.sets={{pairs: {{kind: conversations, path: {}, pictures: {}}}}}",
                                           pairs_file().string(), pictures().string())});
  features(only_pairs);
  pretrain("with", n, from_features(only_pairs));
  on_main([&] { fs::rename(pictures(), folder_.path() / "gone"); });
  pretrain("without", n, from_features(only_pairs));
  expect_same_run(files("without"), files("with"), rounding());
}

TEST_F(FeaturesOfARun, OfPicturesInArchives) {
  const int n = runtime().size();
  const auto archive = folder_.path() / "archives/a.tar";
  on_main([&] {
    fs::create_directories(archive.parent_path());
    const auto tar =
        fmt::format("tar --format=ustar -C '{}' -cf '{}' picture3.png picture3.txt picture4.png picture4.txt",
                    pictures().string(), archive.string());
    ASSERT_EQ(std::system(tar.c_str()), 0);
  });
  const auto sets = fmt::format("data.sets={{web: {{kind: webdataset, path: {}}}}}", archive.string());
  const auto overrides = mix({sets, "data.held_out=0", "training.precision=bfloat16", "data.balance=false"});
  EXPECT_TRUE(contains(features(overrides), "wrote the features of 2 pictures: "));
  const SafetensorsFile first(output() / "chunk-00000-rank-0000.safetensors");
  EXPECT_TRUE(first.entries().begin()->first.starts_with("web:a.tar#")) << first.entries().begin()->first;
  pretrain("tower", n, overrides);
  pretrain("features", n, from_features(overrides));
  expect_same_run(files("features"), files("tower"), rounding());
}

TEST_F(FeaturesOfARun, MissingPicturesAreRefusedBeforeTraining) {
  const int n = runtime().size();
  features(kFrozen);
  on_main([&] {
    for (const std::string name : {"new1", "new2"}) {
      write_picture(pictures() / (name + ".png"), 50, 60, 3);
      write_file(pictures() / (name + ".txt"), "A new one.\n");
    }
  });
  EXPECT_TRUE(contains(pretrain_error("run", n, from_features(kFrozen)),
                       fmt::format("data.features {0} lacks 2 of the 14 pictures that were looked at (first: "
                                   "directory:new1.png): `step37 features` with this configuration and --output {0} "
                                   "adds what is missing",
                                   output().string())));
  EXPECT_FALSE(fs::exists(files("run").metrics()));
  EXPECT_TRUE(contains(features(kFrozen), "wrote the features of 2 pictures: "));
  pretrain("run", n, from_features(kFrozen));
}

TEST_F(FeaturesOfARun, AChangedPictureIsAWarningAndIsRenewed) {
  const int n = runtime().size();
  features(kFrozen);
  const auto warns = [&](const std::string& run) {
    testing::internal::CaptureStderr();
    pretrain(run, n, from_features(with(kFrozen, {"data.held_out=0"})));
    const auto warnings = parallel::broadcast_text(testing::internal::GetCapturedStderr(), 0, world_tp());
    return contains(warnings, "picture3.png has changed since its features were computed, and others may have: ");
  };
  EXPECT_FALSE(warns("before"));
  on_main([&] { write_picture(pictures() / "picture3.png", 61, 71, 100); });  // as large as before
  EXPECT_TRUE(warns("changed"));
  EXPECT_TRUE(contains(features(kFrozen), "wrote the features of 1 pictures: "));
  EXPECT_FALSE(warns("after"));
}

TEST_F(FeaturesOfARun, ABrokenPictureHasThoseOfABlackOne) {
  on_main([&] {
    const auto broken = pictures() / "picture3.png";
    write_file(broken, read_file(broken).substr(0, 60));  // its header is whole
  });
  EXPECT_TRUE(contains(features_error(with(kFrozen, {"data.max_unreadable=0"})),
                       "more pictures can't be read, which is more than data.max_unreadable allows"));
  on_main([&] { fs::remove_all(output()); });
  testing::internal::CaptureStderr();
  features(kFrozen);
  const auto warnings = parallel::broadcast_text(testing::internal::GetCapturedStderr(), 0, world_tp());
  EXPECT_TRUE(contains(warnings, "a black picture takes its place"));
  const auto config = config_of(kFrozen);
  const PictureFeatures all(output(), picture_names(config), feature_source(config));
  const PictureReference picture{.path = (pictures() / "picture3.png").string(), .width = 61, .height = 71};
  const auto crops = crop_options(config);
  const auto num_crops = plan_crops(picture.width, picture.height, crops).num_crops();
  const auto crop_features = at::zeros({num_crops, crops.crop_tokens(), all.channels()});
  const auto global_view = at::zeros({crops.global_tokens(), all.channels()});
  all.read(picture, crop_features, global_view);
  Step37Model model(model_config(config, config.data.vocabulary_size), single());
  initialize_parameters(parameter_shards(*model), static_cast<uint64_t>(config.training.seed));
  const auto black = model->vision_model->forward(normalize(black_picture(56, 56).unsqueeze(0))).detach();
  EXPECT_TRUE(at::allclose(global_view, black[0], 1.01 / 256, 1e-5));
}

TEST_F(FeaturesOfARun, OfAnotherTowerAreRefused) {
  const int n = runtime().size();
  EXPECT_TRUE(contains(features_error({}), "vision.freeze is false"));
  EXPECT_TRUE(contains(pretrain_error("run", n, from_features({})), "vision.freeze is false"));
  EXPECT_TRUE(contains(pretrain_error("run", n, from_features(kFrozen)), "has no features.json"));
  features(kFrozen);
  const auto refused = [&](const Overrides& other, const std::string& part) {
    const auto overrides = with(kFrozen, other);
    EXPECT_TRUE(contains(features_error(overrides), part));
    EXPECT_TRUE(contains(pretrain_error("run", n, from_features(overrides)), part));
    EXPECT_FALSE(fs::exists(files("run").metrics()));
  };
  refused({"vision.layers=2"}, "vision.layers is 1 there, here 2");
  refused({"data.crops=false"}, "data.crops is true there, here false");
  refused({"training.seed=5"}, "are of a vision tower with other weights: their checksum is ");
  refused({"training.seed=5", "parallel.mm_encoder_tp_mode=weights"},
          "are of a vision tower with other weights: their checksum is ");
  // A run that began with the tower goes on with its features, and with no others.
  pretrain("resumed", n, with(kFrozen, {"training.steps=1"}));
  pretrain("resumed", n, from_features(kFrozen));
  pretrain("other", n, with(kFrozen, {"training.steps=1", "training.seed=5"}));
  EXPECT_TRUE(contains(pretrain_error("other", n, from_features(with(kFrozen, {"training.seed=5"}))),
                       "are of a vision tower with other weights"));
  on_main([&] { fs::remove_all(output()); });
  pretrain("resumed", n, from_features(kFrozen));  // nothing is left to train
}

// There the tower's output is of bfloat16 anyway: the folder changes no bit. (But for which replica gets which pack:
// without the tower they cost something else.)
TEST_F(FeaturesOfARun, TrainInBfloat16AsTheTowerDoes) {
  const auto overrides = mix({"training.precision=bfloat16", "data.balance=false"});
  features(overrides);
  for (const int tp : std::set<int>{1, runtime().size()}) {
    pretrain("tower", tp, with(overrides, {"run.fresh=true"}));
    pretrain("features", tp, with(from_features(overrides), {"run.fresh=true"}));
    expect_same_run(files("features"), files("tower"), rounding());
  }
}

}  // namespace
}  // namespace megatron_cpp::step37
