// `verify`: sound layouts agree; what is wrong in the sharded path alone is found and named.
#include "step37/program/verify.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "megatron_cpp/checkpoint/safetensors.h"
#include "megatron_cpp/checkpoint/sharded_checkpoint.h"
#include "parallel/collectives.h"
#include "parallel/runtime.h"
#include "step37/program/pretrain.h"
#include "tests/step37/small_pictures.h"
#include "tests/step37/small_run.h"
#include "tests/support/environment.h"
#include "tests/support/errors.h"
#include "tests/support/faulty_group.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::step37 {
namespace {

using parallel::CollectiveKind;
using small_run::Overrides;
using small_run::with;
using namespace test_support;

const Overrides kExperts = {"model.num_moe_experts=8", "model.moe_first_layer=1", "model.moe_router_topk=2",
                            "model.moe_ffn_hidden_size=16", "model.moe_shared_expert_intermediate_size=16"};

/// What is trained on beside the token losses.
const Overrides kAuxiliaryLosses = {"model.moe_aux_loss_coeff=0.02",    "model.moe_group_balance_loss_coeff=0.01",
                                    "model.moe_group_balance_groups=4", "model.moe_z_loss_coeff=0.003",
                                    "model.mtp_num_layers=1",           "model.mtp_loss_scaling_factor=0.3"};

struct Verdict {
  int status = 0;
  std::vector<std::string> lines;  ///< on rank 0
  std::string last() const { return lines.empty() ? "" : lines.back(); }
};

class Verify : public small_run::SmallRun {
 protected:
  void SetUp() override {
    SmallRun::SetUp();
    on_main([&] { small_run::write_pictures(pictures()); });
  }

  int world() const { return runtime().size(); }

  VerifyArguments arguments(int tp, const Overrides& more = {}) const {
    return {.config = config_file(), .overrides = overrides_of("run", tp, more)};
  }

  static Verdict run(const VerifyArguments& arguments, VerifyParts parts = {}) {
    Verdict verdict;
    parts.print = [&](const std::string& line) { verdict.lines.push_back(line); };
    parallel::Runtime own;
    verdict.status = verify(own, arguments, parts);
    return verdict;
  }

  /// Layouts are wrong, and the verdict names one, and a parameter that contains `name`.
  void expect_found(const VerifyParts& parts, const std::string& name, const Overrides& more = {}) const {
    if (world() == 1) return;  // nothing is split
    const auto verdict = run(arguments(world(), more), parts);
    EXPECT_EQ(verdict.status, 1);
    if (runtime().rank() != 0) return;
    EXPECT_TRUE(verdict.last().starts_with("verify: tp=")) << verdict.last();
    EXPECT_TRUE(contains(verdict.last(), " differs: "));
    EXPECT_TRUE(contains(verdict.last(), name)) << testing::PrintToString(verdict.lines);
    EXPECT_FALSE(std::filesystem::exists(files("run").directory));
  }
};

/// Parts whose group of `kind` has a fault, where it has several ranks.
VerifyParts with_faulty(parallel::GroupPtr parallel::ProcessGroups::*kind, const CollectiveFault& fault) {
  VerifyParts parts;
  parts.groups = [kind, fault](const parallel::ProcessGroups& made) {
    auto groups = made;
    const auto sound = groups.*kind;
    if (sound->getSize() == 1) return groups;
    const auto faulty = with_fault(sound, fault);
    for (const auto& each : parallel::kGroupKinds) {
      if (groups.*(each.group) == sound) groups.*(each.group) = faulty;
    }
    return groups;
  };
  return parts;
}

}  // namespace

TEST_F(Verify, AllLayoutsAgree) {
  for (const bool experts : {false, true}) {
    SCOPED_TRACE(experts ? "with experts" : "dense");
    const Overrides heads_for_four = {"vision.heads=4"};
    const auto all = experts ? with(heads_for_four, with(kExperts, kAuxiliaryLosses)) : heads_for_four;
    const auto verdict = run(arguments(world(), all));
    EXPECT_EQ(verdict.status, 0);
    if (runtime().rank() != 0) continue;
    const std::map<int, std::string> expected = {{1, "verify: 1 layout agrees"},
                                                 {2, experts ? "verify: 9 layouts agree" : "verify: 7 layouts agree"},
                                                 {4, experts ? "verify: 12 layouts agree" : "verify: 8 layouts agree"}};
    EXPECT_EQ(verdict.last(), expected.at(world())) << testing::PrintToString(verdict.lines);
    const auto line = std::find_if(verdict.lines.begin(), verdict.lines.end(), [&](const std::string& text) {
      return text.starts_with("tp=" + std::to_string(world()) + " dp=1");
    });
    ASSERT_NE(line, verdict.lines.end());
    for (const auto* part : {": loss ", ", gradient norm ", ", largest difference ", " bytes sent"}) {
      EXPECT_TRUE(contains(*line, part));
    }
  }
  EXPECT_FALSE(std::filesystem::exists(files("run").directory));
}

TEST_F(Verify, LayoutsAgreeWithALossInChunks) {
  const auto verdict = run(arguments(world(), {"vision.heads=4", "training.loss_chunk=10", "model.mtp_num_layers=1",
                                               "model.mtp_loss_scaling_factor=0.3"}));
  EXPECT_EQ(verdict.status, 0) << verdict.last();
}

TEST_F(Verify, LayersAndPrecisionCanBeChosen) {
  auto chosen = arguments(world());
  chosen.layers = 1;
  chosen.dtype = "float32";
  const auto verdict = run(chosen);
  EXPECT_EQ(verdict.status, 0) << verdict.last();
  chosen.layers = 3;
  EXPECT_TRUE(throws([&] { run(chosen); }, "--layers 3 is not in [1, 2]"));
  chosen.layers = {};
  chosen.dtype = "float16";
  EXPECT_TRUE(throws([&] { run(chosen); }, "--dtype float16: expected float64 or float32"));
  if (world() == 1) return;
  // Layouts differ by rounding, and 0 allows none.
  chosen.dtype = "float32";
  chosen.tolerance = 0.0;
  EXPECT_EQ(run(chosen).status, 1);
}

TEST_F(Verify, WhatDoesNotDivideIsListedAndFailsNothing) {
  const auto verdict = run(arguments(1, {"model.num_query_groups=1"}));
  EXPECT_EQ(verdict.status, 0);
  if (runtime().rank() != 0 || world() == 1) return;
  const auto all = testing::PrintToString(verdict.lines);
  EXPECT_TRUE(contains(all, "tp=2 dp=0: not possible: num_query_groups 1 is not divisible by tensor-parallel size 2"));
  EXPECT_EQ(verdict.last(), "verify: 1 layout agrees");
}

TEST_F(Verify, FindsAMissingSum) {
  expect_found(
      with_faulty(&parallel::ProcessGroups::tp, {.received =
                                                     [](CollectiveKind kind, at::Tensor& got, const auto& sent) {
                                                       if (kind == CollectiveKind::kAllReduce) got.copy_(sent);
                                                     }}),
      "", {"parallel.sequence_parallel=false"});
}

TEST_F(Verify, FindsADoubledSum) {
  expect_found(with_faulty(&parallel::ProcessGroups::tp, {.received =
                                                              [](CollectiveKind kind, at::Tensor& got, const auto&) {
                                                                if (kind == CollectiveKind::kReduceScatter) got.mul_(2);
                                                              }}),
               "");
}

TEST_F(Verify, FindsARankThatSendsNothing) {
  expect_found(with_faulty(&parallel::ProcessGroups::tp_dp, {.sent =
                                                                 [](CollectiveKind, at::Tensor& sent) {
                                                                   if (runtime().rank() == runtime().size() - 1)
                                                                     sent.zero_();
                                                                 }}),
               "");
}

TEST_F(Verify, FindsAWrongGradientDomain) {
  VerifyParts parts;
  parts.parameters = [](Step37Model& model) {
    auto parameters = parameter_shards(*model);
    for (auto& shard : parameters) {
      if (shard.name.ends_with("layers.1.input_layernorm.weight")) shard.domain = GradientDomain::kReplicated;
    }
    return parameters;
  };
  expect_found(parts, "model.layers.1.input_layernorm.weight");
}

TEST_F(Verify, FindsASwappedShard) {
  VerifyParts parts;
  parts.parameters = [](Step37Model& model) {
    auto parameters = parameter_shards(*model);
    const auto& tp = runtime();
    for (auto& shard : parameters) {
      if (!shard.name.ends_with("layers.0.mlp.linear_fc2.weight")) continue;
      const at::NoGradGuard no_grad;
      const auto all = parallel::all_gather(shard.parameter.detach().unsqueeze(0).contiguous(), world_tp());
      shard.parameter.copy_(all[(tp.rank() + 1) % tp.size()]);
    }
    return parameters;
  };
  expect_found(parts, "");
}

TEST_F(Verify, FindsAPositionThatIsOffByOneAtTheBorderOfAShard) {
  VerifyParts parts;
  parts.change_batch = [](Step37Batch& batch) {
    if (runtime().rank() == 0) return;
    auto& positions = batch.attention.position_ids;
    positions = positions.clone();
    positions.select(1, positions.size(1) / runtime().size()).add_(1);
  };
  expect_found(parts, "");
}

TEST_F(Verify, FindsAnExpertThatTheDispatcherDrops) {
  expect_found(with_faulty(&parallel::ProcessGroups::ep, {.received =
                                                              [](CollectiveKind kind, at::Tensor& got, const auto&) {
                                                                const bool is_last =
                                                                    runtime().rank() == runtime().size() - 1;
                                                                if (kind == CollectiveKind::kAllToAll && is_last)
                                                                  got.zero_();
                                                              }}),
               "", with(kExperts, {"ep=" + std::to_string(runtime().size())}));
}

TEST_F(Verify, FindsAnAuxiliaryLossScaledByTheRanks) {
  VerifyParts parts;
  parts.loss_sum = [](Step37Model& model, const Step37Batch& batch, double loss_gradient) {
    auto sums = model->loss_sum(batch, nullptr, loss_gradient);
    for (auto& auxiliary : sums.auxiliary) auxiliary = auxiliary * runtime().size();
    return sums;
  };
  expect_found(parts, "", with(kExperts, {"model.moe_aux_loss_coeff=0.02"}));
}

// The first moment after one step of training is (1 - beta1) times the gradient.
TEST_F(Verify, ComparesWithGradientsFromElsewhere) {
  const Overrides one_step = {"training.steps=1", "training.clip_grad_norm=0", "training.beta1=0.5"};
  {
    parallel::Runtime own;
    ASSERT_EQ(pretrain(own, {config_file(), overrides_of("trained", world(), one_step)}), 0);
    parallel::barrier(world_tp());
  }
  const CheckpointReader checkpoint(files("trained").checkpoints());
  std::vector<NamedTensor> gradients;
  std::vector<ShardedTensor> wanted;
  for (const auto& id : checkpoint.tensors()) {
    if (id.role != TensorRole::kExpAvg) continue;
    const auto whole = at::zeros(checkpoint.global_shape(id));
    gradients.push_back({"grad." + id.name, whole});
    wanted.push_back({id, whole, whole.sizes().vec(), {Box::whole(whole.sizes().vec())}});
  }
  checkpoint.load(wanted, UnusedTensors::kAllow);
  for (auto& gradient : gradients) gradient.tensor.mul_(2.0);
  const auto file = folder_.path() / "gradients.safetensors";
  auto chosen = arguments(world());
  chosen.against = file;

  on_main([&] { write_safetensors(file, gradients); });
  const auto same = run(chosen);
  EXPECT_EQ(same.status, 0) << testing::PrintToString(same.lines);
  if (runtime().rank() == 0) {
    EXPECT_TRUE(
        contains(testing::PrintToString(same.lines), std::to_string(gradients.size()) + " gradients compared, 0 "));
  }

  // The first in the order of the model counts.
  on_main([&] {
    for (auto& gradient : gradients) {
      if (gradient.name == "grad.model.layers.1.mlp.up_proj.weight") gradient.tensor.mul_(world());
      if (gradient.name == "grad.model.norm.weight") gradient.tensor.zero_();
    }
    write_safetensors(file, gradients);
  });
  const auto other = run(chosen);
  if (world() == 1) {
    EXPECT_EQ(other.status, 1);
  } else if (runtime().rank() == 0) {
    EXPECT_TRUE(contains(testing::PrintToString(other.lines), std::to_string(world()) + " times the reference"));
    EXPECT_TRUE(contains(other.last(), "gradients.safetensors differs: grad.model.layers.1.mlp.up_proj.weight by "));
  }

  on_main([&] { write_safetensors(file, {{"grad.model.norm.weight", at::zeros({3})}}); });
  EXPECT_TRUE(throws([&] { run(chosen); }, "gradients.safetensors: grad.model.norm.weight is [3] Float"));
  on_main([&] { write_safetensors(file, {{"grad.norm", at::zeros({3})}}); });
  EXPECT_TRUE(throws([&] { run(chosen); }, "gradients.safetensors has no gradient of this model"));
}

// A golden case holds a batch and the gradients that transformers gave for it.
TEST_F(Verify, TakesTheBatchBesideTheGradients) {
  const auto model = std::filesystem::absolute(cases() / "models" / "wide");
  on_main([&] {
    test_support::write_file(folder_.path() / "from.yaml",
                             "data: {directory: none}\nparallel: {tp: 0}\nmodel: {from: " + model.string() +
                                 "}\ntraining: {steps: 1, global_batch_size: 4, sequence_length: 128}\n");
  });
  const VerifyArguments chosen{.config = folder_.path() / "from.yaml",
                               .against = cases() / "forward" / "wide.safetensors"};
  const auto verdict = run(chosen);
  EXPECT_EQ(verdict.status, 0) << testing::PrintToString(verdict.lines);
  if (runtime().rank() != 0) return;
  EXPECT_TRUE(contains(testing::PrintToString(verdict.lines), " gradients compared, 0 "));
}

TEST(GradientRelation, NamesTheLikelyCause) {
  const auto cause = [](double ratio, double cosine, int tp, int dp) {
    return GradientRelation{ratio, cosine}.likely_cause(tp, dp);
  };
  EXPECT_TRUE(contains(cause(4.0, 1.0, 4, 2), "4 times the reference, the size of tp"));
  EXPECT_TRUE(contains(cause(0.5, 1.0, 4, 2), "1/2 of the reference, the size of dp"));
  EXPECT_TRUE(contains(cause(0.125, 1.0, 4, 2), "1/8 of the reference, the size of tp x dp"));
  EXPECT_TRUE(contains(cause(2.0, 1.0, 2, 2), "2 times the reference, the size of tp or dp"));
  EXPECT_TRUE(contains(cause(-1.0, -1.0, 4, 2), "the other sign"));
  EXPECT_TRUE(contains(cause(0.3, 1.0, 4, 2), "0.3 times the reference: another scale"));
  EXPECT_TRUE(contains(cause(0.77, 0.9, 4, 1),
                       "3/4 of the reference, but not everywhere: the summand of one rank of tp is missing"));
  EXPECT_TRUE(contains(cause(0.26, 0.5, 4, 1), "about 1/4"));
  EXPECT_TRUE(contains(cause(0.0, 0.0, 4, 1), "it is 0"));
  EXPECT_TRUE(contains(cause(0.95, 0.95, 4, 1), "other values"));
}

}  // namespace megatron_cpp::step37
