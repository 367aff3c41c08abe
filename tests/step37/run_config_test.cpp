#include "step37/program/run_config.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "tests/support/environment.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp::step37 {
namespace {

namespace fs = std::filesystem;

/// Sizes that fit, without a key that isn't required.
constexpr std::string_view kSmallest =
    "data: {directory: pictures}\n"
    "model:\n"
    "  {hidden_size: 64, num_layers: 6, head_dim: 16, num_attention_heads: 4, num_sliding_attention_heads: 8,\n"
    "   num_query_groups: 2, ffn_hidden_size: 128, sliding_window: 32}\n"
    "vision: {image_size: 56, width: 32, layers: 1, heads: 2, mlp_width: 64}\n"
    "training: {steps: 10}\n";

/// On top of it.
const std::vector<std::string> kExperts = {"model.num_moe_experts=8", "model.moe_router_topk=3",
                                           "model.moe_ffn_hidden_size=48"};

class RunConfigTest : public ::testing::Test {
 protected:
  /// A file x.yaml that holds `text`.
  fs::path file(std::string_view text) const { return folder_.write("x.yaml", text); }
  RunConfig load(std::string_view text, const std::vector<std::string>& overrides = {}) const {
    return load_run_config(file(text), overrides);
  }
  RunConfig smallest(const std::vector<std::string>& overrides = {}) const { return load(kSmallest, overrides); }

  /// The message of the error that `body` ends in, without the folder's name.
  std::string error_of(const std::function<void()>& body) const {
    try {
      body();
    } catch (const c10::ValueError& error) {
      std::string message = error.what_without_backtrace();
      const auto prefix = folder_.path().string() + "/";
      for (auto at = message.find(prefix); at != std::string::npos; at = message.find(prefix)) {
        message.erase(at, prefix.size());
      }
      return message;
    }
    return "no error";
  }
  std::string load_error(std::string_view text, const std::vector<std::string>& overrides = {}) const {
    return error_of([&] { load(text, overrides); });
  }
  std::string override_error(const std::string& text) const { return load_error(kSmallest, {text}); }
  std::string validation_error(const std::vector<std::string>& overrides, int num_ranks = 2) const {
    std::vector<std::string> all{"parallel.tp=" + std::to_string(num_ranks)};
    all.insert(all.end(), overrides.begin(), overrides.end());
    return error_of([&] { validate(smallest(all), num_ranks); });
  }

  test_support::TemporaryFolder folder_;
};

std::vector<std::string> as_overrides(const RunConfig& config) {
  std::vector<std::string> result;
  for (const auto& [key, value] : settings(config)) result.push_back(key + "=" + value);
  return result;
}

TEST_F(RunConfigTest, KeysThatAreLeftOutHaveTheirDefaults) {
  const auto config = smallest();
  EXPECT_EQ(config.run.directory, "runs/x");
  EXPECT_FALSE(config.run.fresh);
  EXPECT_EQ(config.run.device, "auto");
  EXPECT_TRUE(config.parallel.sequence_parallel);
  EXPECT_EQ(config.parallel.projector_sharding, ProjectorSharding::kReplicated);
  EXPECT_EQ(config.parallel.exchange, InsertExchange::kFused);
  EXPECT_EQ(config.parallel.mm_encoder_tp_mode, MmEncoderTpMode::kData);
  EXPECT_EQ(config.data.directory, "pictures");
  EXPECT_EQ(config.model.rope_theta, 5e6);
  EXPECT_EQ(config.training.sequence_length, 2048);
  EXPECT_FALSE(config.validation.packs.has_value());
  EXPECT_EQ(config.parallel.tp, 1);
  EXPECT_EQ(config.training.micro_batch_size, 1);
  EXPECT_NO_THROW(validate(config, 1));
}

TEST_F(RunConfigTest, ValuesAreReadInYamlsWaysOfWritingThem) {
  const auto config = load(std::string(kSmallest) +
                           "run:\n"
                           "  directory: 'my runs: #1'   # quoted\n"
                           "  device: \"cpu\"\n"
                           "  fresh: true\n"
                           "checkpoint:\n"
                           "report: {pictures: 3}\n"
                           "validation: {packs: 7}\n"
                           "parallel: {exchange: all-gather, projector_sharding: column, sequence_parallel: false}\n");
  EXPECT_EQ(config.run.directory, "my runs: #1");
  EXPECT_EQ(config.run.device, "cpu");
  EXPECT_TRUE(config.run.fresh);
  EXPECT_EQ(config.report.pictures, 3);
  EXPECT_EQ(config.validation.packs, 7);
  EXPECT_EQ(config.parallel.exchange, InsertExchange::kAllGather);
  EXPECT_EQ(config.parallel.projector_sharding, ProjectorSharding::kColumn);
  EXPECT_FALSE(config.parallel.sequence_parallel);
}

TEST_F(RunConfigTest, BooleansAreThoseOfYamlsCoreSchema) {
  for (const std::string text : {"true", "True", "TRUE"}) {
    EXPECT_TRUE(load(std::string(kSmallest) + "run: {fresh: " + text + "}\n").run.fresh) << text;
    EXPECT_TRUE(smallest({"run.fresh=" + text}).run.fresh) << text;
  }
  for (const std::string text : {"false", "False", "FALSE"}) {
    EXPECT_FALSE(smallest({"parallel.sequence_parallel=" + text}).parallel.sequence_parallel) << text;
  }
  for (const std::string text : {"tRUE", "on", "y", "1"}) {
    EXPECT_EQ(override_error("run.fresh=" + text), "run.fresh in the override run.fresh=" + text +
                                                       " must be one of true, false, True, False, TRUE, FALSE, got " +
                                                       text);
  }
  EXPECT_EQ(settings(smallest({"run.fresh=TRUE"}))[1].second, "true");
}

TEST_F(RunConfigTest, OverridesReplaceTheFilesValuesAndTheLastOneHolds) {
  const auto config = smallest({"training.steps=20", "training.learning_rate=1e-3", "training.eps=.5",
                                "training.min_learning_rate=0", "training.steps=30", "data.directory=a=b \"c\" #d",
                                "data.crops=true", "validation.packs=all", "training.beta1=+0.5"});
  EXPECT_EQ(config.training.steps, 30);
  EXPECT_EQ(config.training.learning_rate, 1e-3);
  EXPECT_EQ(config.training.eps, 0.5);
  EXPECT_EQ(config.training.beta1, 0.5);
  EXPECT_EQ(config.training.min_learning_rate, 0.0);
  EXPECT_EQ(config.data.directory, "a=b \"c\" #d");
  EXPECT_TRUE(config.data.crops);
}

TEST_F(RunConfigTest, AnOverrideGivesARequiredKey) {
  EXPECT_EQ(load("model: {}\n", as_overrides(smallest({"model.num_layers=3"}))).model.num_layers, 3);
}

TEST_F(RunConfigTest, AnEmptyDirectoryMeansTheDefault) {
  EXPECT_EQ(smallest({"run.directory=elsewhere"}).run.directory, "elsewhere");
  EXPECT_EQ(smallest({"run.directory="}).run.directory, "runs/x");
}

TEST_F(RunConfigTest, SettingsReadBackToTheSameConfiguration) {
  auto config = smallest();
  config.run.directory = "runs/with spaces, 'quotes' = and # signs";
  config.run.fresh = true;
  config.parallel.projector_sharding = ProjectorSharding::kColumn;
  config.parallel.exchange = InsertExchange::kAllGather;
  config.parallel.mm_encoder_tp_mode = MmEncoderTpMode::kWeights;
  config.training.learning_rate = 0.1 + 0.2;
  config.training.eps = 1e-300;
  config.training.seed = INT64_MAX;
  config.validation.packs = 5;
  const auto again = load(kSmallest, as_overrides(config));
  EXPECT_EQ(settings(again), settings(config));
  EXPECT_EQ(again.training.learning_rate, 0.1 + 0.2);
  EXPECT_EQ(again.validation.packs, 5);
  EXPECT_EQ(again.run.directory, config.run.directory);
}

TEST_F(RunConfigTest, SettingsAloneMakeTheConfigurationAgain) {
  const auto config = smallest({"validation.packs=4", "training.eps=3e-7"});
  EXPECT_EQ(settings(run_config_from_settings(as_overrides(config))), settings(config));
  EXPECT_EQ(error_of([&] { run_config_from_settings({"training.step=5"}); }),
            "unknown key training.step in the override training.step=5; did you mean training.steps?");
}

TEST_F(RunConfigTest, SettingsAreInOrderAndReadable) {
  const auto all = settings(smallest());
  EXPECT_EQ(all.front(), (std::pair<std::string, std::string>("run.directory", "runs/x")));
  EXPECT_EQ(all.back(), (std::pair<std::string, std::string>("report.max_new_tokens", "32")));
  const auto has = [&](const std::string& key, const std::string& value) {
    return std::find(all.begin(), all.end(), std::pair(key, value)) != all.end();
  };
  EXPECT_TRUE(has("data.held_out", "0.05"));
  EXPECT_TRUE(has("model.rope_theta", "5e+06"));
  EXPECT_TRUE(has("parallel.exchange", "fused"));
  EXPECT_TRUE(has("validation.packs", "all"));
  EXPECT_TRUE(has("run.fresh", "false"));
}

TEST_F(RunConfigTest, ProfileIsAStepOrARange) {
  const std::string key = "run.profile";
  const auto profile = [&](const std::string& value) { return smallest({key + "=" + value}).run.profile; };
  const auto last = smallest({}).training.steps;
  EXPECT_EQ(smallest({}).run.profile, StepRange{});
  EXPECT_EQ(profile("none"), StepRange{});
  EXPECT_EQ(profile("1"), (StepRange{1, 1}));
  EXPECT_EQ(profile(fmt::format("1-{}", last)), (StepRange{1, last}));
  EXPECT_EQ(settings(load(kSmallest, as_overrides(smallest({key + "=1-1"})))), settings(smallest({key + "=1"})));
  for (const auto* wrong : {"some", "0", "2-1", "-1", "1-", "1-2-3"}) {
    EXPECT_EQ(override_error(key + "=" + wrong),
              fmt::format("{0} in the override {0}={1} must be none, a step as 3, or "
                          "steps as 3-5, got {1}",
                          key, wrong));
  }
  EXPECT_EQ(validation_error({fmt::format("{}={}", key, last + 1)}),
            fmt::format("{0} {1}: the run has {2} steps (training.steps)", key, last + 1, last));
}

// The default makes chunks of what parallel.tp leaves a rank of a large vocabulary.
TEST_F(RunConfigTest, LossChunkIsGivenOrChosenByTheVocabulary) {
  const std::string key = "training.loss_chunk";
  const auto chunk = [&](int64_t vocabulary_size, const std::vector<std::string>& overrides) {
    const auto config = smallest(overrides);
    EXPECT_EQ(settings(load(kSmallest, as_overrides(config))), settings(config));
    return model_config(config, vocabulary_size).execution.loss_chunk;
  };
  EXPECT_EQ(chunk(1000, {}), 0);
  EXPECT_EQ(chunk(128815, {}), 256);
  EXPECT_EQ(chunk(128815, {key + "=100", key + "=auto"}), 256);
  EXPECT_EQ(chunk(128815, {"tp=4"}), 1024);
  EXPECT_EQ(chunk(128815, {"tp=4", "training.sequence_length=1000"}), 0);
  EXPECT_EQ(chunk(128815, {"tp=4", "training.sequence_length=1000", "training.micro_batch_size=2"}), 1024);
  EXPECT_EQ(chunk(128815, {key + "=0"}), 0);
  EXPECT_EQ(chunk(1000, {key + "=100"}), 100);
  EXPECT_EQ(chunk(int64_t{1} << 30, {}), 64);
  EXPECT_EQ(override_error(key + "=some"),
            key + " in the override " + key + "=some must be an integer or auto, got some");
  EXPECT_EQ(validation_error({key + "=-1"}), key + " -1 is below 0");
}

TEST_F(RunConfigTest, RecomputedPartsAreNoneAllOrNamed) {
  const std::string key = "training.recompute";
  const auto read = [&](const std::string& value) {
    const auto config = smallest({key + "=" + value});
    EXPECT_EQ(settings(load(kSmallest, as_overrides(config))), settings(config));
    return config.training.recompute;
  };
  EXPECT_TRUE(read("full").full);
  const auto parts = read("tower,core_attention , mlp");
  EXPECT_TRUE(parts.tower && parts.core_attention && parts.mlp);
  EXPECT_FALSE(parts.full || parts.experts || parts.norms);
  const auto model = model_config(smallest({key + "=mlp, norms, tower"}), 100);
  EXPECT_EQ(model.execution.recomputed, (RecomputedParts{.mlp = true, .norms = true}));
  EXPECT_TRUE(model.recompute_tower);
  const auto full = model_config(smallest({key + "=full"}), 100);
  EXPECT_EQ(full.execution.recomputed, RecomputedParts{.layers = true});
  EXPECT_TRUE(full.recompute_tower);
  EXPECT_FALSE(model_config(smallest({key + "=full", key + "=none"}), 100).recompute_tower);

  for (const std::string wrong :
       {"", "layers", "mlp, mlp", "mlp tower", "mlp,", ", mlp", "full, mlp", "full, norms", "none, mlp"}) {
    EXPECT_EQ(override_error(key + "=" + wrong),
              key + " in the override " + key + "=" + wrong +
                  " must be none, full, or some of core_attention, mlp, experts, norms, tower, got " +
                  (wrong.empty() ? "nothing" : wrong));
  }
}

TEST_F(RunConfigTest, ScalesAreATextOrAMap) {
  const ParameterScales scales{{"vision_model", 0.1}, {"language_model.decoder", 2.0}};
  const std::string key = "training.learning_rate_scales";
  const auto of_override = smallest({key + "=vision_model: 0.1, language_model.decoder: 2"});
  EXPECT_EQ(of_override.training.learning_rate_scales, scales);
  EXPECT_TRUE(of_override.training.weight_decay_scales.empty());
  EXPECT_EQ(settings(load(kSmallest, as_overrides(of_override))), settings(of_override));
  EXPECT_TRUE(smallest({key + "=a: 1", key + "="}).training.learning_rate_scales.empty());
  auto text = std::string(kSmallest);
  text.replace(text.find("steps: 10"), 9,
               "steps: 10, weight_decay_scales: {language_model.decoder: 2, vision_model: 0.1}");
  EXPECT_EQ(load(text).training.weight_decay_scales, scales);

  for (const std::string wrong : {"a", "a:", "a: b", "a: 1 2", "a: 1, a: 2", ", a: 1", "a: nan", "\xe9: 1", " "}) {
    EXPECT_EQ(override_error(key + "=" + wrong), key + " in the override " + key + "=" + wrong +
                                                     " must be names with a factor each, as a: 0.1, b.c: 2, got " +
                                                     wrong);
  }
  EXPECT_EQ(load_error("training:\n  learning_rate_scales: {a: [1]}\n"),
            key + " in x.yaml:2 must be names with a factor each, as a: 0.1, b.c: 2, got a section");
  EXPECT_EQ(validation_error({key + "=a: -1"}), "the scale -1 of a is below 0");
}

TEST_F(RunConfigTest, UnknownNamesAreRefusedWithTheNearest) {
  EXPECT_EQ(load_error("data:\n  directory: d\ntraining:\n  step: 5\n"),
            "unknown key training.step in x.yaml:4; did you mean training.steps?");
  EXPECT_EQ(load_error("# first\ntrainig: {steps: 5}\n"),
            "unknown section trainig in x.yaml:2; did you mean training?");
  EXPECT_EQ(override_error("training.lerning_rate=1"),
            "unknown key training.lerning_rate in the override training.lerning_rate=1; did you mean "
            "training.learning_rate?");
  EXPECT_EQ(override_error("steps=5"), "unknown key steps in the override steps=5; did you mean training.steps?");
  EXPECT_EQ(override_error("=5"), "unknown key  in the override =5; did you mean parallel.tp?");
}

TEST_F(RunConfigTest, ValuesOfAnotherTypeAreRefused) {
  EXPECT_EQ(load_error("training:\n  steps: many\n"), "training.steps in x.yaml:2 must be an integer, got many");
  EXPECT_EQ(load_error("training:\n  steps: 1.5\n"), "training.steps in x.yaml:2 must be an integer, got 1.5");
  EXPECT_EQ(load_error("training:\n  steps: [5]\n"), "training.steps in x.yaml:2 must be an integer, got a list");
  EXPECT_EQ(load_error("training:\n  steps: {a: 5}\n"), "training.steps in x.yaml:2 must be an integer, got a section");
  EXPECT_EQ(load_error("training:\n  steps:\n"), "training.steps in x.yaml:2 must be an integer, got no value");
  EXPECT_EQ(load_error("data:\n  directory:\n"), "data.directory in x.yaml:2 must be text in UTF-8, got no value");
  EXPECT_EQ(override_error("data.directory=\xe9t\xe9"),
            "data.directory in the override data.directory=\xe9t\xe9 must be text in UTF-8, got \xe9t\xe9");
  EXPECT_EQ(override_error("training.steps="),
            "training.steps in the override training.steps= must be an integer, got nothing");
  EXPECT_EQ(override_error("training.steps=99999999999999999999"),
            "training.steps in the override training.steps=99999999999999999999 must be an integer, got "
            "99999999999999999999");
  EXPECT_EQ(override_error("training.eps=1e-3x"),
            "training.eps in the override training.eps=1e-3x must be a number, got 1e-3x");
  EXPECT_EQ(override_error("training.eps=nan"),
            "training.eps in the override training.eps=nan must be a number, got nan");
  EXPECT_EQ(override_error("run.fresh=yes"),
            "run.fresh in the override run.fresh=yes must be one of true, false, True, False, TRUE, FALSE, got yes");
  EXPECT_EQ(override_error("parallel.exchange=slow"),
            "parallel.exchange in the override parallel.exchange=slow must be one of fused, all-gather, got slow");
  EXPECT_EQ(
      override_error("parallel.mm_encoder_tp_mode=heads"),
      "parallel.mm_encoder_tp_mode in the override parallel.mm_encoder_tp_mode=heads must be one of data, weights, "
      "got heads");
  EXPECT_EQ(override_error("parallel.projector_sharding=rows"),
            "parallel.projector_sharding in the override parallel.projector_sharding=rows must be one of "
            "replicated, column, row, got rows");
  EXPECT_EQ(
      override_error("parallel.embedding_sharding=rows"),
      "parallel.embedding_sharding in the override parallel.embedding_sharding=rows must be one of vocab, hidden, got "
      "rows");
  EXPECT_EQ(override_error("training.not_finite=ignore"),
            "training.not_finite in the override training.not_finite=ignore must be one of stop, skip, got ignore");
  EXPECT_EQ(override_error("checkpoint.on_error=skip"),
            "checkpoint.on_error in the override checkpoint.on_error=skip must be one of stop, continue, got skip");
  EXPECT_EQ(override_error("training.learning_rate_decay=step"),
            "training.learning_rate_decay in the override training.learning_rate_decay=step must be one of cosine, "
            "linear, constant, wsd, got step");
  EXPECT_EQ(override_error("validation.packs=some"),
            "validation.packs in the override validation.packs=some must be an integer or all, got some");
}

TEST_F(RunConfigTest, AWrongValueInTheFileIsRefusedEvenIfItIsOverridden) {
  EXPECT_EQ(load_error("training: {steps: many}\n", {"training.steps=5"}),
            "training.steps in x.yaml:1 must be an integer, got many");
}

TEST_F(RunConfigTest, DuplicatesInTheFileAreRefused) {
  EXPECT_EQ(load_error("training:\n  steps: 1\n  seed: 2\n  steps: 3\n"),
            "training.steps in x.yaml:4 is already in x.yaml:2");
  EXPECT_EQ(load_error("training: {steps: 1}\nrun: {}\ntraining: {seed: 1}\n"),
            "section training in x.yaml:3 is already in x.yaml:1");
}

TEST_F(RunConfigTest, AnOverrideWithoutEqualsIsRefused) {
  EXPECT_EQ(override_error("training.steps"), "the override training.steps has no '=': expected section.key=value");
}

TEST_F(RunConfigTest, RequiredKeysAreNamed) {
  EXPECT_EQ(load_error(""), "x.yaml lacks model.hidden_size, which has no default");
}

TEST_F(RunConfigTest, DataSetsOfAFileAndAnOverride) {
  std::string file(kSmallest);
  file.replace(
      0, file.find('\n') + 1,
      "data:\n  sets:\n    stamps: {path: 'p: q', weight: 2}\n    ducks:\n      path: d\n      shuffle: false\n");
  const auto config = load(file);
  const DataSetSections expected{{"ducks", {.path = "d", .shuffle = false}}, {"stamps", {.path = "p: q", .weight = 2}}};
  EXPECT_EQ(config.data.sets, expected);
  EXPECT_EQ(to_text(config.data.sets),
            "{ducks: {kind: captions, path: d, shuffle: false}, stamps: {kind: captions, path: \"p: q\", weight: 2}}");
  EXPECT_EQ(data_sets_from_text(to_text(config.data.sets)), expected);
  EXPECT_NO_THROW(validate(config, 1));
  EXPECT_EQ(load(file, {"data.sets={a: {path: b}}"}).data.sets, (DataSetSections{{"a", {.path = "b"}}}));
  EXPECT_TRUE(load(file, {"data.sets="}).data.sets.empty());
}

TEST_F(RunConfigTest, WrongDataSetsAreRefused) {
  const auto error = [&](const std::string& sets) { return override_error("data.sets=" + sets); };
  const auto expect = [&](const std::string& sets, const std::string& reason) {
    const auto text = error(sets);
    EXPECT_NE(text.find("data sets by name (" + reason), std::string::npos) << text;
  };
  expect("{a: {kind: captions}}", "the data set a lacks path");
  expect("{a: {kind: caption, path: b}}",
         "the data set a: kind must be one of captions, conversations, tokens, webdataset, indexed, flickr8k, got "
         "caption");
  expect("{a: {path: b, wieght: 1}}",
         "the data set a of kind captions has no key wieght: there are kind, path, weight, shuffle");
  expect("{a: {path: b, weight: -1}}", "the data set a: weight -1 is negative");
  expect("{a: {path: b, weight: much}}", "the data set a: weight must be a number, got much");
  expect("{a: {path: b, path: c}}", "the data set a: the key path is given twice");
  expect("{a: {path: b}, a: {path: c}}", "the data set a is given twice");
  expect("{a b: {path: b}}", "the name 'a b' of a data set has other characters");
  expect("{a: b}", "the data set a must hold keys");
  expect("b", "names are missing");
  expect("{a: [", "not YAML");
  EXPECT_EQ(validation_error({"data.sets={a: {path: b}}"}),
            "data.directory and data.sets are both given: a run needs one of them");
  EXPECT_EQ(validation_error({"data.directory=", "data.sets={a: {path: b, weight: 0}}"}),
            "the weights of data.sets are all 0");
  EXPECT_NE(validation_error({"data.directory=", "data.sets={a: {path: ~/b}}"}).find("the path of the data set a"),
            std::string::npos);
}

TEST_F(RunConfigTest, FilesThatArentConfigurationsAreRefused) {
  const auto missing = error_of([&] { load_run_config(folder_.path() / "y.yaml"); });
  EXPECT_EQ(missing, "can't read the configuration y.yaml: No such file or directory");
  fs::create_directory(folder_.path() / "z.yaml");
  EXPECT_EQ(error_of([&] { load_run_config(folder_.path() / "z.yaml"); }),
            "can't read the configuration z.yaml: Is a directory");
  const auto syntax = load_error("training:\n  steps: [1\nrun: 2\n");
  EXPECT_EQ(syntax.find("x.yaml:3: not YAML: "), 0U) << syntax;
  EXPECT_EQ(load_error("- 1\n- 2\n").find("x.yaml:1: not a configuration"), 0U);
  EXPECT_EQ(load_error("\ntraining: 5\n").find("section training in x.yaml:2 must hold keys"), 0U);
  EXPECT_EQ(load_error("[1, 2]: 5\n"), "x.yaml:1: a name that isn't plain text");
  EXPECT_EQ(load_error("run: {\"fre\\0sh\": true}\n"), "x.yaml:1: a name that isn't plain text");
  EXPECT_EQ(load_error("run: {}\n---\nrun: {}\n"), "x.yaml:2: a second YAML document, or something out of place");
  EXPECT_EQ(load_error("{run: {}}\n,\n"), "x.yaml:2: a second YAML document, or something out of place");
}

TEST_F(RunConfigTest, RanksAreSplitIntoTensorTimesData) {
  const auto grid = [&](const std::vector<std::string>& sizes, int num_ranks) {
    const auto result = rank_grid(smallest(sizes), num_ranks);
    EXPECT_NO_THROW(result.validate(num_ranks));
    return std::pair(result.tp, result.dp);
  };
  EXPECT_EQ(grid({}, 4), std::pair(1, 4));
  EXPECT_EQ(grid({"parallel.tp=0"}, 4), std::pair(4, 1));
  EXPECT_EQ(grid({"parallel.tp=2"}, 4), std::pair(2, 2));
  EXPECT_EQ(grid({"parallel.tp=0", "parallel.dp=4"}, 4), std::pair(1, 4));
  EXPECT_EQ(grid({"parallel.tp=1", "parallel.dp=3"}, 3), std::pair(1, 3));
  const auto error = [&](const std::vector<std::string>& sizes, int num_ranks) {
    return error_of([&] { grid(sizes, num_ranks); });
  };
  EXPECT_EQ(error({"parallel.tp=2", "parallel.dp=3"}, 4),
            "4 ranks are not parallel.tp 2 x parallel.dp 3: start as many, or set parallel.tp=2 and leave parallel.dp "
            "out");
  EXPECT_EQ(error({"parallel.tp=2"}, 1),
            "1 rank is not parallel.tp 2 x parallel.dp 1: start as many, or set parallel.tp=1 and leave parallel.dp "
            "out");
  EXPECT_EQ(error({"parallel.tp=6"}, 4),
            "4 ranks are not parallel.tp 6 x parallel.dp 1: start as many, or set parallel.tp=2 and leave parallel.dp "
            "out");
  EXPECT_EQ(validation_error({"parallel.tp=-1"}), "parallel.tp -1 is below 0");
  EXPECT_EQ(error({"parallel.cp=2"}, 4), "parallel.cp 2: context parallelism is not there yet");
  EXPECT_EQ(error({"parallel.pp=2"}, 4), "parallel.pp 2: pipeline parallelism is not there yet");
  EXPECT_EQ(error({"parallel.ep=4"}, 4), "parallel.ep 4: the model has no experts to split over ranks");
  // A checkpoint of a version that wrote etp 1 and knew no experts.
  EXPECT_FALSE(rank_grid(smallest({"parallel.tp=2", "parallel.etp=1"}), 2).etp.has_value());
  EXPECT_EQ(run_config_from_settings({"parallel.tp=2", "parallel.ep=1", "parallel.etp=1"}).parallel.etp, 1);
}

TEST_F(RunConfigTest, ExpertsAreSplitOverTheRanks) {
  const auto grid = [&](const std::vector<std::string>& sizes, int num_ranks) {
    auto all = kExperts;
    all.insert(all.end(), sizes.begin(), sizes.end());
    const auto result = rank_grid(smallest(all), num_ranks);
    return std::tuple(result.tp, result.dp, result.ep, result.expert_tp());
  };
  EXPECT_EQ(grid({}, 4), std::tuple(1, 4, 1, 1));
  EXPECT_EQ(grid({"parallel.tp=4"}, 8), std::tuple(4, 2, 1, 4));
  EXPECT_EQ(grid({"parallel.tp=4", "parallel.ep=2"}, 8), std::tuple(4, 2, 2, 2));
  EXPECT_EQ(grid({"parallel.tp=4", "parallel.ep=8"}, 8), std::tuple(4, 2, 8, 1));
  EXPECT_EQ(grid({"parallel.tp=4", "parallel.ep=4", "parallel.etp=2"}, 8), std::tuple(4, 2, 4, 2));
  EXPECT_EQ(grid({"tp=4", "ep=2", "etp=1", "dp=2"}, 8), std::tuple(4, 2, 2, 1));
  EXPECT_EQ(error_of([&] { grid({"ep=3"}, 4); }), "parallel.ep 3 x parallel.etp 1 does not divide 4 ranks");
  EXPECT_EQ(error_of([&] {
              grid({"ep=2147483647", "etp=2147483647"}, 1);
            }),
            "parallel.ep 2147483647 x parallel.etp 2147483647 does not divide 1 rank");
}

TEST_F(RunConfigTest, KeysMakeAMixtureOfExperts) {
  auto keys = kExperts;
  keys.insert(keys.end(),
              {"model.moe_first_layer=2", "model.moe_shared_expert_intermediate_size=24",
               "model.moe_router_topk_scaling_factor=3", "model.moe_router_in_float32=false",
               "model.freeze_router=true", "model.moe_aux_loss_coeff=0.01", "model.moe_group_balance_loss_coeff=0.02",
               "model.moe_group_balance_groups=4", "model.moe_z_loss_coeff=0.03"});
  const auto config = smallest(keys);
  const auto text = model_config(config, 77).text;
  EXPECT_EQ(text.moe, (MoEConfig{.num_experts = 8,
                                 .router_topk = 3,
                                 .ffn_hidden_size = 48,
                                 .shared_expert_ffn_hidden_size = 24,
                                 .router_scaling_factor = 3.0,
                                 .router_in_float32 = false,
                                 .freeze_router = true,
                                 .aux_loss_coeff = 0.01,
                                 .group_balance_loss_coeff = 0.02,
                                 .group_balance_groups = 4,
                                 .z_loss_coeff = 0.03}));
  for (size_t layer = 0; layer < 6; ++layer) EXPECT_EQ(text.layers[layer].has_experts, layer >= 2) << layer;
  EXPECT_NO_THROW(validate(config, 1));
  EXPECT_EQ(settings(load(kSmallest, as_overrides(config))), settings(config));
  EXPECT_FALSE(model_config(smallest(), 77).text.moe.has_value());
  const auto error = [&](const std::string& key) {
    auto all = kExperts;
    all.push_back(key);
    return validation_error(all);
  };
  EXPECT_EQ(error("model.moe_first_layer=6"), "model.moe_first_layer 6 is not below model.num_layers 6");
  EXPECT_EQ(error("model.moe_router_topk=9"), "router_topk 9 is not between 1 and num_experts 8");
  EXPECT_EQ(error("model.moe_ffn_hidden_size=0"), "the experts' ffn_hidden_size 0 is not positive");
  EXPECT_EQ(error("model.num_moe_experts=-1"), "model.num_moe_experts -1 is below 0");
  EXPECT_EQ(error("model.moe_group_balance_groups=0"), "model.moe_group_balance_groups 0 is below 1");
  EXPECT_EQ(error("model.moe_group_balance_groups=3"), "moe_group_balance_groups 3 does not divide num_experts 8");
  for (const std::string key : {"model.moe_aux_loss_coeff", "model.moe_group_balance_loss_coeff",
                                "model.moe_z_loss_coeff", "model.moe_router_bias_update_rate"}) {
    EXPECT_EQ(error(key + "=-0.5"), key.substr(6) + " -0.5 is negative");
    EXPECT_EQ(validation_error({key + "=0.5"}), key + " 0.5: the model has no experts");
  }
  const std::string rate = "model.moe_router_bias_update_rate=0.5";
  EXPECT_EQ(model_config(smallest({kExperts[0], kExperts[1], kExperts[2], rate}), 77).text.moe->router_bias_update_rate,
            0.5);
  EXPECT_EQ(validation_error({kExperts[0], kExperts[1], kExperts[2], rate, "model.freeze_language_model=true"}),
            "model.moe_router_bias_update_rate 0.5 would change the frozen language model "
            "(model.freeze_language_model)");
  EXPECT_EQ(validation_error({kExperts[0], kExperts[1], kExperts[2], rate, "model.freeze_router=true"}),
            "moe_router_bias_update_rate 0.5 would change the correction bias of a frozen router");
}

TEST_F(RunConfigTest, ShortFormsAreForTheCommandLine) {
  EXPECT_EQ(smallest({"tp=2", "parallel.tp=4"}).parallel.tp, 4);
  EXPECT_EQ(smallest({"parallel.tp=2", "tp=4", "dp=3", "cp=5", "pp=6", "ep=7", "etp=8"}).parallel.tp, 4);
  EXPECT_TRUE(smallest({"tp=2"}).warnings.empty());
  EXPECT_EQ(override_error("tp=x"), "parallel.tp in the override tp=x must be an integer, got x");
  EXPECT_EQ(load_error("tp: {a: 1}\n").find("unknown section tp in x.yaml:1"), 0U);
}

TEST_F(RunConfigTest, APublishedConfigGivesTheShape) {
  const auto json = test_support::cases() / "../../configs/step37_flash.json";
  std::filesystem::copy_file(json, folder_.path() / "shape.json");
  const std::string text = "data: {directory: d}\ntraining: {steps: 1}\nmodel: {config: shape.json}\n";
  const auto config = load(text, {"model.freeze_router=true", "vision.freeze=true"});
  EXPECT_EQ(config.model.config, (std::filesystem::absolute(folder_.path()) / "shape.json").string());
  EXPECT_EQ(config.vision.width, 1536);
  EXPECT_EQ(crop_options(config).global_side, 728);
  const auto model = model_config(config, 77);
  EXPECT_EQ(model.text.vocabulary_size, 128815);
  EXPECT_EQ(model.text.num_layers(), 45);
  EXPECT_EQ(model.text.moe->num_experts, 288);
  EXPECT_TRUE(model.text.moe->freeze_router);
  EXPECT_TRUE(model.freeze_vision_model);
  EXPECT_NO_THROW(validate(config, 1));

  // Settings name the file, so they have no keys of the shape.
  const auto again = run_config_from_settings(as_overrides(config), config.published_form);
  EXPECT_EQ(settings(again), settings(config));
  EXPECT_EQ(model_config(again, 77).text, model.text);
  for (const auto& [key, value] : settings(config)) EXPECT_NE(key, "model.hidden_size");

  EXPECT_EQ(load_error(text, {"model.hidden_size=64"}),
            "model.hidden_size in the override model.hidden_size=64 is a part of the shape, which model.config in "
            "x.yaml:3 gives: leave one of them out");
  EXPECT_EQ(load_error(text + "vision:\n  width: 64\n"),
            "vision.width in x.yaml:5 is a part of the shape, which model.config in x.yaml:3 gives: leave one of them "
            "out");
  const auto missing = load_error(text, {"model.config=none.json"});
  EXPECT_EQ(missing.find("model.config in the override model.config=none.json: "), 0U) << missing;
  EXPECT_NE(missing.find((std::filesystem::current_path() / "none.json").string()), std::string::npos) << missing;
  EXPECT_EQ(load_error(text, {"model.config="}), "x.yaml lacks model.hidden_size, which has no default");
  EXPECT_EQ(error_of([&] { validate(load(text, {"data.vocabulary_size=128816"}), 1); }),
            "data.vocabulary_size 128816 is above the vocabulary of shape.json");
}

TEST_F(RunConfigTest, OldNamesOfKeysAreTakenWithAWarning) {
  const auto config = load(std::string(kSmallest) + "parallel: {tensor: 2, data: 3}\n",
                           {"training.global_batch=5", "training.global_batch=6"});
  EXPECT_EQ(config.parallel.tp, 2);
  EXPECT_EQ(config.parallel.dp, 3);
  EXPECT_EQ(config.training.global_batch_size, 6);
  ASSERT_EQ(config.warnings.size(), 3U);
  EXPECT_TRUE(config.warnings[0].ends_with("x.yaml:7 is now called parallel.tp")) << config.warnings[0];
  EXPECT_TRUE(config.warnings[1].starts_with("parallel.data in /")) << config.warnings[1];
  EXPECT_EQ(config.warnings[2],
            "training.global_batch in the override training.global_batch=6 is now called training.global_batch_size");
  EXPECT_TRUE(smallest({"parallel.tp=2"}).warnings.empty());
  EXPECT_EQ(run_config_from_settings({"parallel.tensor=2", "parallel.data=0"}).parallel.tp, 2);
  EXPECT_EQ(override_error("parallel.tensor=x"),
            "parallel.tp in the override parallel.tensor=x must be an integer, got x");
}

TEST_F(RunConfigTest, OneKeyUnderTwoNamesIsRefusedInOnePlace) {
  EXPECT_EQ(load_error("parallel:\n  tp: 2\n  tensor: 2\n"),
            "parallel.tp in x.yaml:2 and parallel.tensor in x.yaml:3 are two names of one key: give parallel.tp alone");
  EXPECT_EQ(load_error(kSmallest, {"parallel.data=2", "parallel.dp=2"}),
            "parallel.data in the override parallel.data=2 and parallel.dp in the override parallel.dp=2 are two names "
            "of one key: give parallel.dp alone");
  const auto text = std::string(kSmallest);
  EXPECT_EQ(load(text + "parallel: {tp: 2}\n", {"parallel.tensor=1"}).parallel.tp, 1);
  EXPECT_EQ(load(text + "parallel: {tensor: 2}\n", {"parallel.tp=1"}).parallel.tp, 1);
}

TEST_F(RunConfigTest, TheModelHasFullAttentionInEveryKthLayer) {
  const auto model = model_config(smallest({"model.full_attention_interval=3"}), 77);
  EXPECT_EQ(model.text.vocabulary_size, 77);
  EXPECT_TRUE(model.execution.accumulate_into_grad);
  EXPECT_TRUE(model.execution.sequence_parallel);
  ASSERT_EQ(model.text.num_layers(), 6);
  for (size_t layer = 0; layer < 6; ++layer) {
    const auto& attention = model.text.layers[layer];
    const bool full = layer == 0 || layer == 3;
    EXPECT_EQ(attention.num_attention_heads, full ? 4 : 8) << layer;
    EXPECT_EQ(attention.sliding_window, full ? 0 : 32) << layer;
    EXPECT_EQ(attention.rope_theta, full ? 5e6 : 1e4) << layer;
    EXPECT_EQ(attention.partial_rotary_factor, full ? 0.5 : 1.0) << layer;
  }
  EXPECT_EQ(model.vision.image_size, 56);
  EXPECT_EQ(model.vision.mlp_width, 64);
  const auto frozen = model_config(
      smallest({"vision.freeze=true", "model.freeze_language_model=true", "parallel.exchange=all-gather"}), 77);
  EXPECT_TRUE(frozen.freeze_vision_model);
  EXPECT_TRUE(frozen.freeze_language_model);
  EXPECT_FALSE(frozen.freeze_projector);
  EXPECT_EQ(frozen.exchange, InsertExchange::kAllGather);
}

TEST_F(RunConfigTest, KeysMakeLayersOfMultiTokenPrediction) {
  const std::vector<std::string> two{"model.mtp_num_layers=2", "model.num_moe_experts=8",
                                     "model.moe_ffn_hidden_size=48"};
  const auto frozen = model_config(smallest(two), 77);
  ASSERT_EQ(frozen.text.mtp_layers.size(), 2U);
  for (const auto& layer : frozen.text.mtp_layers) {
    auto sliding = frozen.text.layers[1];
    EXPECT_TRUE(std::exchange(sliding.has_experts, false));
    EXPECT_EQ(layer, sliding);
  }
  EXPECT_FALSE(frozen.trains_mtp());
  EXPECT_TRUE(frozen.auxiliary_losses().empty());
  EXPECT_FALSE(frozen.text.mtp_chain_after_norm);
  auto overrides = two;
  overrides.insert(overrides.end(), {"model.mtp_loss_scaling_factor=0.25", "model.mtp_chain_after_norm=true"});
  const auto trained = model_config(smallest(overrides), 77);
  EXPECT_EQ(trained.mtp_loss_scaling_factor, 0.25);
  EXPECT_EQ(trained.auxiliary_losses(), std::vector<std::string>{"mtp_loss"});
  EXPECT_TRUE(trained.text.mtp_chain_after_norm);

  EXPECT_EQ(validation_error({"model.mtp_num_layers=-1"}), "model.mtp_num_layers -1 is below 0");
  EXPECT_EQ(validation_error({"model.mtp_num_layers=1", "model.mtp_loss_scaling_factor=-0.5"}),
            "mtp_loss_scaling_factor -0.5 is negative");
  EXPECT_EQ(validation_error({"model.mtp_loss_scaling_factor=0.5"}),
            "mtp_loss_scaling_factor 0.5: the model has no layers of multi-token prediction to train");
  EXPECT_EQ(validation_error(
                {"model.mtp_num_layers=1", "model.mtp_loss_scaling_factor=0.5", "model.freeze_language_model=true"}),
            "mtp_loss_scaling_factor 0.5 trains layers that freeze_language_model freezes: set one of the two");
}

// The layers that a config.json alone announces are there if they are trained.
TEST_F(RunConfigTest, APublishedConfigAnnouncesMultiTokenPrediction) {
  fs::copy_file(test_support::cases() / "../../configs/step37_flash.json", folder_.path() / "shape.json");
  const auto released = [&](const std::vector<std::string>& overrides) {
    return load("data: {directory: none}\nmodel: {config: shape.json}\ntraining: {steps: 1}\n", overrides);
  };
  EXPECT_TRUE(model_config(released({}), 77).text.mtp_layers.empty());
  const auto trained = model_config(released({"model.mtp_loss_scaling_factor=0.3"}), 77);
  ASSERT_EQ(trained.text.mtp_layers.size(), 3U);
  EXPECT_EQ(trained.text.mtp_layers[0].sliding_window, 512);
  EXPECT_NE(error_of([&] { released({"model.mtp_num_layers=1"}); }).find("is a part of the shape"), std::string::npos);
}

TEST_F(RunConfigTest, OptionsOfTheOtherPartsAreTheConfigurations) {
  const auto config =
      smallest({"training.learning_rate=0.5", "training.min_learning_rate=0.25", "training.warmup_steps=4",
                "training.beta2=0.75", "data.crops=true", "data.crop_side=28"});
  EXPECT_EQ(learning_rate_schedule(config).at(4), 0.5);
  EXPECT_EQ(learning_rate_schedule(config).at(10), 0.25);
  const auto wsd = learning_rate_schedule(smallest({"training.learning_rate_decay=wsd", "training.decay_steps=3"}));
  EXPECT_EQ(wsd.decay, LearningRateDecay::kWsd);
  EXPECT_EQ(wsd.at(7), 1e-3);
  EXPECT_LT(wsd.at(8), 1e-3);
  EXPECT_EQ(config.training.beta2, 0.75);
  EXPECT_EQ(crop_options(config).global_side, 56);
  EXPECT_EQ(crop_options(config).crop_side, 28);
  EXPECT_EQ(crop_options(smallest()).crop_side, 56);
}

TEST_F(RunConfigTest, WhatDoesntFitIsRefusedWithTheNumbers) {
  EXPECT_EQ(validation_error({}), "no error");
  EXPECT_EQ(validation_error({"parallel.tp=3"}),
            "2 ranks are not parallel.tp 3 x parallel.dp 1: start as many, or set parallel.tp=1 and leave parallel.dp "
            "out");
  for (const char* sharding : {"replicated", "column", "row"}) {
    EXPECT_EQ(validation_error({std::string("parallel.projector_sharding=") + sharding}), "no error");
  }
  EXPECT_EQ(validation_error({"parallel.embedding_sharding=hidden"}), "no error");
  for (const char* other : {"parallel.projector_sharding=row", "parallel.exchange=all-gather"}) {
    EXPECT_EQ(
        validation_error({"parallel.embedding_sharding=hidden", other}),
        "a hidden-parallel embedding goes with a column-sharded or a replicated projector and the fused exchange");
  }
  EXPECT_EQ(validation_error({"parallel.tp=1", "training.global_batch_size=3"}),
            "training.global_batch_size 3 is not divisible by training.micro_batch_size 1 x data-parallel size 2");
  EXPECT_EQ(validation_error({"training.global_batch_size=6", "training.micro_batch_size=4"}),
            "training.global_batch_size 6 is not divisible by training.micro_batch_size 4 x data-parallel size 1");
  EXPECT_EQ(validation_error({"training.micro_batch_size=0"}), "training.micro_batch_size 0 is below 1");
  EXPECT_EQ(validation_error({"data.held_out=1"}), "data.held_out 1 is not in [0, 1)");
  EXPECT_EQ(validation_error({"data.features=somewhere"}),
            "data.features somewhere has features of a frozen vision tower, and vision.freeze is false");
  EXPECT_EQ(validation_error({"data.directory="}),
            "data.directory and data.sets are both empty: a run needs one of them");
  EXPECT_EQ(validation_error({"training.steps=0"}), "training.steps 0 is below 1");
  EXPECT_EQ(validation_error({"checkpoint.keep=0"}), "checkpoint.keep 0 is below 1");
  EXPECT_EQ(validation_error({"validation.packs=0"}), "validation.packs 0 is below 1");
  EXPECT_EQ(validation_error({"run.device=tpu"}), "run.device tpu is not one of auto, cpu, cuda");
  EXPECT_EQ(validation_error({"training.clip_grad_norm=-1"}), "training.clip_grad_norm -1 is negative");
  EXPECT_EQ(validation_error({"training.loss_spike=-1"}), "training.loss_spike -1 is negative");
  EXPECT_EQ(validation_error({"training.max_skipped_steps=-1"}), "training.max_skipped_steps -1 is below 0");
  EXPECT_EQ(validation_error({"training.main_gradients=bfloat16"}),
            "training.main_gradients bfloat16 goes with training.precision bfloat16: gradients of float32 parameters "
            "are float32");
  EXPECT_EQ(validation_error({"training.recompute=experts"}), "training.recompute experts: the model has no experts");
  EXPECT_EQ(validation_error({"training.recompute=tower", "vision.freeze=true"}),
            "training.recompute tower: the vision tower is frozen (vision.freeze) and keeps nothing");
  EXPECT_EQ(validation_error({"training.recompute=full", "vision.freeze=true"}), "no error");
  EXPECT_EQ(validation_error({"training.sequence_length=33"}),
            "training.sequence_length 33 is not divisible by tensor-parallel size 2");
  EXPECT_EQ(validation_error({"training.sequence_length=33", "parallel.sequence_parallel=false"}), "no error");
  EXPECT_EQ(validation_error({"training.sequence_length=4"}),
            "training.sequence_length 4 has no room for a caption: a picture of 56 pixels takes 4 positions");
  EXPECT_EQ(validation_error({"training.sequence_length=6"}), "no error");
  EXPECT_EQ(validation_error({"model.num_layers=0"}), "model.num_layers 0 is below 1");
  EXPECT_EQ(validation_error({"model.num_layers=1000000000"}), "model.num_layers 1000000000 is above 10000");
  EXPECT_EQ(validation_error({"vision.width=9223372036854775776"}),
            "vision.width 9223372036854775776 is above 2147483647");
  EXPECT_EQ(validation_error({"training.seed=9223372036854775807"}), "no error");
  EXPECT_EQ(validation_error({"model.full_attention_interval=0"}), "model.full_attention_interval 0 is below 1");
  EXPECT_EQ(validation_error({"model.ffn_hidden_size=127"}),
            "ffn_hidden_size 127 is not divisible by tensor-parallel size 2");
  EXPECT_EQ(validation_error({"vision.image_size=57"}), "vision image_size 57 is not a multiple of patch_size 14");
  EXPECT_EQ(validation_error({"data.crops=true", "data.crop_side=30"}),
            "crop_side 30 isn't a positive multiple of vision_patch_size 14");
  EXPECT_EQ(validation_error({"data.crop_side=30"}), "no error");
  EXPECT_EQ(validation_error({"training.min_learning_rate=1"}), "minimum learning rate 1 is not in [0, 0.001]");
  EXPECT_EQ(validation_error({"training.learning_rate_decay=wsd"}),
            "decay_steps 0 is not in [1, 10], the steps after the warm-up");
  EXPECT_EQ(validation_error({"training.decay_steps=4"}), "decay_steps 4 needs the decay wsd");
  EXPECT_EQ(validation_error({"training.decay_steps=-1"}), "training.decay_steps -1 is below 0");
  EXPECT_EQ(validation_error({"training.beta1=1"}), "beta1 1 is not in [0, 1)");
}

TEST(ShippedConfigurations, AreValidForTheRanksTheyAreWrittenFor) {
  const auto file = test_support::cases() / "../../configs/tuxpaint.yaml";
  const auto tuxpaint = load_run_config(file);
  EXPECT_EQ(tuxpaint.run.directory, "runs/tuxpaint");
  for (const int num_ranks : {2, 4}) EXPECT_NO_THROW(validate(tuxpaint, num_ranks)) << num_ranks;
  for (const int tp : {1, 2, 4}) {
    EXPECT_NO_THROW(validate(load_run_config(file, {"parallel.tp=" + std::to_string(tp)}), tp)) << tp;
  }
  const auto released = load_run_config(test_support::cases() / "../../configs/step37_flash.yaml");
  EXPECT_NO_THROW(validate(released, 64));
}

}  // namespace
}  // namespace megatron_cpp::step37
