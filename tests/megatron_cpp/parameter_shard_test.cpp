#include "megatron_cpp/parameters/parameter_shard.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>
#include <torch/nn/pimpl.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "megatron_cpp/tensor_parallel/column_parallel_linear.h"
#include "megatron_cpp/tensor_parallel/language_model_embedding.h"
#include "megatron_cpp/tensor_parallel/row_parallel_linear.h"
#include "megatron_cpp/tensor_parallel/vocab_parallel_embedding.h"
#include "parallel/collectives.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp {
namespace {

using namespace test_support;

constexpr int64_t kV = 17;  // divisible by none of the group sizes but 1
constexpr int64_t kH = 8;
constexpr uint64_t kSeed = 1234;

/// A norm that is no ParallelModule: its parent speaks for it.
class PlainNorm : public torch::nn::Module {
 public:
  PlainNorm() { weight = register_parameter("weight", at::zeros({kH})); }
  at::Tensor weight;
};

/// One of everything: split by rows, by columns, by parts, with a padded vocabulary, and replicated.
class EverythingImpl : public ParallelModule {
 public:
  explicit EverythingImpl(const parallel::GroupPtr& tp, bool sequence_parallel = false) {
    using megatron_cpp::ColumnParallelLinearOptions;
    embedding = register_module("embedding", LanguageModelEmbedding(ParallelEmbeddingOptions(kV, kH), tp));
    qkv = register_module(
        "qkv", ColumnParallelLinear(
                   ColumnParallelLinearOptions(kH, {{"q_proj", 16}, {"k_proj", 4}, {"v_proj", 8}}).bias(true), tp));
    up = register_module("up", ColumnParallelLinear(ColumnParallelLinearOptions(kH, 12).bias(true), tp));
    down = register_module(
        "down",
        RowParallelLinear(
            RowParallelLinearOptions(12, kH).bias(true).sequence_parallel(sequence_parallel).init_std(0.005), tp));
    norm = register_module("norm", std::make_shared<PlainNorm>());
  }
  std::vector<ParameterShard> own_parameters() const override {
    return {replicated_parameter("norm.weight", norm->weight, GradientDomain::kReplicatedPartial,
                                 InitialValue::constant(1.0), false)};
  }

  LanguageModelEmbedding embedding{nullptr};
  ColumnParallelLinear qkv{nullptr};
  ColumnParallelLinear up{nullptr};
  RowParallelLinear down{nullptr};
  std::shared_ptr<PlainNorm> norm;
};
TORCH_MODULE(Everything);

/// A model's global tensors by name, from a group of one rank, where each is a whole segment.
std::map<std::string, at::Tensor> global_tensors(const std::vector<ParameterShard>& shards) {
  std::map<std::string, at::Tensor> result;
  for (const auto& shard : shards) {
    for (const auto& segment : shard.segments) {
      result[segment.name] = segment.in_local(shard.parameter.detach());
    }
  }
  return result;
}

const ParameterShard& named(const std::vector<ParameterShard>& shards, const std::string& name) {
  const auto found = std::find_if(shards.begin(), shards.end(), [&](const auto& shard) { return shard.name == name; });
  TORCH_CHECK(found != shards.end(), "no parameter ", name);
  return *found;
}

/// Speaks for `names` whatever they are, with a column-parallel layer below that speaks for itself.
class Speaker : public ParallelModule {
 public:
  Speaker(std::vector<std::string> names, const parallel::GroupPtr& tp) : names_(std::move(names)) {
    layer = register_module("layer", ColumnParallelLinear(ColumnParallelLinearOptions(kH, 4 * tp->getSize()), tp));
    scale = register_parameter("scale", at::ones({3}));
  }
  std::vector<ParameterShard> own_parameters() const override {
    std::vector<ParameterShard> result;
    for (const auto& name : names_) {
      result.push_back(
          replicated_parameter(name, scale, GradientDomain::kReplicated, InitialValue::constant(1.0), false));
    }
    return result;
  }
  ColumnParallelLinear layer{nullptr};
  at::Tensor scale;

 private:
  std::vector<std::string> names_;
};

}  // namespace

TEST(InitializeParameters, EverySliceIsThatOfTheWhole) {
  Everything whole(test_support::single());
  const auto whole_shards = parameter_shards(*whole);
  initialize_parameters(whole_shards, kSeed);
  const auto global = global_tensors(whole_shards);
  for (const int t : test_support::divisors_of_world()) {
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      Everything model(groups(t).tp);
      model->to(test_support::runtime().device(), dtype);
      const auto shards = parameter_shards(*model);
      for (const auto& shard : shards) {  // what was there before doesn't matter
        const at::NoGradGuard no_grad;
        auto parameter = shard.parameter;
        parameter.fill_(7);
      }
      initialize_parameters(shards, kSeed);
      for (const auto& shard : shards) {
        EXPECT_TRUE(shard.parameter.requires_grad()) << shard.name;
        int64_t covered = 0;
        for (const auto& segment : shard.segments) {
          const auto expected = segment.in_global(global.at(segment.name));
          EXPECT_TRUE(test_support::equal(segment.in_local(shard.parameter), expected.to(dtype)))
              << segment.name << " at t = " << t;
          covered += segment.box.numel();
        }
        // The rest is padding of the vocabulary.
        const auto padding = shard.parameter.flatten().narrow(0, covered, shard.parameter.numel() - covered);
        EXPECT_TRUE(test_support::equal(padding, at::zeros_like(padding))) << shard.name;
        if (shard.name != "embedding.word_embeddings.weight") {
          EXPECT_EQ(padding.numel(), 0) << shard.name;
        }
      }
    }
  }
}

TEST(InitializeParameters, DependsOnSeedAndName) {
  const auto make = [](uint64_t seed) {
    Everything model(test_support::single());
    const auto shards = parameter_shards(*model);
    initialize_parameters(shards, seed);
    return global_tensors(shards);
  };
  const auto first = make(kSeed);
  const auto again = make(kSeed);
  const auto other = make(kSeed + 1);
  for (const auto& [name, tensor] : first) {
    EXPECT_TRUE(test_support::equal(tensor, again.at(name))) << name;
    if (tensor.dim() == 2) {
      EXPECT_LT(tensor.eq(other.at(name)).sum().item<int64_t>(), 2) << name;
    }
  }
  // q and v differ in their names only where they overlap in shape.
  const auto q = first.at("qkv.q_proj.weight").narrow(0, 0, 8);
  EXPECT_LT(q.eq(first.at("qkv.v_proj.weight")).sum().item<int64_t>(), 2);
  EXPECT_EQ(first.at("norm.weight").eq(1.0).sum().item<int64_t>(), kH);
  EXPECT_EQ(first.at("up.bias").eq(0.0).sum().item<int64_t>(), 12);
}

TEST(InitializeParameters, IsNormal) {
  constexpr int64_t kRows = 300;
  constexpr int64_t kColumns = 401;  // odd: rows begin in the middle of a pair
  const auto parameter = at::empty({kRows, kColumns});
  initialize_parameters(
      {sharded_parameter("layer.weight", parameter, {kRows, kColumns}, 0, 0, InitialValue::normal(0.02), true)}, kSeed);
  const auto z = parameter.to(at::kDouble) / 0.02;
  const double n = kRows * kColumns;
  const double standard_error = 1 / std::sqrt(n);
  EXPECT_LT(std::abs(z.mean().item<double>()), 4 * standard_error);
  EXPECT_LT(std::abs(z.square().mean().item<double>() - 1), 4 * std::sqrt(2.0) * standard_error);
  EXPECT_LT(std::abs(z.pow(3).mean().item<double>()), 4 * std::sqrt(15.0) * standard_error);
  EXPECT_LT(std::abs(z.pow(4).mean().item<double>() - 3), 4 * std::sqrt(96.0) * standard_error);
  EXPECT_LT(z.abs().max().item<double>(), 6.0);
  // Neighbours along rows and columns are independent.
  const auto correlation = [&](int64_t dim) {
    const int64_t length = z.size(dim) - 1;
    return (z.narrow(dim, 0, length) * z.narrow(dim, 1, length)).mean().item<double>();
  };
  EXPECT_LT(std::abs(correlation(0)), 4 * standard_error);
  EXPECT_LT(std::abs(correlation(1)), 4 * standard_error);
}

TEST(InitializeParameters, AnySliceOfAnyDimension) {
  const auto whole = at::empty({5, 7, 3});
  const auto make = [](const at::Tensor& parameter, int64_t dim, int64_t begin) {
    initialize_parameters(
        {sharded_parameter("cube", parameter, {5, 7, 3}, dim, begin, InitialValue::normal(1.0), true)}, kSeed);
    return parameter;
  };
  make(whole, 0, 0);
  for (int64_t dim = 0; dim < 3; ++dim) {
    for (int64_t begin = 0; begin < whole.size(dim); ++begin) {
      for (int64_t length = 1; begin + length <= whole.size(dim); ++length) {
        auto shape = whole.sizes().vec();
        shape[static_cast<size_t>(dim)] = length;
        EXPECT_TRUE(test_support::equal(make(at::empty(shape), dim, begin), whole.narrow(dim, begin, length)))
            << "dimension " << dim << ", [" << begin << ", " << begin + length << ")";
      }
    }
  }
}

TEST(ParameterShards, HaveFullNamesInTheOrderOfTheTree) {
  Everything model(test_support::world_tp());
  std::vector<std::string> names;
  std::vector<std::string> segments;
  for (const auto& shard : parameter_shards(*model)) {
    names.push_back(shard.name);
    for (const auto& segment : shard.segments) segments.push_back(segment.name);
  }
  EXPECT_EQ(names, (std::vector<std::string>{"norm.weight", "embedding.word_embeddings.weight", "qkv.weight",
                                             "qkv.bias", "up.weight", "up.bias", "down.weight", "down.bias"}));
  EXPECT_EQ(segments,
            (std::vector<std::string>{"norm.weight", "embedding.word_embeddings.weight", "qkv.q_proj.weight",
                                      "qkv.k_proj.weight", "qkv.v_proj.weight", "qkv.q_proj.bias", "qkv.k_proj.bias",
                                      "qkv.v_proj.bias", "up.weight", "up.bias", "down.weight", "down.bias"}));
}

TEST(ParameterShards, SayHowGradientsAreCompleted) {
  for (const int t : test_support::divisors_of_world()) {
    for (const bool sequence_parallel : {false, true}) {
      Everything model(groups(t).tp, sequence_parallel);
      const auto shards = parameter_shards(*model);
      for (const auto* name :
           {"embedding.word_embeddings.weight", "qkv.weight", "qkv.bias", "up.weight", "up.bias", "down.weight"}) {
        EXPECT_EQ(named(shards, name).domain, GradientDomain::kSharded) << name;
      }
      EXPECT_EQ(named(shards, "down.bias").domain,
                sequence_parallel ? GradientDomain::kReplicatedPartial : GradientDomain::kReplicated);
      EXPECT_EQ(named(shards, "norm.weight").domain, GradientDomain::kReplicatedPartial);
      for (const auto& shard : shards) {
        const bool is_matrix = shard.parameter.dim() == 2;
        EXPECT_EQ(shard.weight_decay, is_matrix) << shard.name;
        EXPECT_EQ(shard.initial_value.kind, is_matrix ? InitialValue::Kind::kNormal : InitialValue::Kind::kConstant)
            << shard.name;
      }
      EXPECT_EQ(named(shards, "up.weight").initial_value.value, 0.02);
      EXPECT_EQ(named(shards, "down.weight").initial_value.value, 0.005);
      EXPECT_EQ(named(shards, "norm.weight").initial_value.value, 1.0);
    }
  }
}

// Over the ranks of a group, the segments of a sharded tensor are all of it, once, without the vocabulary's padding.
// Those of another one are all of it on each rank.
TEST(ParameterShards, SegmentsTileTheGlobalTensors) {
  for (const int t : test_support::divisors_of_world()) {
    Everything model(groups(t).tp);
    for (const auto& shard : parameter_shards(*model)) {
      for (const auto& segment : shard.segments) {
        auto own = segment.box.begin;
        own.insert(own.end(), segment.box.length.begin(), segment.box.length.end());
        const auto all = parallel::all_gather(at::tensor(own, at::kLong).unsqueeze(0), groups(t).tp);
        std::vector<Box> boxes;
        for (int64_t r = 0; r < t; ++r) {
          const auto* row = all[r].const_data_ptr<int64_t>();
          const auto dims = segment.global_shape.size();
          const Box box{{row, row + dims}, {row + dims, row + 2 * dims}};
          if (shard.domain != GradientDomain::kSharded) {
            EXPECT_EQ(box, Box::whole(segment.global_shape)) << segment.name;
          } else if (box.numel() > 0) {
            boxes.push_back(box);
          }
        }
        if (shard.domain != GradientDomain::kSharded) continue;
        EXPECT_FALSE(find_cover_fault(segment.global_shape, boxes).has_value()) << segment.name;
      }
    }
  }
}

TEST(ParameterShards, AVocabularyShardMayBeAllPadding) {
  for (const int t : test_support::divisors_of_world()) {
    const auto& tp = groups(t).tp;
    VocabParallelEmbedding embedding(ParallelEmbeddingOptions(1, kH), tp);
    const auto shards = parameter_shards(*embedding);
    EXPECT_EQ(shards.size(), 1U);
    EXPECT_EQ(shards.at(0).name, "weight");
    EXPECT_EQ(shards.at(0).segments[0].box, (Box{{0, 0}, {tp->getRank() == 0 ? 1 : 0, kH}}));
    EXPECT_EQ(shards.at(0).segments[0].global_shape, (std::vector<int64_t>{1, kH}));
    initialize_parameters(shards, kSeed);
    EXPECT_EQ(embedding->weight.eq(0).all().item<bool>(), tp->getRank() != 0);
  }
}

TEST(ParameterShards, ReplicatedAndShardedDescribeTheWhole) {
  const auto parameter = at::ones({3, 5});
  const auto replicated =
      replicated_parameter("a", parameter, GradientDomain::kReplicated, InitialValue::constant(2.0), true);
  ASSERT_EQ(replicated.segments.size(), 1U);
  EXPECT_EQ(replicated.segments[0].global_shape, (std::vector<int64_t>{3, 5}));
  EXPECT_EQ(replicated.segments[0].box, Box::whole({3, 5}));
  EXPECT_EQ(replicated.segments[0].local_begin, (std::vector<int64_t>{0, 0}));
  EXPECT_EQ(replicated.domain, GradientDomain::kReplicated);
  EXPECT_TRUE(replicated.parameter.is_same(parameter));
  const auto sharded = sharded_parameter("b", parameter, {3, 20}, 1, 10, InitialValue::normal(0.1), false);
  EXPECT_EQ(sharded.domain, GradientDomain::kSharded);
  ASSERT_EQ(sharded.segments.size(), 1U);
  EXPECT_EQ(sharded.segments[0].box, (Box{{0, 10}, {3, 5}}));
  EXPECT_EQ(sharded.segments[0].local_begin, (std::vector<int64_t>{0, 0}));
  EXPECT_FALSE(sharded.weight_decay);
}

TEST(ParameterShards, RefuseAParameterThatNobodySpeaksFor) {
  const Speaker silent({}, test_support::world_tp());
  EXPECT_EQ(value_error([&] { parameter_shards(silent); }),
            "no parallel module says how parameter scale is sharded: give it to a ParallelModule that lists "
            "it in own_parameters()");
  const Speaker well({"scale"}, test_support::world_tp());
  EXPECT_EQ(parameter_shards(well).size(), 2U);

  // A module that is none of ours at the root: its child speaks with its prefix, and only for itself.
  torch::nn::Module root;
  root.register_module("first", std::make_shared<Speaker>(std::vector<std::string>{"scale"}, test_support::world_tp()));
  const auto shards = parameter_shards(root);
  ASSERT_EQ(shards.size(), 2U);
  EXPECT_EQ(shards[0].name, "first.scale");
  EXPECT_EQ(shards[1].segments[0].name, "first.layer.weight");
  root.register_module("plain", std::make_shared<PlainNorm>());
  EXPECT_NE(value_error([&] { parameter_shards(root); }).find("parameter plain.weight"), std::string::npos);
}

TEST(ParameterShards, RefuseAParameterThatTwoSpeakFor) {
  const Speaker both({"scale", "layer.weight"}, test_support::world_tp());
  EXPECT_EQ(value_error([&] { parameter_shards(both); }), "parameter layer.weight is listed by two parallel modules");
  const Speaker twice({"scale", "scale"}, test_support::world_tp());
  EXPECT_NE(value_error([&] { parameter_shards(twice); }).find("parameter scale"), std::string::npos);
}

}  // namespace megatron_cpp
