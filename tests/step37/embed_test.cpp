// `step37 embed` on the golden cases, called in this process on all ranks.
#include "step37/program/embed.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "megatron_cpp/checkpoint/safetensors.h"
#include "parallel/agree.h"
#include "parallel/collectives.h"
#include "parallel/shard.h"
#include "tests/support/environment.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::step37 {
namespace {

using namespace test_support;

/// Each test has a folder of its own.
class Embed : public testing::Test {
 protected:
  EmbedArguments arguments_for(const std::filesystem::path& input) const {
    EmbedArguments arguments;
    arguments.input = input;
    arguments.output = folder_.path() / "out.safetensors";
    arguments.checked = false;  // its collectives would be counted
    return arguments;
  }

  /// The statistics of a run, on rank 0; null elsewhere.
  nlohmann::json stats_of(EmbedArguments arguments) const {
    arguments.stats = folder_.path() / "stats.json";
    EXPECT_EQ(embed(runtime(), arguments), 0);
    if (runtime().rank() != 0) return {};
    std::ifstream stream(arguments.stats);
    return nlohmann::json::parse(stream);
  }

  /// A case with some tensors replaced (or removed, if undefined), written by rank 0.
  std::filesystem::path changed_case(const std::string& name, const std::map<std::string, at::Tensor>& changes) const {
    const auto path = folder_.path() / "changed.safetensors";
    parallel::barrier(test_support::world_tp());  // nobody reads the previous one any more
    if (runtime().rank() == 0) {
      const SafetensorsFile original(case_path(name));
      std::vector<NamedTensor> tensors;
      for (const auto& [tensor_name, entry] : original.entries()) {
        const auto change = changes.find(tensor_name);
        if (change == changes.end()) {
          tensors.push_back({tensor_name, original.read(tensor_name)});
        } else if (change->second.defined()) {
          tensors.push_back({tensor_name, change->second});
        }
      }
      for (const auto& [tensor_name, tensor] : changes) {
        if (!original.contains(tensor_name) && tensor.defined()) tensors.push_back({tensor_name, tensor});
      }
      write_safetensors(path, tensors);
    }
    parallel::barrier(test_support::world_tp());
    return path;
  }

  static std::filesystem::path case_path(const std::string& name) {
    return test_support::cases() / "embed" / (name + ".safetensors");
  }

  test_support::SharedFolder folder_;
};

std::vector<std::filesystem::path> golden_cases() {
  std::vector<std::filesystem::path> paths;
  for (const auto& entry : std::filesystem::directory_iterator(test_support::cases() / "embed")) {
    if (entry.path().extension() == ".safetensors") paths.push_back(entry.path());
  }
  std::sort(paths.begin(), paths.end());  // every rank in the same order
  return paths;
}

bool is_features(const std::string& name) { return name.find(".image_features") != std::string::npos; }

bool is_parameter(const std::string& name) {
  return name == "word_embeddings.weight" || name.starts_with("align_projector.");
}

/// What a run under MismatchPolicy::kError must say of a case; empty if its counts match.
std::string mismatch_of(const SafetensorsFile& file) {
  const auto ids = file.read("input_ids");
  for (int g = 0; file.contains("group" + std::to_string(g) + ".insert_start_token"); ++g) {
    const auto group = "group" + std::to_string(g);
    const auto token = file.read(group + ".insert_start_token").item<int64_t>();
    int64_t images = 0;
    for (const auto& [name, entry] : file.entries()) {
      if (name.starts_with(group + ".image_features")) images += entry.shape.size() == 3 ? entry.shape[0] : 1;
    }
    const auto places = ids.eq(token).sum().item<int64_t>();
    if (images != places) {
      return std::to_string(images) + " images for " + std::to_string(places) + " occurrences of start token " +
             std::to_string(token);
    }
  }
  return {};
}

struct Options {
  std::string embedding, projector, exchange;
  bool sequence_parallel;
  bool hidden() const { return embedding == "hidden"; }
  bool fused() const { return exchange == "fused"; }
};

/// All that go together.
void for_each_choice(const std::function<void(const Options&)>& action) {
  for (const char* embedding : {"vocab", "hidden"}) {
    for (const char* projector : {"column", "row", "replicated"}) {
      for (const char* exchange : {"fused", "all-gather"}) {
        for (const bool sequence_parallel : {false, true}) {
          const Options options{embedding, projector, exchange, sequence_parallel};
          if (options.hidden() && (options.projector == "row" || !options.fused())) continue;
          SCOPED_TRACE(testing::Message() << embedding << ", " << projector << ", " << exchange
                                          << ", sequence_parallel " << sequence_parallel);
          action(options);
        }
      }
    }
  }
}

void choose(EmbedArguments& arguments, const Options& options) {
  arguments.embedding_sharding = options.embedding;
  arguments.projector_sharding = options.projector;
  arguments.exchange = options.exchange;
  arguments.sequence_parallel = options.sequence_parallel;
}

/// With a projector whose sizes every number of ranks divides.
EmbedArguments any_size(EmbedArguments arguments) {
  arguments.projector_sharding = "replicated";
  return arguments;
}

bool divides(const SafetensorsFile& file, const Options& options) {
  const int t = runtime().size();
  const auto shape = file.entries().at("grad_output").shape;  // [S, B, H]
  const auto channels = file.entries().at("align_projector.weight").shape[1];
  return (!options.sequence_parallel || shape[0] % t == 0) &&
         ((options.projector != "column" && !options.hidden()) || shape[2] % t == 0) &&
         (options.projector != "row" || channels % t == 0);
}

/// The text of a c10::ValueError.
std::string value_error(const EmbedArguments& arguments) {
  try {
    embed(runtime(), arguments);
  } catch (const c10::ValueError& error) {
    return error.what_without_backtrace();
  } catch (const std::exception& error) {
    return std::string("not a ValueError: ") + error.what();
  }
  return "nothing thrown";
}

/// What all ranks throw; a failure if they differ.
std::string agreed_error(const EmbedArguments& arguments) {
  std::string mine = "nothing thrown";
  try {
    embed(runtime(), arguments);
  } catch (const std::exception& error) {
    mine = parallel::error_text(error);
  }
  EXPECT_EQ(mine, parallel::broadcast_text(mine, 0, test_support::world_tp()));
  return mine;
}

/// Output and gradients of every tensor of the input (of those that `wanted` names), equal to what the case expects,
/// zeros where the reference has no gradient at all.
void expect_results(const SafetensorsFile& input, const std::filesystem::path& output_path, double tolerance,
                    const std::function<bool(const std::string&)>& wanted) {
  const SafetensorsFile output(output_path);
  std::set<std::string> names{"output"};
  for (const auto& [name, entry] : input.entries()) {
    if (name.starts_with("expected.") || !(is_parameter(name) || is_features(name)) || !wanted(name)) continue;
    const auto gradient = "grad." + name;
    names.insert(gradient);
    EXPECT_TRUE(output.contains(gradient)) << gradient;
    if (!output.contains(gradient)) continue;
    EXPECT_EQ(output.entries().at(gradient).shape, entry.shape) << gradient;
    if (!input.contains("expected." + gradient)) {
      EXPECT_TRUE(output.read(gradient).eq(0).all().item<bool>()) << gradient;
    }
  }
  std::set<std::string> given;
  for (const auto& [name, entry] : output.entries()) given.insert(name);
  EXPECT_EQ(given, names);
  for (const auto& name : names) {
    if (!input.contains("expected." + name) || !output.contains(name)) continue;
    const auto expected = input.read("expected." + name);
    if (tolerance == 0.0) {
      EXPECT_TRUE(test_support::equal(output.read(name), expected)) << name;
    } else {
      EXPECT_TRUE(test_support::near(output.read(name), expected, tolerance)) << name;
    }
  }
}

bool everything(const std::string& /*name*/) { return true; }

}  // namespace

TEST_F(Embed, EqualsTheGoldenCases) {
  Warnings warnings;
  int num_compared = 0;
  for (const auto& path : golden_cases()) {
    SCOPED_TRACE(path.stem().string());
    const SafetensorsFile file(path);
    const bool grid = file.metadata().at("values") == "grid";
    for_each_choice([&](const Options& options) {
      auto arguments = arguments_for(path);
      choose(arguments, options);
      arguments.on_mismatch = "truncate";
      if (!divides(file, options)) {
        EXPECT_TRUE(contains(value_error(arguments), " is not divisible by tensor-parallel size "));
        return;
      }
      EXPECT_EQ(embed(runtime(), arguments), 0);
      ++num_compared;
      if (runtime().rank() == 0) expect_results(file, arguments.output, grid ? 0.0 : 1e-5, everything);
    });
  }
  EXPECT_GE(num_compared, runtime().size() == 3 ? 40 : 16 * 16);  // one case has sizes that only one rank divides
}

TEST_F(Embed, CheckedModeChangesNothing) {
  const SafetensorsFile file(case_path("06_patches_then_images"));
  for_each_choice([&](const Options& options) {
    if (!divides(file, options)) return;
    auto arguments = arguments_for(case_path("06_patches_then_images"));
    choose(arguments, options);
    arguments.checked = true;
    EXPECT_EQ(embed(runtime(), arguments), 0);
    if (runtime().rank() == 0) expect_results(file, arguments.output, 1e-5, everything);
  });
}

TEST_F(Embed, RefusesCountsThatDifferByDefault) {
  int num_refused = 0;
  for (const auto& path : golden_cases()) {
    SCOPED_TRACE(path.stem().string());
    const SafetensorsFile file(path);
    const auto mismatch = mismatch_of(file);
    for (const char* projector : {"column", "row", "replicated"}) {
      const Options options{"vocab", projector, "fused", false};
      if (!divides(file, options)) continue;
      auto arguments = arguments_for(path);
      choose(arguments, options);
      if (mismatch.empty()) {
        EXPECT_EQ(embed(runtime(), arguments), 0);
        continue;
      }
      EXPECT_TRUE(contains(value_error(arguments), mismatch));
      ++num_refused;
    }
  }
  EXPECT_GE(num_refused, 4);
}

TEST_F(Embed, EqualsTheGoldenCasesInBfloat16) {
  Warnings warnings;
  for (const auto& path : golden_cases()) {
    SCOPED_TRACE(path.stem().string());
    const SafetensorsFile file(path);
    for_each_choice([&](const Options& options) {
      // Row sharding rounds every rank's summand: bfloat16 isn't meant for it.
      if (!divides(file, options) || options.projector == "row" || !options.fused()) return;
      auto arguments = arguments_for(path);
      choose(arguments, options);
      arguments.on_mismatch = "truncate";
      arguments.dtype = "bfloat16";
      EXPECT_EQ(embed(runtime(), arguments), 0);
      if (runtime().rank() == 0) {
        expect_results(file, arguments.output, 1e-2, everything);
        EXPECT_EQ(SafetensorsFile(arguments.output).entries().at("output").dtype, at::kBFloat16);
      }
    });
  }
}

TEST_F(Embed, FrozenPartsHaveNoGradientInTheFile) {
  const auto path = case_path("06_patches_then_images");
  const SafetensorsFile file(path);
  for_each_choice([&](const Options& options) {
    if (!divides(file, options)) return;
    for (int frozen = 1; frozen < 8; ++frozen) {
      SCOPED_TRACE(testing::Message() << "frozen " << frozen);
      auto arguments = arguments_for(path);
      choose(arguments, options);
      arguments.frozen_embedding = (frozen & 1) != 0;
      arguments.frozen_projector = (frozen & 2) != 0;
      arguments.frozen_features = (frozen & 4) != 0;
      EXPECT_EQ(embed(runtime(), arguments), 0);
      if (runtime().rank() != 0) continue;
      expect_results(file, arguments.output, 1e-5, [&](const std::string& name) {
        if (name == "word_embeddings.weight") return !arguments.frozen_embedding;
        return is_features(name) ? !arguments.frozen_features : !arguments.frozen_projector;
      });
    }
  });
}

TEST_F(Embed, StatsFollowTheFormulas) {
  const auto path = case_path("05_batch3_row_major");  // S 24, B 3, H 8, C 12, three images of four rows, a bias
  constexpr int64_t kM = 24 * 3 * 8;
  constexpr int64_t kN = 12;
  constexpr int64_t kH = 8;
  constexpr int64_t kC = 12;
  const int64_t t = runtime().size();
  const auto holders = parallel::balanced_assignment({4, 4, 4}, runtime().size());
  std::vector<int64_t> rows(static_cast<size_t>(t), 0);
  for (const int holder : holders) rows[static_cast<size_t>(holder)] += 4;
  const int64_t most_rows = *std::max_element(rows.begin(), rows.end());

  /// The kinds given once each, with the elements of their full tensors.
  using Kinds = std::vector<std::pair<std::string, int64_t>>;
  auto expected = [&](const Kinds& kinds) {
    nlohmann::json part{{"collectives", nlohmann::json::object()}, {"bytes_per_rank", 0}};
    int64_t bytes = 0;
    for (const auto& [kind, elements] : kinds) {
      if (t == 1) break;
      part["collectives"][kind] = part["collectives"].value(kind, 0) + 1;
      bytes += (kind == "all_reduce" ? 2 : 1) * elements * 4 * (t - 1) / t;
    }
    part["bytes_per_rank"] = bytes;
    return part;
  };
  const SafetensorsFile file(path);
  for_each_choice([&](const Options& options) {
    if (!divides(file, options)) return;
    for (const bool frozen_features : {false, true}) {
      SCOPED_TRACE(testing::Message() << "frozen_features " << frozen_features);
      auto arguments = arguments_for(path);
      choose(arguments, options);
      arguments.frozen_features = frozen_features;
      const auto stats = stats_of(arguments);
      if (runtime().rank() != 0) continue;
      EXPECT_EQ(stats.size(), 4U);

      const bool sp = options.sequence_parallel;
      const bool replicated = options.projector == "replicated";
      Kinds reduction;
      if (replicated) reduction = {{"all_reduce", kH * kC}, {"all_reduce", kH}};
      EXPECT_EQ(stats.at("gradient_reduction"), expected(reduction));
      const auto peak = stats.at("peak_full_buffer_bytes").get<int64_t>();
      EXPECT_EQ(peak % (kM * 4), 0);
      if (options.hidden() && sp && t > 1) {
        EXPECT_EQ(peak, 0);
      } else {
        EXPECT_GT(peak, 0);
      }
      if (options.hidden() && replicated) continue;  // uneven: below

      const int64_t gathered = (replicated ? t * most_rows : kN) * kH;
      const bool rows_summed = options.projector == "row" && !options.fused();
      Kinds forward{{sp ? "reduce_scatter" : "all_reduce", kM}};
      if (options.hidden()) forward = {{sp ? "all_to_all" : "all_gather", sp ? kM / t : kM}};
      if (!options.fused()) forward.emplace_back(rows_summed ? "all_reduce" : "all_gather", gathered);
      Kinds backward;
      if (sp) backward = {{options.hidden() ? "all_to_all" : "all_gather", options.hidden() ? kM / t : kM}};
      if (sp && !options.fused()) backward.emplace_back(rows_summed ? "all_reduce" : "reduce_scatter", gathered);
      if (options.projector == "column" && !frozen_features) backward.emplace_back("all_reduce", kN * kC);
      EXPECT_EQ(stats.at("forward"), expected(forward));
      EXPECT_EQ(stats.at("backward"), expected(backward));
    }
  });
}

// What --frozen-* saves under sequence parallelism.
TEST_F(Embed, StatsShowWhatFrozenPartsSave) {
  const int64_t t = runtime().size();
  const auto path = case_path("05_batch3_row_major");
  const SafetensorsFile file(path);
  for_each_choice([&](const Options& options) {
    if (!options.sequence_parallel || !options.fused() || !divides(file, options) || t == 1) return;
    auto all = arguments_for(path);
    choose(all, options);
    all.frozen_features = true;
    auto only_projector = all;
    only_projector.frozen_embedding = true;
    auto only_embedding = all;
    only_embedding.frozen_projector = true;
    auto nothing = only_projector;
    nothing.frozen_projector = true;
    const auto all_stats = stats_of(all);
    const auto projector_stats = stats_of(only_projector);
    const auto embedding_stats = stats_of(only_embedding);
    const auto nothing_stats = stats_of(nothing);
    if (runtime().rank() != 0) return;
    const auto backward_bytes = [](const nlohmann::json& stats) {
      return stats.at("backward").at("bytes_per_rank").get<int64_t>();
    };
    // Whole image rows may all be sent by another rank than the one that sends most.
    EXPECT_LE(backward_bytes(embedding_stats), backward_bytes(all_stats));
    if (!options.hidden()) {
      EXPECT_LT(backward_bytes(embedding_stats), backward_bytes(all_stats));
      EXPECT_EQ(embedding_stats.at("backward").at("collectives"), nlohmann::json({{"all_to_all", 1}}));
    }
    EXPECT_LT(backward_bytes(projector_stats), backward_bytes(all_stats));
    EXPECT_TRUE(nothing_stats.at("backward").at("collectives").empty());
    if (options.projector == "replicated") {
      EXPECT_TRUE(projector_stats.at("backward").at("collectives").empty());
    }
  });
}

// One clear error on all ranks, whoever finds it.
TEST_F(Embed, RefusesBrokenInputs) {
  const std::string name = "05_batch3_row_major";  // S 24, B 3, H 8, C 12, V 64
  auto refused = [&](const std::map<std::string, at::Tensor>& changes, const std::string& part) {
    EXPECT_TRUE(contains(agreed_error(any_size(arguments_for(changed_case(name, changes)))), part));
  };
  EXPECT_TRUE(contains(agreed_error(arguments_for(folder_.path() / "none.safetensors")), "cannot open"));
  EXPECT_TRUE(contains(agreed_error(arguments_for(folder_.path())), "is not a regular file"));
  for (const char* tensor : {"input_ids", "word_embeddings.weight", "align_projector.weight", "grad_output"}) {
    refused({{tensor, at::Tensor()}}, std::string("changed.safetensors: no tensor ") + tensor);
  }
  refused({{"group0.insert_start_token", at::Tensor()}}, "group0.image_features without group0.insert_start_token");
  refused({{"group1.image_features", at::zeros({3, 4, 12})}},
          "group1.image_features without group1.insert_start_token");
  refused({{"group2.insert_start_token", at::zeros({1}, at::kLong)}}, "a case has no tensor group2.insert_start_token");
  refused({{"group0.image_features.0", at::zeros({4, 12})}}, "a case has no tensor group0.image_features.0");
  refused({{"align_projector.wieght", at::zeros({1})}}, "a case has no tensor align_projector.wieght");
  refused({{"input_ids", at::zeros({3, 24})}}, "input_ids must be int64, is Float");
  refused({{"input_ids", at::zeros({3, 24}, at::kInt)}}, "input_ids must be int64, is Int");
  refused({{"input_ids", at::zeros({72}, at::kLong)}}, "input_ids has shape [72], expected 2 dimensions");
  refused({{"input_ids", at::zeros({24, 3}, at::kLong)}},
          "grad_output has shape [24, 3, 8], expected [S, B, H] = [3, 24, 8]");
  refused({{"grad_output", at::zeros({24, 3, 9})}},
          "grad_output has shape [24, 3, 9], expected [S, B, H] = [24, 3, 8]");
  refused({{"align_projector.weight", at::zeros({12, 8})}}, "align_projector.weight has shape [12, 8]");
  refused({{"align_projector.bias", at::zeros({12})}}, "align_projector.bias has shape [12], expected [8]");
  refused({{"word_embeddings.weight", at::zeros({64})}}, "word_embeddings.weight has shape [64], expected [V, H]");
  refused({{"group0.insert_start_token", at::zeros({2}, at::kLong)}}, "group0.insert_start_token must be [1] int64");
  for (const char* tensor : {"word_embeddings.weight", "align_projector.weight", "align_projector.bias", "grad_output",
                             "group0.image_features"}) {
    const auto shape = SafetensorsFile(case_path(name)).entries().at(tensor).shape;
    refused({{tensor, at::zeros(shape, at::kLong)}},
            std::string(tensor) + " has dtype Long, expected a floating-point");
  }
  refused({{"group0.image_features", at::zeros({3, 4, 13})}}, "have width 13, align_projector takes 12");
  refused({{"group0.image_features", at::zeros({0, 0, 0})}}, "0 images for 3 occurrences of start token 61");
  auto cut = any_size(arguments_for(changed_case(name, {{"group0.image_features", at::zeros({0, 0, 0})}})));
  cut.on_mismatch = "truncate";
  EXPECT_TRUE(contains(agreed_error(cut), "have width 0, align_projector takes 12"));
  refused({{"group0.image_features", at::zeros({3, 4, 2, 6})}}, "[L, C] or [N, L, C], got [3, 4, 2, 6]");
  refused({{"group0.image_features", at::zeros({2, 4, 12})}}, "2 images for 3 occurrences of start token 61");
  auto outside = SafetensorsFile(case_path(name)).read("input_ids");
  outside[2][1] = 64;
  refused({{"input_ids", outside}}, "token id 64 at batch row 2, position 1 is outside the vocabulary [0, 64)");
}

TEST_F(Embed, RefusesTruncatedFiles) {
  const auto path = changed_case("05_batch3_row_major", {});
  const auto size = std::filesystem::file_size(path);
  for (const auto& [bytes, part] : std::vector<std::pair<uintmax_t, std::string>>{
           {size - 1, "truncated: tensor "}, {100, "does not fit a file of 100"}, {7, "7 bytes are no safetensors"}}) {
    parallel::barrier(test_support::world_tp());
    if (runtime().rank() == 0) std::filesystem::resize_file(path, bytes);
    parallel::barrier(test_support::world_tp());
    EXPECT_TRUE(contains(agreed_error(arguments_for(path)), part));
  }
}

TEST_F(Embed, RefusesOutputsThatCannotBeWritten) {
  auto arguments = any_size(arguments_for(case_path("02_one_image")));
  arguments.output = folder_.path() / "no such folder" / "out.safetensors";
  EXPECT_TRUE(contains(agreed_error(arguments), "cannot write "));
  arguments = any_size(arguments_for(case_path("02_one_image")));
  arguments.stats = folder_.path() / "no such folder" / "stats.json";
  EXPECT_TRUE(contains(agreed_error(arguments), "cannot write "));
}

TEST_F(Embed, RefusesUnknownOptionValues) {
  const auto good = arguments_for(case_path("02_one_image"));
  auto refused = [&](const std::function<void(EmbedArguments&)>& change, const std::string& part) {
    auto arguments = good;
    change(arguments);
    EXPECT_TRUE(contains(value_error(arguments), part));
  };
  refused([](auto& a) { a.dtype = "int8"; }, "--dtype int8: expected one of bfloat16, float32");
  refused([](auto& a) { a.exchange = "none"; }, "--exchange none: expected one of all-gather, fused");
  refused([](auto& a) { a.on_mismatch = ""; }, "--on-mismatch : expected one of error, truncate");
  refused([](auto& a) { a.projector_sharding = "rows"; },
          "--projector-sharding rows: expected one of column, replicated, row");
  refused([](auto& a) { a.embedding_sharding = "rows"; }, "--embedding-sharding rows: expected one of hidden, vocab");
  if (runtime().size() == 3) return;  // which doesn't divide H = 8
  refused(
      [](auto& a) {
        a.embedding_sharding = "hidden";
        a.projector_sharding = "row";
      },
      "a hidden-parallel embedding takes a column-sharded or a replicated projector");
  refused(
      [](auto& a) {
        a.embedding_sharding = "hidden";
        a.exchange = "all-gather";
      },
      "a hidden-parallel embedding goes with the fused exchange only");
}

}  // namespace megatron_cpp::step37
