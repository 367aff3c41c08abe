// `step37 convert` on the golden models, called in this process on all ranks.
#include "step37/program/convert.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "megatron_cpp/checkpoint/sharded_checkpoint.h"
#include "parallel/collectives.h"
#include "step37/checkpoint_names.h"
#include "step37/published_checkpoint.h"
#include "step37/step37_model.h"
#include "tests/step37/published_models.h"
#include "tests/support/errors.h"
#include "tests/support/live_bytes.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::step37 {
namespace {

namespace fs = std::filesystem;
using namespace test_support;
using nlohmann::json;
using published_models::Tensors;
using published_models::tensors_of;

json json_of(const fs::path& file) {
  std::ifstream stream(file);
  return json::parse(stream);
}

/// Of all files of a published checkpoint.
Tensors weights_of(const fs::path& folder) {
  if (fs::exists(folder / "model.safetensors")) return tensors_of(folder / "model.safetensors");
  Tensors all;
  const auto index = json_of(folder / "model.safetensors.index.json");
  for (const auto& [name, file] : index.at("weight_map").items()) {
    all[name] = SafetensorsFile(folder / file.get<std::string>()).read(name);
  }
  return all;
}

class Convert : public published_models::PublishedModels {
 protected:
  void convert(const fs::path& from, const fs::path& to, ConvertArguments arguments = {}) const {
    parallel::barrier(world_tp());
    arguments.from = from;
    arguments.to = to;
    EXPECT_EQ(step37::convert(runtime(), arguments), 0);
    parallel::barrier(world_tp());
  }
  std::string error(const ConvertArguments& arguments) const {
    const auto message = message_of([&] { step37::convert(runtime(), arguments); });
    EXPECT_TRUE(on_all_ranks(!message.empty()));
    return message;
  }
  fs::path at(const std::string& name) const { return folder_.path() / name; }
};

/// The same names, dtypes, shapes and bits.
void expect_same_weights(const Tensors& actual, const Tensors& expected, const std::string& what) {
  EXPECT_EQ(actual.size(), expected.size()) << what;
  for (const auto& [name, tensor] : expected) {
    const auto found = actual.find(name);
    ASSERT_NE(found, actual.end()) << what << ": " << name;
    EXPECT_EQ(found->second.scalar_type(), tensor.scalar_type()) << what << ": " << name;
    ASSERT_EQ(found->second.sizes(), tensor.sizes()) << what << ": " << name;
    const auto bytes = [](const at::Tensor& x) { return x.contiguous().view({-1}).view(at::kByte); };
    EXPECT_TRUE(at::equal(bytes(found->second), bytes(tensor))) << what << ": " << name;
  }
}

// wide has a multi-token-prediction layer.
TEST_F(Convert, ThereAndBackIsBitForBit) {
  for (const std::string name : {"base", "bias_crop", "rope_shared", "wide"}) {
    convert(model_path(name), at(name + "_run"));
    convert(at(name + "_run"), at(name), {.max_shard_size = 100'000});
    expect_same_weights(weights_of(at(name)), weights_of(model_path(name)), name);
    const auto crops = json_of(at(name) / "preprocessor_config.json");
    EXPECT_EQ(crops.at("size").at("height"), read_published_config(at(name) / "config.json").vision.image_size);
    EXPECT_FALSE(crops.contains("enable_patch"));
    const auto index = json_of(at(name) / "model.safetensors.index.json");
    int64_t bytes = 0;
    for (const auto& [tensor_name, tensor] : weights_of(at(name))) bytes += static_cast<int64_t>(tensor.nbytes());
    EXPECT_EQ(index.at("metadata").at("total_size"), bytes);
    for (const auto& entry : fs::directory_iterator(at(name))) {
      if (entry.path().extension() != ".safetensors") continue;
      EXPECT_EQ(SafetensorsFile(entry.path()).metadata().at("format"), "pt") << entry.path();
      EXPECT_LE(fs::file_size(entry.path()), 300'000U) << entry.path();  // the largest tensor has 294,912 bytes
    }
  }
}

// A zero below 0 and infinities, too; and dtypes of single tensors, as the released model has them.
TEST_F(Convert, EveryBitAndDtypeStays) {
  auto config = json_of(model_path("wide") / "config.json");
  config["torch_dtype"] = "bfloat16";
  const auto from = changed_model("wide", [](Tensors& tensors) {
    for (auto& [name, tensor] : tensors) {
      if (name.find("router_bias") == std::string::npos) tensor = tensor.to(at::kBFloat16);
    }
    auto row = tensors["lm_head.weight"][0];
    row[0] = -0.0;
    row[1] = -std::numeric_limits<float>::infinity();
  });
  on_main([&] { test_support::write_file(from / "config.json", config.dump()); });
  convert(from, at("run"));
  convert(at("run") / "checkpoints" / "latest", at("back"));
  expect_same_weights(weights_of(at("back")), weights_of(from), "bfloat16");
  EXPECT_EQ(json_of(at("back") / "config.json"), config);
}

TEST_F(Convert, WritesTheHubFormOfTheConfiguration) {
  for (const std::string name : {"base", "rope_shared"}) {
    convert(model_path(name), at(name), {.layout = "published"});  // from transformers' form
    const auto written = json_of(at(name) / "config.json");
    EXPECT_TRUE(written.at("text_config").contains("moe_layers_enum"));
    EXPECT_FALSE(written.at("text_config").contains("rope_parameters"));
    EXPECT_EQ(read_published_config(at(name) / "config.json"), read_published_config(model_path(name) / "config.json"));
    EXPECT_TRUE(fs::exists(at(name) / "generation_config.json"));
  }
}

// A run keeps the form, and must make the same model of it, whatever config.json says of parts that the weights lack.
TEST_F(Convert, TheFormGivesTheModelOfTheWeights) {
  const auto without_norms = changed_model("wide", [](Tensors& tensors) {
    std::erase_if(tensors, [](const auto& entry) {
      return entry.first.find("q_norm") != std::string::npos || entry.first.find("k_norm") != std::string::npos;
    });
  });
  on_main([&] {
    fs::create_directories(at("shape"));
    fs::copy_file(model_path("wide") / "config.json", at("shape") / "config.json");
  });
  for (const auto& folder :
       {model_path("base"), model_path("rope_shared"), model_path("wide"), without_norms, at("shape")}) {
    const PublishedCheckpoint checkpoint(folder);
    const auto form = checkpoint.form();
    EXPECT_EQ(form.model("config.json"), checkpoint.config()) << folder;
    EXPECT_EQ(PublishedForm::from_text(form.to_text(), "form"), form) << folder;
  }
}

TEST_F(Convert, ToAnotherDtype) {
  convert(model_path("wide"), at("narrow"), {.layout = "published", .dtype = "bfloat16"});
  EXPECT_EQ(PublishedCheckpoint(at("narrow")).config().dtype, "bfloat16");
  const auto narrow = weights_of(at("narrow"));
  for (const auto& [name, tensor] : weights_of(model_path("wide"))) {
    EXPECT_TRUE(at::equal(narrow.at(name), tensor.to(at::kBFloat16))) << name;
  }
}

// Names and shapes are written down twice: in published_tensors, and in the modules.
TEST_F(Convert, ModelsAskForTheTensorsThatAreListed) {
  for (const std::string name : {"base", "bias_crop", "wide"}) {
    const auto config = PublishedCheckpoint(model_path(name)).config();
    auto listed = published_tensors(config);
    listed.merge(published_mtp_tensors(config));
    PublishedTensors asked;
    const Step37Model model(step37_config(config, true), single());
    for (const auto& shard : parameter_shards(*model)) {
      for (const auto& segment : shard.segments) asked[published_name(segment.name)] = segment.global_shape;
      EXPECT_TRUE(!shard.parameter.requires_grad() || shard.name.find(".mtp.") == std::string::npos) << shard.name;
    }
    EXPECT_EQ(asked, listed) << name;
  }
}

// Values go from the mapped files into the parameters: loading needs no memory but the rank's share of the model.
TEST_F(Convert, LoadingNeedsNoMoreThanTheRanksShare) {
  const auto largest = 61 * 32 * 4;  // bytes of the largest tensor, an embedding
  const auto watch = std::make_shared<LiveBytes>();
  const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, watch);
  const PublishedCheckpoint checkpoint(model_path("wide"));
  EXPECT_LT(watch->peak, largest);
  const int size = runtime().size();
  Step37Model model(step37_config(checkpoint.config(), true),
                    groups(parallel::RankGrid{.tp = size, .ep = size, .etp = 1}));
  const auto shards = parameter_shards(*model);
  int64_t share = 0;
  for (const auto& shard : shards) share += static_cast<int64_t>(shard.parameter.nbytes());
  const auto before = watch->peak;
  EXPECT_GE(before, share);
  checkpoint.load(shards);
  EXPECT_LE(watch->peak, before + largest);
}

TEST_F(Convert, RefusesWithoutLeavingAnything) {
  const auto from = model_path("wide");
  on_main([&] { test_support::write_file(at("full") / "file", "x"); });
  EXPECT_TRUE(contains(error({.from = from, .to = at("full")}), "full exists and is not an empty folder"));
  EXPECT_TRUE(contains(error({.from = at("none"), .to = at("new")}), "none is no folder"));
  EXPECT_TRUE(contains(error({.from = from, .to = at("new"), .layout = "x"}), "--layout x: expected published or"));
  EXPECT_TRUE(contains(error({.from = from, .to = at("new"), .dtype = "float16"}), "--dtype float16: expected"));
  EXPECT_TRUE(contains(error({.from = from, .to = at("new"), .dtype = "bfloat16"}), "checkpoints are in float32"));
  EXPECT_TRUE(contains(error({.from = from, .to = at("new"), .layout = "published", .max_shard_size = 0}),
                       "0 bytes, is not positive"));
  EXPECT_FALSE(fs::exists(at("new")));
  convert(from, at("run"));
  EXPECT_TRUE(
      contains(error({.from = at("run"), .to = at("new"), .layout = "training"}), "the training layout already"));
  on_main([&] {
    const auto step = at("run") / "checkpoints" / "step-00000000";
    for (const auto& entry : fs::directory_iterator(step)) {
      if (entry.path().extension() == ".safetensors") fs::resize_file(entry.path(), 100);
    }
  });
  EXPECT_TRUE(contains(error({.from = at("run"), .to = at("new")}), "step-00000000"));
  EXPECT_FALSE(fs::exists(at("new")));
}

}  // namespace
}  // namespace megatron_cpp::step37
