// The mixture of experts: every layout of the ranks against a loop over experts in plain LibTorch.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "megatron_cpp/optimizer/gradient_buffer.h"
#include "megatron_cpp/training/expert_balance.h"
#include "megatron_cpp/training/trainer.h"
#include "megatron_cpp/transformer/moe/moe_layer.h"
#include "megatron_cpp/transformer/moe/token_dispatcher.h"
#include "parallel/collectives.h"
#include "parallel/shard.h"
#include "tests/megatron_cpp/transformer_fixture.h"
#include "tests/support/errors.h"
#include "tests/support/live_bytes.h"
#include "tests/support/operator_watch.h"
#include "tests/support/test_world.h"

namespace megatron_cpp {
namespace {

using parallel::RankGrid;
using namespace test_support;
using namespace transformer_fixture;

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
  moe.ffn_hidden_size = 24;  // for 8 ranks, too
  moe.shared_expert_ffn_hidden_size = 8;
  moe.router_scaling_factor = 3.0;
  return moe;
}

/// The same with every auxiliary loss.
MoEConfig balanced_moe() {
  auto moe = small_moe();
  moe.aux_loss_coeff = 0.7;
  moe.group_balance_loss_coeff = 0.3;
  moe.group_balance_groups = 4;
  moe.z_loss_coeff = 0.05;
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

/// Token by token: what balanced_moe()'s losses are by their formulas. `is_token` [n] on the CPU.
std::vector<at::Tensor> reference_losses(const at::Tensor& x, const at::Tensor& is_token, const Weights& w,
                                         const MoEConfig& moe) {
  if (moe.aux_loss_coeff == 0.0) return {};
  const int64_t E = moe.num_experts;
  const int64_t G = moe.group_balance_groups;
  const auto logits = at::linear(x, w.at("router.weight"));
  auto probabilities = at::zeros({E}, x.options());
  auto squares = at::zeros({}, x.options());
  std::vector<double> counts(static_cast<size_t>(E), 0.0);
  std::vector<double> reached(static_cast<size_t>(G), 0.0);
  double num_tokens = 0.0;
  const auto chosen_by = [&](const at::Tensor& values) {
    const auto chosen = std::get<1>(values.topk(moe.router_topk)).cpu();
    return std::vector<int64_t>(chosen.data_ptr<int64_t>(), chosen.data_ptr<int64_t>() + moe.router_topk);
  };
  for (int64_t token = 0; token < x.size(0); ++token) {
    if (!is_token[token].item<bool>()) continue;
    num_tokens += 1.0;
    const auto scores = logits[token].sigmoid();
    probabilities = probabilities + scores / scores.sum();
    squares = squares + logits[token].exp().sum().log().square();
    for (const auto expert : chosen_by(scores)) counts[static_cast<size_t>(expert)] += 1.0;
    std::vector<bool> reaches(static_cast<size_t>(G), false);
    for (const auto expert : chosen_by(scores + w.at("router.expert_bias"))) {
      reaches[static_cast<size_t>(expert / (E / G))] = true;
    }
    for (size_t group = 0; group < reaches.size(); ++group) reached[group] += reaches[group] ? 1.0 : 0.0;
  }
  const double T = std::max(num_tokens, 1.0);
  auto aux = at::zeros({}, x.options());
  auto by_group = at::zeros({}, x.options());
  for (int64_t expert = 0; expert < E; ++expert) {
    const auto probability = probabilities[expert];
    aux = aux + probability * counts[static_cast<size_t>(expert)];
    by_group = by_group + probability * reached[static_cast<size_t>(expert / (E / G))];
  }
  return {aux * (moe.aux_loss_coeff * static_cast<double>(E) / (static_cast<double>(moe.router_topk) * T * T)),
          by_group * (moe.group_balance_loss_coeff * static_cast<double>(G) / (T * T)),
          squares * (moe.z_loss_coeff / T)};
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
    const auto padding = normal_values({grid.dp, kBatch, S}, 6, at::kDouble).lt(-0.4);
    const auto expected = reference(batches.view({-1, kHidden}), weights, moe, layer).view_as(batches);
    std::vector<std::vector<at::Tensor>> expected_losses;
    const auto weighted = [](at::Tensor sum, const std::vector<at::Tensor>& losses, int64_t replica) {
      for (const auto& loss : losses) sum = sum + loss * static_cast<double>(replica + 2);  // as its loss tokens weigh
      return sum;
    };
    auto expected_sum = (expected * output_gradients).sum();
    for (int64_t replica = 0; replica < grid.dp; ++replica) {
      const auto is_token = padding[replica].t().reshape({-1}).logical_not().cpu();
      expected_losses.push_back(reference_losses(batches[replica].view({-1, kHidden}), is_token, weights, moe));
      expected_sum = weighted(expected_sum, expected_losses.back(), replica);
    }
    expected_sum.backward();

    const int replica = groups.dp->getRank();
    const auto own = [&](const at::Tensor& all) {
      const auto batch = all[replica];
      return sequence_parallel ? test_support::part(batch, 0, groups.tp) : batch;
    };
    const auto input = leaf(own(batches));
    GradientBuffer buffer(shards, groups);
    RouterStatistics statistics(padding[replica]);
    const auto output = module->forward(input, &statistics);
    const auto losses = statistics.losses(moe, groups.tp);
    const auto what = grid.text() + (sequence_parallel ? " sequence parallel" : "");
    compare(output, own(expected), what, kExact);
    ASSERT_EQ(losses.size(), router_loss_names(moe).size());
    for (size_t i = 0; i < losses.size(); ++i) {
      compare(losses[i], expected_losses[static_cast<size_t>(replica)][i], what + ": " + router_loss_names(moe)[i],
              kExact);
    }
    const auto num_tokens = padding[replica].logical_not().sum().item<double>();
    EXPECT_EQ(parallel::all_reduce(statistics.tokens_per_expert(), groups.tp).sum().item<double>(),
              num_tokens * static_cast<double>(moe.router_topk));
    weighted((output * own(output_gradients)).sum(), losses, replica).backward();
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
      expect_like_reference(grid, sequence_parallel, 8, balanced_moe(), clamped());
    }
  }
}

TEST_F(MoETest, TokensThatRanksCanNotShareEvenly) {
  for (const auto& grid : grids()) {
    for (const int64_t S : {1, 3}) expect_like_reference(grid, false, S, balanced_moe(), clamped());
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
      expect_like_reference(grid, true, 8, moe, LayerConfig{.has_experts = true}, [&](Weights& weights) {
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
  const TokenDispatcher dispatcher(on_device(experts), 8,
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

// ---- a training step ----

/// Four micro-batches a step, shared out among the replicas; the last of each has padding.
struct TrainedLayer {
  /// Enough to drive apart replicas that differ a little; fewer at 4 ranks, where there are many layouts.
  const int64_t num_steps = runtime().size() > 2 ? 6 : 20;
  static constexpr int64_t kS = 8;
  static constexpr int64_t kMicroBatches = 8;

  explicit TrainedLayer(const parallel::ProcessGroups& process_groups) : groups(process_groups) {
    moe.router_bias_update_rate = 0.05;
    layer = MoELayer(config_of(moe), clamped(), TransformerExecution{}, groups);
    shards = start(layer);
    layer->to(runtime().device(), at::kDouble);
    shards = parameter_shards(*layer);
    balance = std::make_shared<ExpertBalance>(std::vector<MoELayer>{layer}, groups);
  }

  std::vector<StepResult> train() {
    TrainerOptions options;
    options.learning_rate = {.peak = 0.02, .floor = 0.02, .total_steps = num_steps};
    options.clip_grad_norm = 0.05;
    options.auxiliary_losses = router_loss_names(moe);
    options.expert_balance = balance;
    Trainer trainer(shards, groups, options);
    const int64_t own = kMicroBatches / groups.dp->getSize();
    const auto padding = at::zeros({kBatch, kS}, at::kLong);
    padding.narrow(1, kS - 3, 3).fill_(1);
    std::vector<StepResult> results;
    for (int64_t step = 0; step < num_steps; ++step) {
      const auto x = normal_values({kMicroBatches, kS, kBatch, kHidden}, 10 + static_cast<uint64_t>(step), at::kDouble);
      results.push_back(trainer.step(
          [&](int64_t i) {
            const int64_t number = own * groups.dp->getRank() + i;
            RouterStatistics statistics(number == kMicroBatches - 1 ? on_device(padding) : at::Tensor());
            LossSum sum = (layer->forward(x[number], &statistics) - x[number].roll(1, 2)).square().sum();
            const auto num_loss_tokens = static_cast<double>(number + 3);
            for (const auto& loss : statistics.losses(moe, groups.tp)) sum.auxiliary.push_back(loss * num_loss_tokens);
            balance->add(statistics);
            return sum;
          },
          own, kMicroBatches * (kMicroBatches + 5) / 2));
    }
    return results;
  }

  parallel::ProcessGroups groups;
  MoEConfig moe = balanced_moe();
  MoELayer layer{nullptr};
  std::vector<ParameterShard> shards;
  std::shared_ptr<ExpertBalance> balance;
};

TEST_F(MoETest, StepsAreThoseOfOneRank) {
  const auto& one = single();
  TrainedLayer reference({{}, one, one, one, one, one, one, one, one});
  const auto bias_before = reference.layer->router->expert_bias.clone();
  const auto expected = reference.train();
  EXPECT_FALSE(at::equal(reference.layer->router->expert_bias, bias_before));
  for (const auto& result : expected) EXPECT_GT(result.grad_norm, 0.05);  // each is clipped
  std::map<std::string, at::Tensor> whole;
  for (const auto& shard : reference.shards) {
    for (const auto& segment : shard.segments) whole[segment.name] = segment.in_local(shard.parameter).detach();
  }
  for (const auto& grid : grids()) {
    SCOPED_TRACE(grid.text());
    TrainedLayer trained(test_support::groups(grid));
    const auto results = trained.train();
    for (size_t step = 0; step < results.size(); ++step) {
      EXPECT_NEAR(results[step].loss / expected[step].loss, 1.0, 1e-9);
      EXPECT_NEAR(results[step].grad_norm / expected[step].grad_norm, 1.0, 1e-9);
      for (const auto member : {&StepResult::auxiliary_losses, &StepResult::metrics}) {
        const auto& numbers = results[step].*member;
        const auto& expected_numbers = expected[step].*member;
        ASSERT_EQ(numbers.size(), expected_numbers.size());
        for (size_t i = 0; i < numbers.size(); ++i) {
          EXPECT_EQ(numbers[i].first, expected_numbers[i].first);
          EXPECT_NEAR(numbers[i].second / expected_numbers[i].second, 1.0, 1e-9) << numbers[i].first;
        }
      }
    }
    for (const auto& shard : trained.shards) {
      for (const auto& segment : shard.segments) {
        compare(segment.in_local(shard.parameter), segment.in_global(whole.at(segment.name)), segment.name, 1e-8);
      }
      const auto& copies = trained.groups.of(shard.domain.replicated_over());
      EXPECT_TRUE(test_support::equal(parallel::all_reduce(shard.parameter, copies, parallel::Reduction::kMax),
                                      parallel::all_reduce(shard.parameter, copies, parallel::Reduction::kMin)))
          << shard.name;
    }
    EXPECT_TRUE(test_support::equal(trained.layer->router->expert_bias, whole.at("router.expert_bias")));
  }
}

TEST_F(MoETest, BiasesGrowWhereTokensAreFew) {
  const auto& groups = test_support::groups(RankGrid{.tp = 1, .dp = runtime().size()});
  auto moe = small_moe();
  moe.router_bias_update_rate = 0.25;
  MoELayer layer(config_of(moe), clamped(), TransformerExecution{}, groups);
  start(layer);
  {
    const at::NoGradGuard no_grad;
    for (int64_t expert = 0; expert < 8; ++expert) {  // norms 4, 8, .. 32
      layer->experts->linear_fc1[expert].zero_()[0][0].fill_(4.0 * static_cast<double>(expert + 1));
      layer->experts->linear_fc2[expert].zero_();
    }
    layer->router->expert_bias.zero_();
  }
  ExpertBalance balance({layer}, groups);
  // Two tokens of each rank to experts 0, 1, 2, one of them also in 3: three experts a token.
  const auto experts = on_device(integers({0, 1, 2, 0, 1, 3}).view({2, 3}));
  RouterStatistics statistics;
  statistics.add({experts, on_device(at::ones({2, 3}))}, small_moe(), 0);
  balance.add(statistics);
  const auto numbers = balance.reduce().cpu();
  const double size = runtime().size();
  EXPECT_TRUE(
      test_support::equal(balance.tokens_per_expert(),
                          at::tensor({2.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0}).to(at::kDouble).unsqueeze(0) * size));
  EXPECT_DOUBLE_EQ(numbers[0].item<double>(), 2.0 / (6.0 / 8.0));
  EXPECT_DOUBLE_EQ(numbers[1].item<double>(), 32.0 / 16.0);
  balance.update_biases();
  EXPECT_TRUE(test_support::equal(layer->router->expert_bias,
                                  at::tensor({-0.25F, -0.25F, -0.25F, -0.25F, 0.25F, 0.25F, 0.25F, 0.25F})));
  balance.zero();
  EXPECT_EQ(balance.tokens_per_expert().sum().item<double>(), 0.0);
  EXPECT_TRUE(
      contains(error_of<c10::ValueError>([&] { ExpertBalance({}, groups); }), "no layer has experts to balance"));
}

// On a GPU each of these operators waits until all that was asked of it is done.
TEST_F(MoETest, BalancingReadsNothingBack) {
  const auto& groups = test_support::groups(runtime().size());
  auto moe = balanced_moe();
  moe.router_bias_update_rate = 0.1;
  MoELayer layer(config_of(moe), clamped(), TransformerExecution{}, groups);
  start(layer);
  ExpertBalance balance({layer}, groups);
  const auto x = normal_values({6, kHidden}, 1);
  const auto padding = on_device(at::zeros({1, 6}, at::kLong));
  const OperatorWatch watch;
  RouterStatistics statistics(padding);
  statistics.add(layer->router->forward(x), moe, 0);
  for (const auto& loss : statistics.losses(moe, groups.tp)) loss.backward({}, /*retain_graph=*/true);
  balance.zero();
  balance.add(statistics);
  balance.reduce();
  balance.update_biases();
  EXPECT_GT(watch.count("aten::scatter_add_"), 0);
  EXPECT_EQ(watch.count("aten::_local_scalar_dense"), 0);
  EXPECT_EQ(watch.count("aten::nonzero"), 0);
  EXPECT_EQ(watch.copies_to_host(), 0);
}

TEST_F(MoETest, NumbersOfTrainingThatMakeNoSenseAreNamed) {
  const auto error = [](const std::function<void(MoEConfig&)>& change) {
    auto moe = small_moe();
    change(moe);
    return error_of<c10::ValueError>([&] { moe.validate(1, 1, 1); });
  };
  EXPECT_TRUE(contains(error([](auto& moe) { moe.aux_loss_coeff = -1; }), "moe_aux_loss_coeff -1 is negative"));
  EXPECT_TRUE(contains(error([](auto& moe) { moe.z_loss_coeff = -1; }), "moe_z_loss_coeff -1 is negative"));
  EXPECT_TRUE(contains(error([](auto& moe) { moe.group_balance_groups = 3; }),
                       "moe_group_balance_groups 3 does not divide num_experts 8"));
  EXPECT_TRUE(
      contains(error([](auto& moe) { moe.group_balance_loss_coeff = 1; }), "needs moe_group_balance_groups above 1"));
  EXPECT_TRUE(contains(error([](auto& moe) {
                         moe.router_bias_update_rate = 1;
                         moe.freeze_router = true;
                       }),
                       "would change the correction bias of a frozen router"));
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

TEST_F(MoETest, LogitsInFloat32KeepNoCopyOfBfloat16Tokens) {
  if (!runtime().device().is_cpu()) GTEST_SKIP() << "a CPU counts what is alive";
  constexpr int64_t kTokens = 512;
  constexpr int64_t kWide = 256;
  TopKRouter router(small_moe(), kWide, 0.5, GradientDomain::kReplicated);
  start(router);
  router->to(at::kBFloat16);
  const auto x = leaf(normal_values({kTokens, kWide}, 1, at::kBFloat16));
  const auto watch = std::make_shared<test_support::LiveBytes>();
  {
    const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, watch);
    const auto routing = router->forward(x);
    EXPECT_LT(watch->live(), kTokens * kWide * 4);
    routing.weights.square().sum().backward();
  }
  const auto reference = leaf(x.detach().to(at::kFloat));
  router->to(at::kFloat);
  const auto weight_gradient = router->weight.grad().clone();
  router->zero_grad();
  router->forward(reference).weights.square().sum().backward();
  compare(x.grad(), reference.grad(), "gradient of the tokens", 1e-2);
  compare(weight_gradient, router->weight.grad(), "gradient of the weight", 1e-2);
}

}  // namespace
}  // namespace megatron_cpp
