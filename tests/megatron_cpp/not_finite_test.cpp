// Steps whose numbers aren't finite: repeated in place, told apart by whether the numbers change, left out or refused,
// and named; in every layout.
#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "megatron_cpp/tensor_parallel/vocab_parallel_cross_entropy.h"
#include "megatron_cpp/training/expert_balance.h"
#include "megatron_cpp/training/not_finite_search.h"
#include "megatron_cpp/training/trainer.h"
#include "megatron_cpp/transformer/gpt_model.h"
#include "megatron_cpp/transformer/moe/router_statistics.h"
#include "parallel/errors.h"
#include "parallel/host_name.h"
#include "tests/megatron_cpp/transformer_fixture.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp {
namespace {

using parallel::RankGrid;
using namespace test_support;
using namespace transformer_fixture;

constexpr int64_t kS = 8;
constexpr int64_t kMicroBatchesOfAll = 4;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Layout {
  RankGrid grid;
  bool distributed_optimizer;
};

/// tp, dp and ep together with a distributed optimizer, and dp alone without.
std::vector<Layout> layouts() {
  const int size = runtime().size();
  const int tp = std::min(2, size);
  return {{{.tp = tp, .dp = size / tp, .ep = size, .etp = 1}, true}, {{.tp = 1, .dp = size, .ep = 1, .etp = 1}, false}};
}

/// What a fault does to the loss of a micro-batch.
using Fault = std::function<at::Tensor(const at::Tensor& loss, int pass, int64_t micro_batch)>;

/// Training steps of a decoder of two layers, the second with experts.
struct SmallTraining {
  explicit SmallTraining(const Layout& layout, NotFiniteAction action = NotFiniteAction::kStop)
      : groups(test_support::groups(layout.grid)) {
    auto config = small_decoder({{.num_attention_heads = 4}, {.num_attention_heads = 4, .has_experts = true}});
    MoEConfig moe{.num_experts = 8, .router_topk = 2, .ffn_hidden_size = 8};
    moe.router_bias_update_rate = 0.05;
    config.moe = moe;
    model = GPTModel(config, TransformerExecution{}, groups);
    shards = start(model);
    balance = std::make_shared<ExpertBalance>(model->decoder->moe_layers(), groups);
    TrainerOptions options;
    options.learning_rate = {.peak = 0.02, .floor = 0.02, .total_steps = 9};
    options.gradients = {.distributed_optimizer = layout.distributed_optimizer, .bucket_elements = 4000};
    options.expert_balance = balance;
    options.not_finite = action;
    options.max_skipped_steps = 2;
    trainer = std::make_unique<Trainer>(shards, groups, options);
  }

  StepResult step(const Fault& fault = {}) {
    const int64_t own = kMicroBatchesOfAll / groups.dp->getSize();
    int pass = 0;
    const auto number = [&](int64_t i) { return own * groups.dp->getRank() + i; };
    const auto loss_sum = [&](int64_t i) {
      if (i == 0) ++pass;
      const auto ids = on_device((at::arange(kS + 1) * (number(i) + 3) + steps).remainder(37).view({1, kS + 1}));
      RouterStatistics statistics{at::Tensor()};
      const auto logits =
          model->forward(ids.narrow(1, 0, kS), {on_device(at::arange(kS).view({1, kS})), {}}, {}, &statistics);
      balance->add(statistics);
      const auto targets = ids.narrow(1, 1, kS).t();
      const auto loss = vocab_parallel_cross_entropy(logits, targets, {.vocabulary_size = 37}, groups.tp).sum();
      return LossSum(fault ? fault(loss, pass, number(i)) : loss);
    };
    ++steps;
    return trainer->step(loss_sum, own, kS * kMicroBatchesOfAll,
                         [&](int64_t i) { return std::vector<std::string>{fmt::format("sample {}", number(i))}; });
  }

  /// Parameters, moments and correction biases, copied.
  std::vector<at::Tensor> state() {
    trainer->finish_gather();
    std::vector<at::Tensor> result;
    for (const auto& shard : shards) result.push_back(shard.parameter.detach().clone());
    for (const auto& slice : trainer->optimizer().slices()) {
      result.push_back(slice.exp_avg.clone());
      result.push_back(slice.exp_avg_sq.clone());
    }
    for (const auto& layer : model->decoder->moe_layers()) result.push_back(layer->router->expert_bias.clone());
    return result;
  }

  const parallel::ProcessGroups& groups;
  GPTModel model{nullptr};
  std::vector<ParameterShard> shards;
  std::shared_ptr<ExpertBalance> balance;
  std::unique_ptr<Trainer> trainer;
  int64_t steps = 0;
};

void expect_same_state(const std::vector<at::Tensor>& actual, const std::vector<at::Tensor>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    EXPECT_TRUE(test_support::equal(actual[i].nan_to_num(7.0), expected[i].nan_to_num(7.0))) << i;
  }
}

void expect_same_result(const StepResult& actual, const StepResult& expected) {
  EXPECT_EQ(actual.loss, expected.loss);
  EXPECT_EQ(actual.grad_norm, expected.grad_norm);
  EXPECT_EQ(actual.metrics, expected.metrics);
}

/// The text and the exit status of the AgreedError that `action` throws.
struct Refusal {
  explicit Refusal(const std::function<void()>& action) {
    try {
      action();
    } catch (const parallel::AgreedError& error) {
      text = error.what();
      status = error.exit_status();
    }
  }
  std::string text = "nothing thrown";
  int status = 0;
};

}  // namespace

class NotFinite : public TransformerTest {
 protected:
  /// Numbers of a GPU may change from pass to pass, so that only what isn't finite is compared there.
  static bool is_exact() { return runtime().device().is_cpu(); }
  static int last_rank() { return runtime().size() - 1; }
  static bool is_last_rank() { return runtime().rank() == last_rank(); }
};

TEST_F(NotFinite, OnceIsAFaultOfTheRanksWhoseNumbersChange) {
  if (!is_exact()) GTEST_SKIP() << "sums of a GPU may be added in any order";
  for (const auto& layout : layouts()) {
    SCOPED_TRACE(testing::Message() << "tp " << layout.grid.tp << " distributed " << layout.distributed_optimizer);
    // A loss, and a gradient behind a finite loss.
    const Fault in_forward = [](const at::Tensor& loss, int pass, int64_t /*micro_batch*/) {
      return pass == 1 && is_last_rank() ? loss * kInfinity : loss;
    };
    const Fault in_backward = [](const at::Tensor& loss, int pass, int64_t /*micro_batch*/) {
      auto same = loss.clone();
      if (pass == 1 && is_last_rank()) same.register_hook([](const at::Tensor& gradient) { return gradient * kNan; });
      return same;
    };
    for (const auto& fault : {in_forward, in_backward}) {
      // Other ranks' numbers come from the faulty one over tp and ep.
      const bool is_alone = layout.grid.tp == 1 && layout.grid.ep == 1;
      SmallTraining disturbed(layout);
      SmallTraining quiet(layout);
      const auto expected_first = quiet.step();
      const auto expected = quiet.step();
      expect_same_result(disturbed.step(), expected_first);
      Warnings warnings;
      expect_same_result(disturbed.step(fault), expected);
      EXPECT_EQ(disturbed.trainer->step_counts().repeated, 1);
      EXPECT_EQ(disturbed.trainer->step_counts().skipped, 0);
      expect_same_state(disturbed.state(), quiet.state());
      ASSERT_EQ(warnings.texts.size(), runtime().rank() == 0 ? 1 : 0);
      for (const auto& text : warnings.texts) {
        EXPECT_TRUE(contains(text, "step 2: loss "));
        EXPECT_TRUE(contains(text, "going on"));
        EXPECT_TRUE(contains(text, fmt::format("rank {} on {}", last_rank(), parallel::host_name())));
        if (is_alone && last_rank() > 0) {
          EXPECT_FALSE(contains(text, "rank 0 on"));
        }
      }
      expect_same_result(disturbed.step(), quiet.step());
    }
  }
}

TEST_F(NotFinite, OtherNumbersThatAreNotFiniteEitherStopTheRun) {
  if (!is_exact()) GTEST_SKIP() << "sums of a GPU may be added in any order";
  for (const auto& layout : layouts()) {
    SmallTraining training(layout, NotFiniteAction::kSkip);
    const auto before = training.state();
    const Refusal refusal([&] {
      training.step([](const at::Tensor& loss, int pass, int64_t /*micro_batch*/) {
        return is_last_rank() ? loss * (pass == 1 ? kInfinity : kNan) : loss;
      });
    });
    EXPECT_EQ(refusal.status, parallel::kSuspectedHostStatus);
    EXPECT_TRUE(contains(refusal.text, fmt::format("rank {} on {}", last_rank(), parallel::host_name())));
    EXPECT_TRUE(contains(refusal.text, "points to a fault of that machine"));
    expect_same_state(training.state(), before);
  }
}

TEST_F(NotFinite, AlwaysIsDataOrModelAndIsNamed) {
  for (const auto& layout : layouts()) {
    SCOPED_TRACE(testing::Message() << "tp " << layout.grid.tp << " distributed " << layout.distributed_optimizer);
    const auto refusal_of = [&](const Fault& fault, const std::function<void(SmallTraining&)>& prepare = {}) {
      SmallTraining training(layout);
      training.step();
      training.trainer->finish_gather();
      if (prepare) prepare(training);
      const auto before = training.state();
      const Refusal refusal([&] { training.step(fault); });
      EXPECT_EQ(refusal.status, parallel::kNotFiniteStatus);
      EXPECT_TRUE(contains(refusal.text, "step 2: loss "));
      EXPECT_TRUE(contains(refusal.text, "data or model"));
      expect_same_state(training.state(), before);
      EXPECT_EQ(training.trainer->optimizer().num_steps(), 1);
      if (!prepare) {
        EXPECT_TRUE(std::isfinite(training.step().grad_norm));  // and the next batch is taken
      }
      return refusal.text;
    };
    // NaN, infinity and -infinity.
    const auto divided = [](double factor) -> Fault {
      return [factor](const at::Tensor& loss, int /*pass*/, int64_t micro_batch) {
        return micro_batch == 3 ? (loss * factor) / (loss - loss) : loss;
      };
    };
    for (const double factor : {0.0, 1.0}) {
      if (factor == 1.0 && runtime().size() > 2) continue;  // takes its time
      const auto text = refusal_of(divided(factor));
      EXPECT_TRUE(contains(text, "the output of aten::div, [], in or after output_layer, in the forward pass"));
      EXPECT_TRUE(contains(text, "the samples of this micro-batch: sample 3"));
    }
    EXPECT_TRUE(contains(refusal_of(divided(-1.0)), "the loss of micro-batch"));
    const auto of_gradient = refusal_of([](const at::Tensor& loss, int /*pass*/, int64_t micro_batch) {
      auto same = loss.clone();
      if (micro_batch == 3) same.register_hook([](const at::Tensor& gradient) { return gradient * kNan; });
      return same;
    });
    EXPECT_TRUE(contains(of_gradient, "the gradient of output_layer.weight"));
    EXPECT_TRUE(contains(of_gradient, "sample 3"));
    // Weights that are finite, and products that aren't.
    const auto of_module = refusal_of({}, [](SmallTraining& training) {
      for (const auto& shard : training.shards) {
        if (shard.name == "decoder.layers.0.mlp.linear_fc2.weight") shard.parameter.detach().fill_(3e38);
      }
    });
    EXPECT_TRUE(contains(of_module, "in or after decoder.layers.0.mlp.linear_fc2"));
    const auto of_parameter = refusal_of({}, [](SmallTraining& training) {
      for (const auto& shard : training.shards) {
        if (shard.name == "decoder.final_layernorm.weight" && is_last_rank()) shard.parameter.detach()[1] = kNan;
      }
    });
    EXPECT_TRUE(
        contains(of_parameter, "parameter decoder.final_layernorm.weight (rank " + fmt::to_string(last_rank())));
  }
}

TEST_F(NotFinite, ASkippedStepChangesNothingButItsCount) {
  const Fault fault = [](const at::Tensor& loss, int /*pass*/, int64_t micro_batch) {
    return micro_batch == 0 ? loss * kNan : loss;
  };
  for (const auto& layout : layouts()) {
    SCOPED_TRACE(testing::Message() << "tp " << layout.grid.tp << " distributed " << layout.distributed_optimizer);
    Warnings warnings;
    SmallTraining training(layout, NotFiniteAction::kSkip);
    SmallTraining quiet(layout);
    training.step();
    quiet.step();
    const auto result = training.step(fault);
    EXPECT_TRUE(std::isnan(result.loss));
    EXPECT_TRUE(std::isnan(result.grad_norm));
    EXPECT_EQ(training.trainer->step_counts().skipped, 1);
    EXPECT_EQ(training.trainer->step_counts().repeated, 0);
    EXPECT_EQ(training.trainer->optimizer().num_steps(), 2);
    expect_same_state(training.state(), quiet.state());
    ASSERT_EQ(warnings.texts.size(), runtime().rank() == 0 ? 1 : 0);
    for (const auto& text : warnings.texts) EXPECT_TRUE(contains(text, "the batch is left out"));
    // As if it had been counted only.
    quiet.trainer->optimizer().set_num_steps(2);
    ++quiet.steps;
    expect_same_result(training.step(), quiet.step());
    expect_same_state(training.state(), quiet.state());
    // Two in a row may be skipped.
    training.step(fault);
    training.step(fault);
    const Refusal refusal([&] { training.step(fault); });
    EXPECT_EQ(refusal.status, parallel::kNotFiniteStatus);
    EXPECT_TRUE(contains(refusal.text, "2 steps in a row were skipped before it"));
    EXPECT_EQ(training.trainer->step_counts().skipped, 3);
  }
}

TEST(NotFiniteSearch, NamesOfModulesAndLists) {
  using internal::common_module;
  EXPECT_EQ(common_module("a.b", "a.b"), "a.b");
  EXPECT_EQ(common_module("a.b", "a.b.c"), "a.b");
  EXPECT_EQ(common_module("a.bc", "a.bd"), "a");
  EXPECT_EQ(common_module("a.b", "a.bc"), "a");
  EXPECT_EQ(common_module("ab", "ac"), "");
  EXPECT_EQ(internal::listed({"a", "b"}), "a, b");
  EXPECT_EQ(internal::listed(std::vector<std::string>(66, "x")).size(),
            64 + 63 * 2 + std::string(" and 2 more").size());
}

}  // namespace megatron_cpp
