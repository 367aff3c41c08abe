#include "step37/published_config.h"

#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "megatron_cpp/transformer/rotary_embedding.h"
#include "tests/support/environment.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp::step37 {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;

const fs::path kModels = test_support::cases() / "models";
const fs::path kReleased = test_support::cases() / "../../configs/step37_flash.json";

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

class PublishedConfigTest : public ::testing::Test {
 protected:
  static ordered_json json_of(const fs::path& file) {
    std::ifstream stream(file);
    return ordered_json::parse(stream);
  }
  PublishedConfig read(const ordered_json& json) const {
    return read_published_config(folder_.write("config.json", json.dump()));
  }
  std::string error(const ordered_json& json) const {
    try {
      read(json);
    } catch (const c10::ValueError& error) {
      return error.what_without_backtrace();
    }
    return "no error";
  }

  test_support::TemporaryFolder folder_;
  ordered_json hub_ = json_of(kModels / "base/config_hub.json");
  ordered_json saved_ = json_of(kModels / "base/config.json");
};

TEST_F(PublishedConfigTest, BothFormsDescribeTheSameModel) {
  for (const auto* model : {"base", "text_only", "bias_crop", "rope_shared"}) {
    EXPECT_EQ(read_published_config(kModels / model / "config.json"),
              read_published_config(kModels / model / "config_hub.json"))
        << model;
  }
}

TEST_F(PublishedConfigTest, ReadsEveryPartOfAModel) {
  const auto config = read(hub_);
  EXPECT_EQ(config.text.vocabulary_size, 256);
  EXPECT_EQ(config.text.num_query_groups, 2);
  ASSERT_EQ(config.text.num_layers(), 6);
  LayerConfig full;
  full.num_attention_heads = 4;
  full.rope_theta = 5e6;
  full.partial_rotary_factor = 0.5;
  EXPECT_EQ(config.text.layers[0], full);
  LayerConfig sliding;
  sliding.num_attention_heads = 6;
  sliding.sliding_window = 8;
  sliding.swiglu_limit = 1.2;
  sliding.has_experts = true;
  sliding.expert_swiglu_limit = 0.7;
  EXPECT_EQ(config.text.layers[5], sliding);
  ASSERT_TRUE(config.text.moe);
  EXPECT_EQ(config.text.moe->num_experts, 8);
  EXPECT_EQ(config.text.moe->router_topk, 2);
  EXPECT_EQ(config.text.moe->shared_expert_ffn_hidden_size, 48);
  EXPECT_EQ(config.text.moe->router_scaling_factor, 3.0);
  EXPECT_EQ(config.vision.mlp_width, 80);
  EXPECT_EQ(config.image_token_id, 252);
  EXPECT_EQ(config.dtype, "float32");
  EXPECT_TRUE(config.text.mtp_layers.empty());
}

TEST_F(PublishedConfigTest, ReadsTheReleasedModelsListsOf48For45Layers) {
  const auto config = read_published_config(kReleased);
  ASSERT_EQ(config.text.num_layers(), 45);
  ASSERT_EQ(config.text.mtp_layers.size(), 3U);
  for (const auto& layer : config.text.mtp_layers) {
    EXPECT_EQ(layer.num_attention_heads, 96);
    EXPECT_EQ(layer.sliding_window, 512);
    EXPECT_EQ(layer.rope_theta, 1e4);
    EXPECT_FALSE(layer.has_experts);
  }
  EXPECT_FALSE(config.text.layers[2].has_experts);
  EXPECT_TRUE(config.text.layers[3].has_experts);
  // Layer 43 clamps its routed experts only.
  EXPECT_EQ(config.text.layers[43].expert_swiglu_limit, 7.0);
  EXPECT_EQ(config.text.layers[43].swiglu_limit, 0.0);
  EXPECT_EQ(config.text.layers[44].swiglu_limit, 16.0);
  EXPECT_EQ(config.vision.mlp_width, 8960);
  EXPECT_EQ(config.eos_token_ids, (std::vector<int64_t>{1, 2, 128007}));
  EXPECT_EQ(config.pad_token_id, 1);
}

TEST_F(PublishedConfigTest, ScalesTheFrequenciesOfFullAttentionOnly) {
  const auto config = read_published_config(kReleased);
  const auto& full = config.text.layers[4];
  const auto& sliding = config.text.layers[5];
  ASSERT_TRUE(full.rope_scaling);
  EXPECT_FALSE(sliding.rope_scaling);
  ASSERT_EQ(full.rotary_dim(128), 64);
  // The rule of transformers 5.24 (modeling_rope_utils.py, _compute_llama3_parameters), written once more in double.
  const RotaryEmbedding rotary(full.rotary_dim(128), full.rope_theta, full.rope_scaling);
  for (int64_t i = 0; i < 32; ++i) {
    const double frequency = std::pow(5e6, -2.0 * static_cast<double>(i) / 64.0);
    const double wavelength = 2.0 * M_PI / frequency;
    const double smooth = (131072.0 / wavelength - 1.0) / 31.0;
    double expected = (1.0 - smooth) * frequency / 2.0 + smooth * frequency;
    if (wavelength > 131072.0) expected = frequency / 2.0;
    if (wavelength < 131072.0 / 32.0) expected = frequency;
    EXPECT_NEAR(rotary.inverse_frequencies()[i].item<double>() / expected, 1.0, 2e-6) << i;
  }
}

TEST_F(PublishedConfigTest, TheWayToWriteALimitOrAListDoesNotMatter) {
  auto json = hub_;
  auto& text = json["text_config"];
  text["swiglu_limits"] = {nullptr, 0, 0.0, nullptr, 1, 0.7};
  text["moe_layers_enum"] = {2, 3, 4, 5};
  text["use_qk_norm"] = false;  // the tensors decide
  EXPECT_EQ(read(json), read(hub_));
  text["moe_layers_enum"] = " 2,3, 4 ,5,";
  EXPECT_EQ(read(json), read(hub_));
  text.erase("swiglu_limits");
  EXPECT_EQ(read(json).text.layers[4].expert_swiglu_limit, 0.0);
  EXPECT_EQ(read(json).text.layers[4].swiglu_limit, 0.8);
}

TEST_F(PublishedConfigTest, AbsentKeysHaveTheDefaultsOfTransformers) {
  auto json = hub_;
  for (const auto* key : {"rms_norm_eps", "pad_token_id", "rope_theta", "partial_rotary_factors", "layer_types",
                          "attention_other_setting", "sliding_window"}) {
    json["text_config"].erase(key);
  }
  json.erase("image_token_id");
  json.erase("torch_dtype");
  const auto config = read(json);
  EXPECT_EQ(config.text.rms_norm_eps, 1e-5);
  EXPECT_EQ(config.pad_token_id, 1);
  EXPECT_EQ(config.text.layers[1].rope_theta, 1e4);
  EXPECT_EQ(config.text.layers[1].partial_rotary_factor, 1.0);
  EXPECT_EQ(config.text.layers[1].sliding_window, 0);
  EXPECT_EQ(config.text.layers[1].num_attention_heads, 4);
  EXPECT_EQ(config.image_token_id, 151679);
  EXPECT_EQ(config.dtype, "bfloat16");
}

TEST_F(PublishedConfigTest, RefusesAKeyWhoseDefaultReadersDisagreeAbout) {
  auto json = hub_;
  json["text_config"].erase("moe_layers_enum");
  EXPECT_PRED2(contains, error(json), "config.json: key text_config/moe_layers_enum is missing");
  json = hub_;
  json["text_config"].erase("moe_router_scaling_factor");
  EXPECT_PRED2(contains, error(json), "key text_config/moe_router_scaling_factor is missing");
  json = hub_;
  json["text_config"]["rope_theta"][3] = 20000.0;
  EXPECT_PRED2(contains, error(json), "key text_config/rope_theta has 20000 for layer 3 and 10000 for layer 1");
}

TEST_F(PublishedConfigTest, NamesTheKeyOfAListOfAnotherLength) {
  for (const auto* key : {"layer_types", "swiglu_limits", "swiglu_limits_shared", "rope_theta"}) {
    auto json = hub_;
    json["text_config"][key].erase(0);
    EXPECT_PRED2(contains, error(json), std::string("key text_config/") + key + " has 5 entries for 6 layers") << key;
  }
}

TEST_F(PublishedConfigTest, NamesTheKeyOfAValueThatIsNotSupported) {
  const std::pair<const char*, ordered_json> text_values[] = {{"tie_word_embeddings", true},
                                                              {"hidden_act", "gelu"},
                                                              {"zero_centered", false},
                                                              {"query_pre_attn_scalar", 8},
                                                              {"norm_expert_weight", false},
                                                              {"attention_bias", true},
                                                              {"hidden_size", "64"},
                                                              {"hidden_size", 0},
                                                              {"moe_top_k", 9},
                                                              {"moe_layers_enum", "2,x"},
                                                              {"moe_layers_enum", "6"},
                                                              {"head_dim", 1e300},
                                                              {"quantization_config", {{"quant_method", "fp8"}}}};
  for (const auto& [key, value] : text_values) {
    auto json = hub_;
    json["text_config"][key] = value;
    const auto message = error(json);
    EXPECT_PRED2(contains, message, "config.json: ") << key;
    EXPECT_PRED2(contains, message, key == std::string("moe_top_k") ? "router_topk 9" : key) << key;
  }
  auto json = hub_;
  json["text_config"]["attention_other_setting"]["num_attention_groups"] = 4;
  EXPECT_PRED2(contains, error(json), "attention_other_setting/num_attention_groups is 4, only 2 is supported");
  json = hub_;
  json["text_config"]["rope_scaling"] = {{"rope_type", "yarn"}, {"factor", 2.0}};
  EXPECT_PRED2(contains, error(json), "rope_scaling/rope_type is yarn");
  json = hub_;
  json["vision_config"]["use_cls_token"] = true;
  EXPECT_PRED2(contains, error(json), "key vision_config/use_cls_token is true, only false is supported");
  json = saved_;
  json["text_config"]["per_layer_config"]["7"] = {{"num_attention_heads", 6}};
  EXPECT_PRED2(contains, error(json), "per_layer_config/7: there are layers 0 to 5");
  json = saved_;
  json["text_config"]["rope_parameters"].erase("sliding_attention");
  EXPECT_PRED2(contains, error(json), "there is no key text_config/rope_parameters/sliding_attention");
}

TEST_F(PublishedConfigTest, MalformedFilesAreRefusedByName) {
  EXPECT_THROW(read_published_config(folder_.path() / "absent.json"), c10::ValueError);
  const auto file = folder_.write("broken.json", "{\"text_config\": ");
  try {
    read_published_config(file);
    FAIL();
  } catch (const c10::ValueError& error) {
    EXPECT_EQ(std::string(error.what_without_backtrace()), file.string() + " is not JSON");
  }
  EXPECT_PRED2(contains, error(ordered_json::array()), "the whole is not a JSON object");
}

}  // namespace
}  // namespace megatron_cpp::step37
