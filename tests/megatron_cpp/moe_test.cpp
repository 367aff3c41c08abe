// The mixture of experts: every layout of the ranks against a loop over experts in plain LibTorch.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <map>
#include <string>
#include <vector>

#include "megatron_cpp/optimizer/gradient_buffer.h"
#include "megatron_cpp/transformer/moe/moe_layer.h"
#include "megatron_cpp/transformer/moe/token_dispatcher.h"
#include "parallel/collectives.h"
#include "parallel/shard.h"
#include "tests/megatron_cpp/transformer_fixture.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp {
namespace {

using parallel::RankGrid;
using namespace test_support;
using namespace transformer_fixture;

constexpr double kExact = 1e-11;  // of the largest element; float64 sums in another order
constexpr int64_t kHidden = 12;
constexpr int64_t kBatch = 2;

TransformerConfig config_of(const MoEConfig& moe) {
  TransformerConfig config;
  config.hidden_size = kHidden;
  config.init_std = 0.3;
  config.moe = moe;
  return config;
}

MoEConfig small_moe() {
  MoEConfig moe;
  moe.num_experts = 8;
  moe.router_topk = 3;
  moe.ffn_hidden_size = 20;
  moe.shared_expert_ffn_hidden_size = 8;
  moe.router_scaling_factor = 3.0;
  return moe;
}

LayerConfig clamped() {
  LayerConfig layer;
  layer.has_experts = true;
  layer.swiglu_limit = 0.4;
  layer.expert_swiglu_limit = 0.3;
  return layer;
}

/// All parameters of a layer, whole, by the names of their segments.
using Weights = std::map<std::string, at::Tensor>;

MoELayer whole_layer(const MoEConfig& moe, const LayerConfig& layer) {
  MoELayer module(config_of(moe), layer, TransformerExecution{}, single());
  start(module);
  module->to(at::kDouble);
  return module;
}

Weights weights_of(MoELayer& module) {
  Weights weights;
  for (const auto& shard : parameter_shards(*module)) {
    for (const auto& segment : shard.segments) weights[segment.name] = leaf(segment.in_local(shard.parameter));
  }
  return weights;
}

at::Tensor swiglu_of(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up, const at::Tensor& down,
                     double limit) {
  auto g = at::silu(at::linear(x, gate));
  auto u = at::linear(x, up);
  if (limit > 0.0) {
    g = g.clamp_max(limit);
    u = u.clamp(-limit, limit);
  }
  return at::linear(g * u, down);
}

/// The formulas of the published model (step3p7 in transformers), a loop over experts: x [n, H] -> [n, H].
at::Tensor reference(const at::Tensor& x, const Weights& w, const MoEConfig& moe, const LayerConfig& layer) {
  const auto scores = at::linear(x, w.at("router.weight")).sigmoid();
  const auto chosen = std::get<1>((scores + w.at("router.expert_bias")).topk(moe.router_topk, -1));
  const auto values = scores.gather(1, chosen);
  const auto shares = values / values.sum(-1, true);
  auto sum = at::zeros_like(x);
  for (int64_t expert = 0; expert < moe.num_experts; ++expert) {
    const auto share = (shares * chosen.eq(expert)).sum(-1, true);
    sum = sum + share * swiglu_of(x, w.at("experts.gate_proj.weight")[expert], w.at("experts.up_proj.weight")[expert],
                                  w.at("experts.down_proj.weight")[expert], layer.expert_swiglu_limit);
  }
  sum = sum * moe.router_scaling_factor;
  if (moe.shared_expert_ffn_hidden_size == 0) return sum;
  return sum + swiglu_of(x, w.at("shared_experts.linear_fc1.gate_proj.weight"),
                         w.at("shared_experts.linear_fc1.up_proj.weight"), w.at("shared_experts.linear_fc2.weight"),
                         layer.swiglu_limit);
}

/// Every grid of the world: all ways to lay out dense layers and experts.
std::vector<RankGrid> grids() {
  const int size = runtime().size();
  std::vector<RankGrid> result;
  for (const int tp : divisors_of_world()) {
    for (const int ep : divisors_of_world()) {
      for (const int etp : divisors_of_world()) {
        if (size % (ep * etp) == 0) result.push_back({.tp = tp, .dp = size / tp, .ep = ep, .etp = etp});
      }
    }
  }
  return result;
}

class MoETest : public TransformerTest {
 protected:
  /// Compares outputs and all gradients of a layer in one layout with the reference.
  /// @param S  positions of each data-parallel replica's batch.
  void expect_like_reference(
      const RankGrid& grid, bool sequence_parallel, int64_t S, const MoEConfig& moe, const LayerConfig& layer,
      const std::function<void(Weights&)>& change = [](Weights&) {}, bool accumulate_into_grad = false) {
    const auto& groups = test_support::groups(grid);
    auto whole = whole_layer(moe, layer);
    auto weights = weights_of(whole);
    {
      const at::NoGradGuard no_grad;
      change(weights);
    }
    MoELayer module(
        config_of(moe), layer,
        TransformerExecution{.sequence_parallel = sequence_parallel, .accumulate_into_grad = accumulate_into_grad},
        groups);
    module->to(runtime().device(), at::kDouble);
    const auto shards = parameter_shards(*module);
    for (const auto& shard : shards) {
      const at::NoGradGuard no_grad;
      for (const auto& segment : shard.segments) {
        segment.in_local(shard.parameter).copy_(segment.in_global(weights.at(segment.name)));
      }
    }

    // One batch for each replica; the reference sees them all.
    const auto batches = leaf(normal_values({grid.dp, S, kBatch, kHidden}, 3, at::kDouble));
    const auto output_gradients = normal_values({grid.dp, S, kBatch, kHidden}, 4, at::kDouble);
    const auto expected = reference(batches.view({-1, kHidden}), weights, moe, layer).view_as(batches);
    expected.backward(output_gradients);

    const int replica = groups.dp->getRank();
    const auto own = [&](const at::Tensor& all) {
      const auto batch = all[replica];
      return sequence_parallel ? test_support::part(batch, 0, groups.tp) : batch;
    };
    const auto input = leaf(own(batches));
    GradientBuffer buffer(shards, groups);
    const auto output = module->forward(input);
    const auto what = grid.text() + (sequence_parallel ? " sequence parallel" : "");
    compare(output, own(expected), what, kExact);
    output.backward(own(output_gradients));
    buffer.reduce();
    compare(input.grad(), own(batches.grad()), what + ": input", kExact);
    double squares = 0.0;
    for (const auto& [name, tensor] : weights) {
      if (tensor.grad().defined()) squares += tensor.grad().square().sum().item<double>();
    }
    EXPECT_NEAR(buffer.norm() / std::sqrt(squares), 1.0, kExact) << what;
    for (const auto& shard : shards) {
      if (shard.name == "router.expert_bias") {
        EXPECT_FALSE(shard.parameter.grad().defined()) << what;
        continue;
      }
      for (const auto& segment : shard.segments) {
        const auto& gradient = weights.at(segment.name).grad();
        compare(segment.in_local(shard.parameter.grad()),
                segment.in_global(gradient.defined() ? gradient : at::zeros_like(weights.at(segment.name))),
                what + ": " + segment.name, kExact);
      }
    }
  }
};

TEST_F(MoETest, EveryLayoutComputesTheLoopOverExperts) {
  for (const auto& grid : grids()) {
    for (const bool sequence_parallel : {false, true}) {
      expect_like_reference(grid, sequence_parallel, 8, small_moe(), clamped());
    }
  }
}

TEST_F(MoETest, TokensThatRanksCanNotShareEvenly) {
  for (const auto& grid : grids()) {
    for (const int64_t S : {1, 3}) expect_like_reference(grid, false, S, small_moe(), clamped());
  }
}

TEST_F(MoETest, GradientsAccumulate) {
  for (const auto& grid : grids()) {
    expect_like_reference(
        grid, true, 8, small_moe(), clamped(), [](Weights&) {}, /*accumulate_into_grad=*/true);
  }
}

// Two, since the weight of a single one is always 1, without a gradient. Most ranks then get no token.
TEST_F(MoETest, AllTokensMayGoToTheSameExperts) {
  auto moe = small_moe();
  moe.router_topk = 2;
  moe.shared_expert_ffn_hidden_size = 0;
  for (const int64_t expert : {0, 5}) {
    for (const auto& grid : grids()) {
      expect_like_reference(grid, true, 4, moe, LayerConfig{.has_experts = true}, [&](Weights& weights) {
        weights.at("router.expert_bias").zero_().narrow(0, expert, 2).fill_(10.0);
      });
    }
  }
}

TEST_F(MoETest, ExpertsInAnotherOrderChangeNothing) {
  auto whole = whole_layer(small_moe(), clamped());
  const auto x = normal_values({6, kBatch, kHidden}, 5, at::kDouble);
  const auto before = whole->forward(x).detach();
  const auto order = integers({7, 2, 5, 0, 1, 6, 3, 4});
  const at::NoGradGuard no_grad;
  for (auto& tensor :
       {whole->router->weight, whole->router->expert_bias, whole->experts->linear_fc1, whole->experts->linear_fc2}) {
    tensor.copy_(tensor.index_select(0, order));
  }
  compare(whole->forward(x), before, "permuted", kExact);
}

TEST_F(MoETest, RepeatsBitForBit) {
  const int size = runtime().size();
  const RankGrid grid{.tp = size, .ep = size, .etp = 1};
  MoELayer module(config_of(small_moe()), clamped(), TransformerExecution{.sequence_parallel = true},
                  test_support::groups(grid));
  start(module);
  const auto run = [&] {
    const auto x = leaf(normal_values({16, kBatch, kHidden}, 100 + static_cast<uint64_t>(runtime().rank())));
    module->zero_grad();
    const auto output = module->forward(x);
    output.sum().backward();
    std::vector<at::Tensor> results{output.detach(), x.grad().clone()};
    for (const auto& parameter : module->parameters()) {
      if (parameter.grad().defined()) results.push_back(parameter.grad().clone());
    }
    return results;
  };
  const auto first = run();
  const auto second = run();
  for (size_t i = 0; i < first.size(); ++i) EXPECT_TRUE(test_support::equal(second[i], first[i])) << i;
}

TEST_F(MoETest, CountsTheTokensOfEachExpert) {
  const int size = runtime().size();
  const auto& groups = test_support::groups(RankGrid{.tp = size, .ep = size, .etp = 1});
  // Rank r has r+1 tokens, which all go to experts r and 7.
  const int64_t n = groups.tp->getRank() + 1;
  const auto experts = at::stack({at::full({n}, n - 1, at::kLong), at::full({n}, 7, at::kLong)}, 1);
  const TokenDispatcher dispatcher({on_device(experts), on_device(at::ones({n, 2}))}, 8,
                                   parallel::even_shard(8, size, groups.tp->getRank(), "experts"), groups);
  std::vector<int64_t> expected(8, 0);
  for (int64_t rank = 0; rank < size; ++rank) {
    expected[static_cast<size_t>(rank)] += rank + 1;
    expected[7] += rank + 1;
  }
  EXPECT_EQ(dispatcher.tokens_per_expert(), expected);
}

TEST_F(MoETest, SizesThatRanksCanNotShareAreNamed) {
  const int size = runtime().size();
  if (size == 1) return;
  const auto& groups = test_support::groups(RankGrid{.tp = size, .ep = size, .etp = 1});
  auto moe = small_moe();
  moe.num_experts = 9;
  EXPECT_TRUE(
      contains(error_of<c10::ValueError>([&] { MoELayer(config_of(moe), clamped(), TransformerExecution{}, groups); }),
               "num_experts 9 is not divisible by expert-parallel size"));
}

// ---- the router alone ----

TopKRouter router_of(const MoEConfig& moe) {
  TopKRouter router(moe, kHidden, 0.3, GradientDomain::kReplicated);
  start(router);
  return router;
}

TEST_F(MoETest, TheBiasChangesTheChoiceNotTheWeights) {
  auto moe = small_moe();
  moe.router_topk = moe.num_experts;  // all are chosen, so the weights of both can be compared
  auto router = router_of(moe);
  const auto x = normal_values({5, kHidden}, 1);
  const auto weights_by_expert = [](const Routing& routing) {
    return at::zeros({5, 8}).scatter(1, routing.experts, routing.weights.detach());
  };
  const auto before = weights_by_expert(router->forward(x));
  {
    const at::NoGradGuard no_grad;
    router->expert_bias.copy_(at::arange(8).neg());
  }
  const auto routing = router->forward(x);
  EXPECT_TRUE(test_support::equal(routing.experts, at::arange(8).expand({5, 8}))) << routing.experts;
  compare(weights_by_expert(routing), before, "weights", 1e-6);
  EXPECT_FALSE(router->expert_bias.requires_grad());
}

TEST_F(MoETest, OfEqualScoresTheLowerExpertWins) {
  auto router = router_of(small_moe());
  const at::NoGradGuard no_grad;
  router->weight.zero_();
  router->expert_bias.zero_();
  const auto routing = router->forward(normal_values({4, kHidden}, 1));
  EXPECT_TRUE(test_support::equal(routing.experts, integers({0, 1, 2}).expand({4, 3})));
  compare(routing.weights, at::ones({4, 3}), "weights");  // a third each, times 3
}

// transformers computes 0/0 there.
TEST_F(MoETest, ScoresThatAreZeroInFloat32GiveEqualWeights) {
  auto router = router_of(small_moe());
  const auto x = at::ones({1, kHidden});
  {
    const at::NoGradGuard no_grad;
    router->weight.fill_(-20.0);
  }
  const auto routing = router->forward(x);
  compare(routing.weights, at::ones({1, 3}), "weights");
  routing.weights.sum().backward();
  EXPECT_TRUE(router->weight.grad().isfinite().all().item<bool>());
}

TEST_F(MoETest, TheRouterCanBeFrozen) {
  auto moe = small_moe();
  moe.freeze_router = true;
  EXPECT_FALSE(router_of(moe)->weight.requires_grad());
}

TEST_F(MoETest, LogitsOfBfloat16TokensCanBeInFloat32) {
  auto moe = small_moe();
  moe.router_topk = moe.num_experts;
  const auto x = normal_values({64, kHidden}, 1, at::kBFloat16);
  auto router = router_of(moe);
  router->to(at::kBFloat16);
  const auto wide = router->forward(x);
  EXPECT_EQ(wide.weights.scalar_type(), at::kFloat);
  moe.router_in_float32 = false;
  auto narrow = router_of(moe);
  narrow->to(at::kBFloat16);
  const auto scores = at::linear(x, narrow->weight).to(at::kFloat).sigmoid();
  const auto expected = scores / scores.sum(-1, true) * 3.0;
  const auto routing = narrow->forward(x);
  compare(routing.weights, expected.gather(1, routing.experts), "logits in bfloat16", 1e-6);
  EXPECT_FALSE(test_support::near(wide.weights, expected.gather(1, wide.experts), 1e-6));
}

}  // namespace
}  // namespace megatron_cpp
