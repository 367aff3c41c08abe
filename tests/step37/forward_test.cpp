// `step37 forward` on the golden models, called in this process on all ranks.
#include "step37/program/forward.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "megatron_cpp/checkpoint/safetensors.h"
#include "parallel/agree.h"
#include "parallel/collectives.h"
#include "tests/step37/published_models.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::step37 {
namespace {

namespace fs = std::filesystem;
using namespace test_support;
using published_models::Tensors;
using published_models::tensors_of;

constexpr double kGoldenTolerance = 1e-4;  // of the largest element
constexpr int64_t kPatchStart = 250;
constexpr int64_t kImageStart = 251;
constexpr int64_t kPlaceholder = 252;

class Forward : public published_models::PublishedModels {
 protected:
  ForwardArguments arguments_for(const std::string& name) const {
    ForwardArguments arguments;
    arguments.model = model_path(name);
    arguments.input = case_path(name);
    arguments.output = folder_.path() / "out.safetensors";
    arguments.image_start_token = name == "wide" ? 2 : kImageStart;
    if (name != "wide") arguments.patch_start_token = kPatchStart;
    return arguments;
  }

  /// What the run writes, on every rank.
  Tensors run(const ForwardArguments& arguments) const {
    EXPECT_EQ(forward(runtime(), arguments), 0);
    parallel::barrier(world_tp());
    auto tensors = tensors_of(arguments.output);
    parallel::barrier(world_tp());
    return tensors;
  }

  /// The message of the error that every rank ends in.
  static std::string error_of_all(const ForwardArguments& arguments) {
    const auto message = message_of([&] { forward(runtime(), arguments); });
    EXPECT_TRUE(on_all_ranks(!message.empty()));
    return message;
  }
};

void expect_golden(const Tensors& actual, const Tensors& expected, const std::string& what) {
  int compared = 0;
  for (const auto& [name, tensor] : expected) {
    auto name_here = name;
    if (name.starts_with("text_layer_out.")) name_here = "layers." + name.substr(15) + ".output";
    const bool is_output = name == "logits" || name == "loss" || name == "inputs_embeds" || name == "image_features";
    if (!is_output && name == name_here && !name.starts_with("grad.")) continue;  // inputs and inner values
    const auto found = actual.find(name_here);
    ASSERT_NE(found, actual.end()) << what << ": " << name_here;
    EXPECT_TRUE(near(found->second, tensor.view_as(found->second), kGoldenTolerance)) << what << ": " << name;
    ++compared;
  }
  EXPECT_GT(compared, 50) << what;
}

struct Layout {
  bool sequence_parallel;
  int ep;
  int etp;
};

std::vector<Layout> layouts() {
  const int size = runtime().size();
  std::vector<Layout> result;
  for (const bool sequence_parallel : {false, true}) {
    for (const int ep : divisors_of_world()) {
      for (const int etp : {1, size / ep}) {
        if (etp == 1 || ep * etp == size) result.push_back({sequence_parallel, ep, etp});
        if (size == ep) break;  // both are 1
      }
    }
  }
  return result;
}

TEST_F(Forward, ComputesWhatTransformersComputes) {
  for (const std::string name : {"base", "text_only", "bias_crop", "rope_shared", "wide"}) {
    if (runtime().size() > 2 && name != "wide") continue;  // they have two key/value heads
    const auto expected = tensors_of(case_path(name));
    for (const auto& layout : layouts()) {
      auto arguments = arguments_for(name);
      arguments.sequence_parallel = layout.sequence_parallel;
      arguments.expert_parallel = layout.ep;
      arguments.expert_tensor_parallel = layout.etp;
      arguments.gradients = true;
      arguments.dump = "layers";
      expect_golden(
          run(arguments), expected,
          c10::str(name, " ep ", layout.ep, " etp ", layout.etp, layout.sequence_parallel ? " sequence parallel" : ""));
    }
  }
}

TEST_F(Forward, ComputesTheSameWithASplitTower) {
  for (const std::string name : {"base", "bias_crop", "wide"}) {
    if (runtime().size() > 2 && name != "wide") continue;
    auto arguments = arguments_for(name);
    arguments.mm_encoder_tp_mode = "weights";
    arguments.gradients = true;
    arguments.dump = "layers";
    expect_golden(run(arguments), tensors_of(case_path(name)), name);
  }
  auto arguments = arguments_for("wide");
  arguments.mm_encoder_tp_mode = "heads";
  EXPECT_TRUE(contains(error_of_all(arguments), "--mm-encoder-tp-mode heads: expected data or weights"));
}

TEST_F(Forward, FindsPlaceholdersWithoutStartTokens) {
  const std::string name = runtime().size() > 2 ? "wide" : "bias_crop";
  auto arguments = arguments_for(name);
  const auto with_tokens = run(arguments);
  arguments.image_start_token.reset();
  arguments.patch_start_token.reset();
  const auto without = run(arguments);
  EXPECT_TRUE(test_support::equal(without.at("logits"), with_tokens.at("logits")));
  EXPECT_FALSE(without.contains("grad.lm_head.weight"));
  EXPECT_FALSE(without.contains("layers.0.output"));
}

// Without pictures a start token is a token like any other.
TEST_F(Forward, TextMayHoldStartTokens) {
  auto arguments = arguments_for("wide");
  arguments.input = changed_input("wide", [](Tensors& tensors) {
    tensors.erase("pixel_values");
    tensors["input_ids"].masked_fill_(tensors["input_ids"].eq(60), 2);
  });
  EXPECT_EQ(run(arguments).at("logits").size(1), 24);
}

TEST_F(Forward, ComputesInOtherDtypes) {
  auto arguments = arguments_for("wide");
  const auto reference = run(arguments);
  arguments.dtype = "float64";
  arguments.sequence_parallel = true;
  const auto wide = run(arguments);
  EXPECT_EQ(wide.at("logits").scalar_type(), at::kDouble);
  EXPECT_TRUE(near(wide.at("logits").to(at::kFloat), reference.at("logits"), kGoldenTolerance));
  arguments.dtype = "bfloat16";
  const auto narrow = run(arguments);
  EXPECT_EQ(narrow.at("logits").scalar_type(), at::kBFloat16);
  EXPECT_TRUE(near(narrow.at("loss").to(at::kFloat), reference.at("loss"), 0.05));
}

// 23 positions: no multiple of 2 or 4.
TEST_F(Forward, PadsSequencesThatRanksCanNotShare) {
  auto arguments = arguments_for("wide");
  arguments.input = changed_input("wide", [](Tensors& tensors) {
    for (const auto* name : {"input_ids", "labels"}) tensors[name] = tensors[name].narrow(1, 0, 23).contiguous();
  });
  arguments.gradients = true;
  const auto expected = run(arguments);
  arguments.sequence_parallel = true;
  const auto actual = run(arguments);
  EXPECT_EQ(actual.at("logits").size(1), 23);
  for (const auto& [name, tensor] : expected) EXPECT_TRUE(near(actual.at(name), tensor, 1e-5)) << name;
}

TEST_F(Forward, ThePaddingTokensRowGetsNoGradient) {
  auto arguments = arguments_for("wide");
  arguments.gradients = true;
  arguments.input = changed_input("wide", [](Tensors& tensors) { tensors["input_ids"].select(1, 23).fill_(1); });
  const auto gradient = run(arguments).at("grad.model.embed_tokens.weight");
  EXPECT_TRUE(test_support::equal(gradient[1], at::zeros({32})));
  EXPECT_GT(gradient.abs().max().item<double>(), 0.0);
}

TEST_F(Forward, ReadsSeveralFilesAndPrefixes) {
  auto arguments = arguments_for("wide");
  const auto expected = run(arguments);
  const auto folder = folder_.path() / "several";
  copy_config("wide", folder);
  if (runtime().rank() == 0) {
    nlohmann::json index;
    std::vector<std::vector<NamedTensor>> files(2);
    for (const auto& [name, tensor] : tensors_of(model_path("wide") / "model.safetensors")) {
      const auto stored = name.starts_with("vi") ? "model." + name : name;
      const size_t file = name.size() % 2;
      files[file].push_back({stored, tensor});
      index["weight_map"][stored] = c10::str("part-", file, ".safetensors");
    }
    for (size_t file = 0; file < 2; ++file)
      write_safetensors(folder / c10::str("part-", file, ".safetensors"), files[file]);
    test_support::write_file(folder / "model.safetensors.index.json", index.dump());
  }
  parallel::barrier(world_tp());
  arguments.model = folder;
  EXPECT_TRUE(test_support::equal(run(arguments).at("logits"), expected.at("logits")));
}

// The norms' weights decide, not use_qk_norm, which is false in wide's configuration.
TEST_F(Forward, ModelsWithoutNormsOfQueriesAndKeys) {
  auto arguments = arguments_for("wide");
  const auto with_norms = run(arguments);
  arguments.model = changed_model("wide", [](Tensors& tensors) {
    std::erase_if(tensors, [](const auto& entry) {
      return entry.first.find("q_norm") != std::string::npos || entry.first.find("k_norm") != std::string::npos;
    });
  });
  EXPECT_FALSE(near(run(arguments).at("logits"), with_norms.at("logits"), 1e-3));
}

// ---- errors, on every rank ----

TEST_F(Forward, ListsAllTensorsThatAreWrong) {
  auto arguments = arguments_for("wide");
  arguments.model = changed_model("wide", [](Tensors& tensors) {
    tensors.erase("model.norm.weight");
    tensors.erase("vision_model.ln_pre.bias");
    tensors["model.layers.7.extra"] = at::zeros({1});
    tensors["lm_head.weight"] = tensors["lm_head.weight"].narrow(0, 0, 60).contiguous();
    tensors["model.layers.1.moe.router_bias"] = at::zeros({8}, at::kLong);
  });
  const auto message = error_of_all(arguments);
  for (const auto* part :
       {"missing: model.norm.weight", "missing: vision_model.ln_pre.bias", "unexpected: model.layers.7.extra",
        "lm_head.weight has shape [60, 32], expected [61, 32]", "model.layers.1.moe.router_bias has dtype I64"}) {
    EXPECT_TRUE(contains(message, part)) << message;
  }
  EXPECT_FALSE(fs::exists(arguments.output));
}

TEST_F(Forward, RefusesHalfAnMtpLayerAndQuantisedWeights) {
  auto arguments = arguments_for("wide");
  arguments.model = changed_model("wide", [](Tensors& tensors) { tensors.erase("model.layers.3.eh_proj.weight"); });
  EXPECT_TRUE(contains(error_of_all(arguments), "missing: model.layers.3.eh_proj.weight"));
  arguments.model = changed_model(
      "wide", [](Tensors& tensors) { tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = at::ones({1}); });
  EXPECT_TRUE(contains(error_of_all(arguments), "belongs to a quantised checkpoint"));
}

TEST_F(Forward, RefusesAnIndexThatDoesNotFit) {
  auto arguments = arguments_for("wide");
  arguments.model = folder_.path() / "index";
  copy_config("wide", arguments.model);
  const auto index_error = [&](const std::string& text) {
    parallel::barrier(world_tp());
    if (runtime().rank() == 0) test_support::write_file(arguments.model / "model.safetensors.index.json", text);
    parallel::barrier(world_tp());
    return error_of_all(arguments);
  };
  EXPECT_TRUE(contains(index_error(R"({"weight_map": {"a": "absent.safetensors"}})"),
                       "names absent.safetensors, which is not there"));
  EXPECT_TRUE(contains(index_error(R"({"weight_map": {"a": "../x.safetensors"}})"), "no file beside the index"));
  EXPECT_TRUE(contains(index_error(R"({"weight_map": {}})"), "weight_map is empty"));
  EXPECT_TRUE(contains(index_error("{"), "is not JSON"));
}

TEST_F(Forward, RefusesPlaceholdersThatDoNotFit) {
  const std::string name = runtime().size() > 2 ? "wide" : "base";
  const int64_t placeholder = name == "wide" ? 60 : kPlaceholder;
  auto arguments = arguments_for(name);
  const auto first_placeholder = [&](const Tensors& tensors) {
    return tensors.at("input_ids")[0].eq(placeholder).nonzero()[0].item<int64_t>();
  };
  arguments.input =
      changed_input(name, [&](Tensors& tensors) { tensors["input_ids"][0][first_placeholder(tensors)] = 5; });
  EXPECT_TRUE(contains(error_of_all(arguments), "placeholders (id"));
  arguments.input = changed_input(name, [&](Tensors& tensors) {
    const auto first = first_placeholder(tensors);
    tensors["input_ids"][0][first - 1] = placeholder;  // and the start token is gone
    tensors["input_ids"][0][first] = 5;
  });
  EXPECT_TRUE(contains(error_of_all(arguments), "start token")) << error_of_all(arguments);
}

TEST_F(Forward, RefusesInputsThatDoNotFit) {
  auto arguments = arguments_for("wide");
  const auto input_error = [&](const std::function<void(Tensors&)>& change) {
    arguments.input = changed_input("wide", change);
    return error_of_all(arguments);
  };
  EXPECT_TRUE(contains(input_error([](Tensors& tensors) { tensors.erase("input_ids"); }), "no tensor input_ids"));
  EXPECT_TRUE(contains(input_error([](Tensors& tensors) { tensors["input_ids"] = at::zeros({3}, at::kLong); }),
                       "input_ids is [3]"));
  EXPECT_TRUE(contains(input_error([](Tensors& tensors) {
                         tensors["input_ids"] = at::zeros({1, 129}, at::kLong);
                       }),
                       "129 positions, the model allows 128"));
  EXPECT_TRUE(contains(input_error([](Tensors& tensors) { tensors["labels"].fill_(-100); }), "no label counts"));
  EXPECT_TRUE(contains(input_error([](Tensors& tensors) {
                         tensors["labels"] = at::zeros({2, 3}, at::kLong);
                       }),
                       "labels are [2, 3]"));
  EXPECT_TRUE(contains(input_error([](Tensors& tensors) { tensors["input_ids"][0][0] = 61; }), "token id 61"));
  EXPECT_TRUE(contains(input_error([](Tensors& tensors) { tensors.erase("pixel_values"); }), "the pictures have 0"));
  arguments = arguments_for("wide");
  arguments.dtype = "float8";
  EXPECT_TRUE(contains(error_of_all(arguments), "--dtype float8: expected float32, float64 or bfloat16"));
  arguments = arguments_for("wide");
  arguments.expert_parallel = 3;
  EXPECT_TRUE(contains(error_of_all(arguments), "--expert-parallel 3 does not divide the"));
  if (runtime().size() != 4) return;
  EXPECT_TRUE(contains(error_of_all(arguments_for("base")), "num_query_groups 2 is not divisible by"));
}

}  // namespace
}  // namespace megatron_cpp::step37
