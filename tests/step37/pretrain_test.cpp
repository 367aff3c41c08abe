// `step37 pretrain` on a small folder of pictures, called in this process on all ranks; and captions of what it leaves.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "megatron_cpp/checkpoint/sharded_checkpoint.h"
#include "megatron_cpp/parameters/parameter_shard.h"
#include "parallel/agree.h"
#include "parallel/collectives.h"
#include "parallel/runtime.h"
#include "step37/checkpoint_names.h"
#include "step37/data/captioned_pictures.h"
#include "step37/program/check.h"
#include "step37/program/generate.h"
#include "step37/program/training_run.h"
#include "step37/step37_model.h"
#include "tests/step37/pretrain_fixture.h"
#include "tests/step37/small_pictures.h"
#include "tests/support/environment.h"
#include "tests/support/errors.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::step37 {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using namespace small_run;
using namespace test_support;

/// Every file below `folder` with its bytes and the time of its last change.
std::map<std::string, std::pair<std::string, fs::file_time_type>> contents_of(const fs::path& folder) {
  std::map<std::string, std::pair<std::string, fs::file_time_type>> contents;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    if (entry.is_regular_file()) contents[entry.path()] = {read_file(entry.path()), entry.last_write_time()};
  }
  return contents;
}

}  // namespace

TEST_F(Pretrain, TrainsAlikeInEveryLayout) {
  pretrain("reference", 1, {"parallel.sequence_parallel=false", "report.pictures=2"});
  if (runtime().rank() == 0) {
    const auto lines = metrics_of(files("reference"));
    EXPECT_EQ(lines.size(), 3U);
    for (const auto& line : lines) {
      EXPECT_GT(line.value("loss", 0.0), 1.0);
      EXPECT_GT(line.value("grad_norm", 0.0), 0.0);
      EXPECT_GT(line.value("images", 0), 4);
    }
    EXPECT_TRUE(!lines.empty() && lines.back().contains("validation_loss"));
    EXPECT_TRUE(fs::exists(files("reference").report()));
  }
  for (const int tp : divisors_of_world()) {
    for (const std::string sp : {"false", "true"}) {
      if (tp == 1 && sp == "false") continue;
      SCOPED_TRACE(testing::Message() << "tensor " << tp << ", sequence_parallel " << sp);
      const auto run = "tensor" + std::to_string(tp) + sp;
      pretrain(run, tp, {"parallel.sequence_parallel=" + sp});
      expect_same_run(files(run), files("reference"), 1e-4);
    }
  }
  const std::vector<std::pair<std::string, Overrides>> others{
      {"all-gather", {"parallel.exchange=all-gather"}},
      {"column", {"parallel.projector_sharding=column", "run.checked=true"}},
      {"row", {"parallel.projector_sharding=row"}},
      {"hidden", {"parallel.embedding_sharding=hidden"}},
      {"micro-batches", {"training.micro_batch_size=2"}},
      {"one-micro-batch", {"training.micro_batch_size=4"}}};
  for (const auto& [run, overrides] : others) {
    SCOPED_TRACE(run);
    pretrain(run, runtime().size(), overrides);
    expect_same_run(files(run), files("reference"), 1e-4);
  }
}

// Heads for four ranks. A run goes on from a checkpoint of the other mode.
TEST_F(Pretrain, TrainsAlikeWithASplitTower) {
  const int tp = runtime().size();
  const Overrides heads = {"vision.heads=4"};
  const auto weights = with(heads, {"parallel.mm_encoder_tp_mode=weights"});
  pretrain("reference", 1, with(heads, {"parallel.sequence_parallel=false"}));
  pretrain("data", tp, with(heads, {"checkpoint.interval=1"}));
  pretrain("replicated", tp, with(weights, {"parallel.sequence_parallel=false", "report.pictures=2"}));
  pretrain("row", tp, with(weights, {"parallel.projector_sharding=row"}));
  pretrain("column", tp,
           with(weights, {"parallel.projector_sharding=column", "run.checked=true", "checkpoint.interval=1"}));
  copy_state("column", "weights-to-data", 2);
  pretrain("weights-to-data", divisors_of_world()[divisors_of_world().size() / 2], heads);
  copy_state("data", "data-to-weights", 2);
  pretrain("data-to-weights", tp, weights);
  for (const char* run : {"data", "replicated", "row", "column", "weights-to-data", "data-to-weights"}) {
    SCOPED_TRACE(run);
    expect_same_run(files(run), files("reference"), 1e-4);
  }
  if (tp == 1) return;
  EXPECT_TRUE(contains(pretrain_error("none", tp, with(weights, {"vision.heads=1"})),
                       "mm_encoder_tp_mode weights: vision heads 1 is not divisible by tensor-parallel size"));
}

/// Turns the second layer into a mixture of experts.
const Overrides kExperts = {"model.num_moe_experts=8",     "model.moe_first_layer=1",
                            "model.moe_router_topk=2",     "model.moe_ffn_hidden_size=16",
                            "model.freeze_router=false",   "model.moe_shared_expert_intermediate_size=32",
                            "training.clip_grad_norm=0.5", "validation.packs=3"};

/// Trains them evenly by every means there is.
const Overrides kEvenly = {"model.moe_aux_loss_coeff=0.02", "model.moe_group_balance_loss_coeff=0.01",
                           "model.moe_group_balance_groups=4", "model.moe_z_loss_coeff=0.003",
                           "model.moe_router_bias_update_rate=0.01"};

// Steps are clipped: a norm that differs between ranks would pull the copies of the weights apart. The validation packs
// don't divide by the replicas.
TEST_F(Pretrain, TrainsExpertsAlikeInEveryLayout) {
  const auto experts = with(kExperts, kEvenly);
  pretrain("reference", 1, with(experts, {"dp=0"}));
  if (runtime().rank() == 0) {
    for (const auto& line : metrics_of(files("reference"))) {
      for (const auto* name : {"load_balancing_loss", "group_balance_loss", "z_loss"}) {
        EXPECT_GT(line.value(name, 0.0), 0.0) << name;
      }
      EXPECT_GT(line.value("moe_max_load", 0.0), 1.0);
      EXPECT_GT(line.value("moe_expert_norm_dispersion", 0.0), 1.0);
    }
  }
  const int size = runtime().size();
  for (const int tp : divisors_of_world()) {
    for (const int ep : divisors_of_world()) {
      for (const int etp : divisors_of_world()) {
        if (size % (ep * etp) != 0) continue;
        const auto run = c10::str("tp", tp, "ep", ep, "etp", etp);
        SCOPED_TRACE(run);
        pretrain(run, tp, with(experts, {c10::str("ep=", ep), c10::str("etp=", etp)}));
        expect_same_run(files(run), files("reference"), 1e-4);
      }
    }
  }
}

const Overrides kMtp = {"model.mtp_num_layers=2", "model.mtp_loss_scaling_factor=0.3", "training.steps=4",
                        "checkpoint.interval=2", "validation.interval=2"};

TEST_F(Pretrain, TrainsMultiTokenPredictionAlikeInEveryLayout) {
  pretrain("reference", 1, with(kMtp, {"parallel.sequence_parallel=false"}));
  if (runtime().rank() == 0) {
    const auto lines = metrics_of(files("reference"));
    EXPECT_EQ(lines.size(), 4U);
    // As many nats a token as the decoder's, times 0.3.
    EXPECT_NEAR(lines.front().value("mtp_loss", 0.0) / (0.3 * lines.front().value("loss", 0.0)), 1.0, 0.2);
    EXPECT_LT(lines.back().value("mtp_loss", 9.0), 0.95 * lines.front().value("mtp_loss", 0.0));
  }
  for (const int tp : divisors_of_world()) {
    for (const std::string sp : {"false", "true"}) {
      SCOPED_TRACE(testing::Message() << "tensor " << tp << ", sequence_parallel " << sp);
      const auto run = "tensor" + std::to_string(tp) + sp;
      pretrain(run, tp, with(kMtp, {"parallel.sequence_parallel=" + sp}));
      expect_same_run(files(run), files("reference"), 1e-4);
    }
  }
  const int tp = runtime().size();
  pretrain("one-micro-batch", tp, with(kMtp, {"training.micro_batch_size=4"}));
  expect_same_run(files("one-micro-batch"), files("reference"), 1e-4);
  const auto whole = "tensor" + std::to_string(tp) + "true";
  copy_state(whole, "resumed", 2);
  pretrain("resumed", tp, kMtp);
  expect_same_run(files("resumed"), files(whole), rounding());
  EXPECT_TRUE(contains(pretrain_error("resumed", tp, with(kMtp, {"model.mtp_loss_scaling_factor=0"})),
                       "with model.mtp_loss_scaling_factor 0 (was 0.3)"));
}

// From a published checkpoint: layers that aren't trained are carried along.
TEST_F(Pretrain, MultiTokenPredictionStaysBitForBitUnlessItIsTrained) {
  const int tp = runtime().size();
  pretrain("first", tp, with(kMtp, {"checkpoint.export=exported", "training.steps=1"}));
  on_main([&] {
    write_file(folder_.path() / "from.yaml",
               "data: {held_out: 0.3, crops: true, crop_side: 28}\nmodel: {from: first/exported}\n"
               "training: {steps: 2, global_batch_size: 4, sequence_length: 128, learning_rate: 1e-2}\n"
               "checkpoint: {export: exported}\nreport: {pictures: 0}\n");
  });
  const auto weights = [&](const std::string& run) {
    const SafetensorsFile file(files(run).directory / "exported" / "model.safetensors");
    std::map<std::string, at::Tensor> tensors;
    for (const auto& [name, entry] : file.entries()) tensors[name] = file.read(name);
    return tensors;
  };
  for (const std::string factor : {"0", "0.3"}) {
    parallel::Runtime own;
    EXPECT_EQ(step37::pretrain(own, {folder_.path() / "from.yaml",
                                     overrides_of(factor, tp, {"model.mtp_loss_scaling_factor=" + factor})}),
              0);
    parallel::barrier(world_tp());
    const auto before = weights("first");
    const auto after = weights(factor);
    EXPECT_EQ(before.size(), after.size());
    int64_t mtp_tensors = 0;
    for (const auto& [name, tensor] : before) {
      const bool is_mtp = name.starts_with("model.layers.2.") || name.starts_with("model.layers.3.");
      if (!is_mtp) continue;
      ++mtp_tensors;
      EXPECT_EQ(at::equal(after.at(name), tensor), factor == "0") << name;
    }
    EXPECT_EQ(mtp_tensors, 2 * 17);
    if (runtime().rank() != 0) continue;
    const auto kept = tensors_of(files(factor).checkpoints() / "latest");
    EXPECT_EQ(kept.count("exp_avg of model.layers.3.eh_proj.weight"), factor == "0" ? 0U : 1U);
  }
}

// A run's export is what another run starts from: it goes on with the same loss, from its own copy of the
// configuration.
TEST_F(Pretrain, GoesOnFromAPublishedCheckpoint) {
  const int tp = runtime().size();
  const Overrides no_steps = {
      "training.learning_rate_scales=language_model: 0, vision_model: 0, image_insert_embedding: 0"};
  pretrain("first", tp, with(kExperts, {"checkpoint.export=exported", "training.steps=1"}));
  const auto exported = files("first").directory / "exported";
  on_main([&] {
    write_file(folder_.path() / "from.yaml",
               "data: {held_out: 0.3, crops: true, crop_side: 28}\nmodel: {from: first/exported}\n"
               "training: {steps: 2, global_batch_size: 4, sequence_length: 128}\n"
               "checkpoint: {interval: 1, export: again}\nreport: {pictures: 0}\n");
  });
  const auto go_on = [&](const std::string& run, const Overrides& more) {
    parallel::Runtime own;
    EXPECT_EQ(step37::pretrain(own, {folder_.path() / "from.yaml", overrides_of(run, tp, more)}), 0);
    parallel::barrier(world_tp());
  };
  go_on("second", no_steps);
  const auto weights = [](const fs::path& folder) {
    const SafetensorsFile file(folder / "model.safetensors");
    std::map<std::string, at::Tensor> tensors;
    for (const auto& [name, entry] : file.entries()) tensors[name] = file.read(name);
    return tensors;
  };
  const auto before = weights(exported);
  for (const auto& [name, tensor] : weights(files("second").directory / "again")) {
    EXPECT_TRUE(test_support::equal(tensor, before.at(name))) << name;
  }
  on_main([&] { fs::rename(exported, folder_.path() / "gone"); });
  go_on("second", with(no_steps, {"training.steps=3", "checkpoint.export="}));
  EXPECT_TRUE(contains(agreed_error([&] { go_on("third", {}); }), "model.from in "));
  on_main([&] { fs::rename(folder_.path() / "gone", exported); });
  EXPECT_TRUE(contains(agreed_error([&] { go_on("third", {"model.hidden_size=32"}); }), "is a part of the shape"));
  EXPECT_TRUE(contains(agreed_error([&] { go_on("second", {"training.steps=4"}); }), "not an empty folder"));
  on_main([&] { fs::remove(exported / "tokenizer.model"); });
  EXPECT_TRUE(contains(agreed_error([&] { go_on("third", {}); }), "has no tokenizer.model"));
}

TEST_F(Pretrain, GoesOnAsIfItHadNotBeenInterrupted) {
  const Overrides four_steps = {"training.steps=4", "checkpoint.interval=2", "validation.interval=2"};
  for (const int tp : divisors_of_world()) {
    SCOPED_TRACE(testing::Message() << "tensor " << tp);
    const auto run = "whole" + std::to_string(tp);
    const auto resumed = "resumed" + std::to_string(tp);
    pretrain(run, tp, four_steps);
    copy_state(run, resumed, 2);
    pretrain(resumed, tp, four_steps);
    expect_same_run(files(resumed), files(run), rounding());
    if (runtime().rank() == 0) {
      const auto lines = metrics_of(files(resumed));
      EXPECT_EQ(lines.size(), 4U);
      for (size_t i = 0; i < lines.size(); ++i) EXPECT_EQ(lines[i].value("step", 0), static_cast<int>(i) + 1);
    }
  }
  const int world = runtime().size();
  const auto experts = with(four_steps, with(kExperts, kEvenly));
  pretrain("experts", world, experts);
  copy_state("experts", "resumed-experts", 2);
  pretrain("resumed-experts", world, experts);
  expect_same_run(files("resumed-experts"), files("experts"), rounding());
  if (world == 1) return;
  copy_state("whole" + std::to_string(world), "narrower", 2);
  pretrain("narrower", 1, four_steps);
  expect_same_run(files("narrower"), files("whole1"), 1e-4);
  copy_state("whole1", "wider", 2);
  pretrain("wider", world, four_steps);
  expect_same_run(files("wider"), files("whole1"), 1e-4);
}

// Bit for bit: experts with every auxiliary loss, multi-token prediction, several micro-batches.
TEST_F(Pretrain, RecomputingChangesNothing) {
  const int world = runtime().size();
  const auto all = with(with(kExperts, kEvenly),
                        {"training.steps=2", "report.pictures=0", "vision.heads=4", "ep=" + std::to_string(world),
                         "model.mtp_num_layers=1", "model.mtp_loss_scaling_factor=0.3"});
  const auto bfloat16 = with(all, {"training.precision=bfloat16", "parallel.mm_encoder_tp_mode=weights"});
  pretrain("kept", world, all);
  pretrain("kept-bfloat16", world, bfloat16);
  for (const std::string recompute : {"full", "core_attention, mlp, experts, norms, tower"}) {
    SCOPED_TRACE(recompute);
    pretrain(recompute, world, with(all, {"training.recompute=" + recompute}));
    expect_same_run(files(recompute), files("kept"), rounding());
  }
  pretrain("full-bfloat16", world, with(bfloat16, {"training.recompute=full"}));
  expect_same_run(files("full-bfloat16"), files("kept-bfloat16"), rounding());
}

// In chunks that don't divide the sequence, over several micro-batches, with multi-token prediction.
TEST_F(Pretrain, ALossInChunksIsTheSameToRounding) {
  const Overrides all = {"training.steps=3", "report.pictures=0", "model.mtp_num_layers=1",
                         "model.mtp_loss_scaling_factor=0.3"};
  pretrain("whole-logits", 1, with(all, {"training.loss_chunk=0"}));
  for (const int tp : std::set{1, runtime().size()}) {
    const auto run = "chunks" + std::to_string(tp);
    pretrain(run, tp, with(all, {"training.loss_chunk=50"}));
    expect_same_run(files(run), files("whole-logits"), 1e-4);
  }
}

// bfloat16 moves the losses by its rounding, in whatever layout, and checkpoints hold float32 all the same: a run of
// either precision goes on in the other one.
TEST_F(Pretrain, TrainsInBfloat16) {
  const int world = runtime().size();
  const Overrides four_steps = with(kExperts, {"training.steps=4", "checkpoint.interval=2", "report.pictures=0"});
  const auto narrow = with(four_steps, {"training.precision=bfloat16"});
  pretrain("float32", 1, four_steps);
  const auto expect_near_float32 = [&](const std::string& run) {
    if (runtime().rank() != 0) return;
    const auto lines = metrics_of(files(run));
    const auto expected = metrics_of(files("float32"));
    ASSERT_EQ(lines.size(), expected.size());
    for (size_t i = 0; i < lines.size(); ++i) {
      EXPECT_NEAR(lines[i].value("loss", 0.0), expected[i].value("loss", 0.0), 0.02) << run << ", " << i;
    }
  };
  for (const int tp : divisors_of_world()) {
    const auto run = "narrow" + std::to_string(tp);
    pretrain(run, tp, narrow);
    expect_near_float32(run);
  }
  const auto run = "narrow" + std::to_string(world);
  copy_state(run, "again", 2);
  pretrain("again", world, narrow);
  expect_same_run(files("again"), files(run), rounding());
  copy_state(run, "wider", 2);
  pretrain("wider", 1, four_steps);
  expect_near_float32("wider");
  copy_state("float32", "narrower", 2);
  pretrain(
      "narrower", world,
      with(narrow, {"training.main_gradients=bfloat16", "training.exp_avg=bfloat16", "training.exp_avg_sq=bfloat16"}));
  expect_near_float32("narrower");
}

TEST_F(Pretrain, DividesTheOptimizerOverReplicas) {
  const int world = runtime().size();
  const Overrides four_steps =
      with(kExperts, {"training.steps=4", "checkpoint.interval=2", "report.pictures=0", "training.clip_grad_norm=0.1"});
  const std::string divided = "training.distributed_optimizer=true";
  struct Layout {
    int tp;
    int ep;
    std::string precision;
  };
  for (const auto& [tp, ep, name] :
       {Layout{1, 1, "float32"}, {std::max(1, world / 2), std::min(2, world), "bfloat16"}}) {
    SCOPED_TRACE(testing::Message() << "tp " << tp << ", ep " << ep << ", " << name);
    const auto plain = with(four_steps, {"training.precision=" + name, c10::str("ep=", ep)});
    pretrain("plain-" + name, tp, plain);
    pretrain("divided-" + name, tp, with(plain, {divided}));
    expect_same_run(files("divided-" + name), files("plain-" + name), rounding());
    // On from a checkpoint of either kind.
    copy_state("divided-" + name, "again-" + name, 2);
    pretrain("again-" + name, tp, with(plain, {divided}));
    expect_same_run(files("again-" + name), files("plain-" + name), rounding());
    copy_state("divided-" + name, "joined-" + name, 2);
    pretrain("joined-" + name, tp, plain);
    expect_same_run(files("joined-" + name), files("plain-" + name), rounding());
  }
  copy_state("plain-float32", "other-layout", 2);
  pretrain("other-layout", world, with(four_steps, {divided}));
  expect_same_run(files("other-layout"), files("plain-float32"), 1e-4);
}

/// What a run has come to, in numbers for people: its metrics, and the norm of each parameter that it leaves.
json summary_of(const RunFiles& files) {
  json norms;
  for (const auto& [name, tensor] : tensors_of(files.checkpoints() / "latest")) {
    if (name.find(" of ") == std::string::npos) norms[name] = tensor.to(at::kDouble).norm().item<double>();
  }
  return {{"metrics", metrics_of(files)}, {"norms", norms}};
}

// Twice the same bits; and the numbers of tests/cases/baseline.json, to rounding: machines and layouts differ in it.
// Where these are to change, TEST_RENEW_BASELINE=1 writes them anew (docs/determinism.md).
TEST_F(Pretrain, StaysAtItsBaseline) {
  const auto all = with(with(kExperts, kEvenly), with(kMtp, {"model.mtp_num_layers=1"}));
  pretrain("first", runtime().size(), all);
  pretrain("second", runtime().size(), all);
  expect_same_run(files("second"), files("first"), rounding());
  if (runtime().rank() != 0) return;
  const auto path = cases() / "baseline.json";
  const auto summary = summary_of(files("first"));
  if (std::getenv("TEST_RENEW_BASELINE") != nullptr) write_file(path, summary.dump(1) + "\n");
  const auto actual = summary.flatten();
  const auto expected = json::parse(read_file(path)).flatten();
  EXPECT_EQ(actual.size(), expected.size());
  for (const auto& [key, value] : expected.items()) {
    const double want = value.get<double>();
    EXPECT_NEAR(actual.value(key, -1.0), want, std::max(1e-5, 10 * rounding()) * std::abs(want)) << key;
  }
}

TEST_F(Pretrain, ScalesTheLearningRateByName) {
  const int tp = runtime().size();
  pretrain("run", tp,
           {"training.steps=2", "checkpoint.interval=1", "training.learning_rate_decay=constant",
            "training.learning_rate_scales=vision_model: 0"});
  if (runtime().rank() == 0) {
    const auto before = tensors_of(files("run").checkpoints() / step_name(1));
    const auto after = tensors_of(files("run").checkpoints() / step_name(2));
    for (const std::string still : {"vision_model.conv1.weight", "vision_model.ln_pre.bias"}) {
      EXPECT_TRUE(test_support::equal(after.at(still), before.at(still))) << still;
    }
    EXPECT_FALSE(at::equal(after.at("vit_large_projector.weight"), before.at("vit_large_projector.weight")));
  }
  EXPECT_TRUE(contains(pretrain_error("typo", tp, {"training.weight_decay_scales=visoin_model: 0"}),
                       "a scale is given for visoin_model, but no parameter is called so"));
}

TEST_F(Pretrain, LeavesAFinishedRunAlone) {
  const Overrides overrides = {"training.steps=2", "report.pictures=2"};
  pretrain("run", runtime().size(), overrides);
  const auto before = contents_of(files("run").directory);
  EXPECT_EQ(before.count(files("run").report()), 1U);
  pretrain("run", runtime().size(), overrides);
  EXPECT_EQ(contents_of(files("run").directory), before);
}

TEST_F(Pretrain, StartsOverWhenAsked) {
  pretrain("run", 1, {"training.steps=2"});
  pretrain("run", 1, {"training.steps=1", "run.fresh=true"});
  pretrain("short", 1, {"training.steps=1"});
  expect_same_run(files("run"), files("short"), rounding());
  EXPECT_FALSE(fs::exists(files("run").checkpoints() / step_name(2)));
}

TEST_F(Pretrain, StartingOverLosesNothingIfTheNewRunCannotBegin) {
  const int tp = runtime().size();
  pretrain("run", tp, {"training.steps=1"});
  const auto before = contents_of(files("run").directory);
  for (const std::string wrong :
       {"data.directory=missing", "data.vocabulary_size=267", "training.weight_decay_scales=visoin_model: 0"}) {
    EXPECT_NE(pretrain_error("run", tp, {"run.fresh=true", wrong}), "nothing thrown");
    EXPECT_EQ(contents_of(files("run").directory), before) << wrong;
  }
}

TEST_F(Pretrain, DoesNotStartOverWhereNoCheckpointCanBeRead) {
  const int tp = runtime().size();
  pretrain("run", tp, {"training.steps=1"});
  const auto manifest = files("run").checkpoints() / step_name(1) / "manifest.json";
  on_main([&] { write_file(manifest, "no manifest"); });
  const auto before = contents_of(files("run").directory);
  EXPECT_TRUE(contains(pretrain_error("run", tp, {"training.steps=2"}), "none of the 1 checkpoints in "));
  EXPECT_EQ(contents_of(files("run").directory), before);
}

TEST_F(Pretrain, RefusesADirectoryThatAnotherRunIsIn) {
  const int tp = runtime().size();
  std::optional<RunLock> other;
  on_main([&] {
    fs::create_directories(files("run").directory);
    other.emplace(files("run").lock());
  });
  EXPECT_TRUE(contains(pretrain_error("run", tp), "another process trains in " + files("run").directory.string()));
  on_main([&] { other.reset(); });
  pretrain("run", tp, {"training.steps=1"});
}

// Two hosts with copies of the pictures: here a folder's name that means another one to each rank. All pack from rank
// 0's list, so captions needn't be the same; pictures must.
TEST_F(Pretrain, RefusesReplicasWithOtherPictures) {
  if (runtime().size() == 1) return;
  on_main([&] {
    fs::create_directory(folder_.path() / "other");
    fs::copy(pictures(), folder_.path() / "other" / "pictures", fs::copy_options::recursive);
    write_file(folder_.path() / "other" / "pictures" / "picture3.txt", "Another caption.");
  });
  const auto here = fs::current_path();
  fs::current_path(folder_.path() / (runtime().rank() == 1 ? "other" : "."));
  const Overrides overrides = {"data.directory=pictures", "training.global_batch_size=4", "training.steps=1"};
  pretrain("alike", 1, overrides);
  on_main([&] { write_file(folder_.path() / "other/pictures/picture3.png", "another picture"); });
  const auto text = pretrain_error("run", 1, overrides);
  fs::current_path(here);
  EXPECT_TRUE(contains(text, "pictures isn't the same on all hosts: picture3.png has "));
  EXPECT_TRUE(contains(text, " bytes on rank 0's, here 15"));
  EXPECT_TRUE(contains(text, "rank 1 of "));
}

TEST_F(Pretrain, SaysHowManySamplesFitIntoNoPack) {
  on_main([&] {
    std::string caption;
    for (int i = 0; i < 200; ++i) caption += "red ball ";
    write_file(pictures() / "picture2.txt", caption);
  });
  if (runtime().rank() == 0) testing::internal::CaptureStdout();
  pretrain("run", runtime().size(), {"training.steps=1"});
  if (runtime().rank() != 0) return;
  EXPECT_TRUE(contains(testing::internal::GetCapturedStdout(),
                       "samples left out because they take more than the 128 positions of training.sequence_length: 1 "
                       "of the 12 that were looked at\n"));
}

/// Leaves a picture's header and takes the rest.
void cut(const fs::path& picture) { fs::resize_file(picture, fs::file_size(picture) / 2); }

TEST_F(Pretrain, TakesABrokenPictureAsBlack) {
  on_main([&] {
    for (const auto* name : {"picture1.png", "picture2.png", "picture3.png"}) cut(pictures() / name);
  });
  if (runtime().rank() == 0) testing::internal::CaptureStderr();
  pretrain("broken", runtime().size(), {"training.steps=4", "validation.interval=1", "report.pictures=12"});
  if (runtime().rank() == 0) {
    const auto said = testing::internal::GetCapturedStderr();
    // Each once, in whatever epoch and on whatever rank it was read; the fourth step is in the second epoch at least.
    for (const auto* name : {"picture1.png", "picture2.png", "picture3.png"}) {
      const auto at = said.find(name);
      EXPECT_TRUE(at != std::string::npos && said.find(name, at + 1) == std::string::npos) << said;
    }
    const auto lines = metrics_of(files("broken"));
    EXPECT_EQ(lines.size(), 4U);
    EXPECT_TRUE(!lines.empty() && lines[0].value("loss", 0.0) > 1.0 && lines[0].contains("validation_loss"));
  }
}

TEST_F(Pretrain, StopsAtTooManyBrokenPictures) {
  on_main([&] {
    for (const auto* name : {"picture1.png", "picture2.png"}) write_file(pictures() / name, "no picture");
  });
  const int tp = runtime().size();
  pretrain("two", tp, {"training.steps=1"});
  EXPECT_TRUE(contains(pretrain_error("share", tp, {"data.max_unreadable=0.1"}),
                       "2 of 12 pictures can't be read (first: " + (pictures() / "picture1.png").string() +
                           ": it is none of PNG, JPEG, WebP, GIF, BMP, TIFF), which is more than "
                           "data.max_unreadable 0.1 allows"));
  // Headers may be whole where pictures aren't.
  on_main([&] {
    for (int i = 3; i < 12; ++i) cut(pictures() / ("picture" + std::to_string(i) + ".png"));
  });
  EXPECT_TRUE(contains(pretrain_error("later", tp, {"training.steps=9"}), "more than data.max_unreadable allows"));
  on_main([&] {
    for (const auto& entry : fs::directory_iterator(pictures())) {
      if (entry.path().extension() == ".png") write_file(entry.path(), "no picture");
    }
  });
  EXPECT_TRUE(contains(pretrain_error("all", tp, {"data.max_unreadable=1"}), "12 of 12 pictures can't be read"));
}

// A start takes pictures and captions from the index where the folder's time is the same; files that were changed in
// place are found when they are read, and looked at by the next start.
TEST_F(Pretrain, FindsFilesThatChangedWithoutTheirFolder) {
  const int tp = runtime().size();
  const auto index_file = files("run").directory / "pictures.index";
  on_main([&] {
    auto index = scan_folder(pictures());
    for (auto& folder : index.folders) {
      struct stat status {};
      EXPECT_EQ(stat((pictures() / folder.path).c_str(), &status), 0);
      folder.changed = int64_t{status.st_ctim.tv_sec} * 1'000'000'000 + status.st_ctim.tv_nsec;
      for (auto& picture : folder.pictures) picture.modified = 1;
    }
    write_file(index_file, to_bytes(index));
  });
  if (runtime().rank() == 0) testing::internal::CaptureStderr();
  pretrain("run", tp, {"training.steps=1"});
  if (runtime().rank() == 0) {
    const auto said = testing::internal::GetCapturedStderr();
    const auto at = said.find("has changed since");
    EXPECT_TRUE(at != std::string::npos && said.find("has changed since", at + 1) == std::string::npos) << said;
    EXPECT_FALSE(fs::exists(index_file));
  }
  pretrain("run", tp, {"training.steps=2"});
  EXPECT_TRUE(fs::exists(index_file));
}

TEST_F(Pretrain, LeavesPicturesWithoutCaptionOut) {
  const Overrides one_step = {"training.steps=1"};
  pretrain("run", runtime().size(), one_step);
  on_main([&] {
    small_run::write_picture(pictures() / "empty.png", 40, 40, 3);
    write_file(pictures() / "empty.txt", " \n\n");
    small_run::write_picture(pictures() / "none.png", 40, 40, 4);
  });
  pretrain("more", runtime().size(), one_step);
  expect_same_run(files("more"), files("run"), rounding());
}

TEST_F(Pretrain, RefusesFoldersWithoutCaptionedPictures) {
  const int tp = runtime().size();
  const auto missing = (folder_.path() / "missing").string();
  const auto empty = (folder_.path() / "empty").string();
  on_main([&] {
    fs::create_directory(empty);
    small_run::write_picture(fs::path(empty) / "a.png", 20, 20, 1);
  });
  for (const int size : {1, tp}) {
    EXPECT_TRUE(contains(pretrain_error("run", size, {"data.directory=" + missing}), missing));
    EXPECT_TRUE(contains(pretrain_error("run", size, {"data.directory=" + empty}), empty));
  }
  EXPECT_TRUE(contains(pretrain_error("run", tp, {"data.held_out=0.999"}), "are held out (data.held_out 0.999)"));
}

TEST_F(Pretrain, GoesBackBeyondADamagedCheckpointWhenAsked) {
  const int tp = runtime().size();
  const Overrides overrides = {"training.steps=2", "checkpoint.interval=1"};
  pretrain("run", tp, overrides);
  const auto whole = runtime().rank() == 0 ? tensors_of(files("run").checkpoints() / step_name(2))
                                           : std::map<std::string, at::Tensor>();
  const auto file = files("run").checkpoints() / step_name(2) /
                    ("rank-000" + std::to_string(tp - 1) + "-of-000" + std::to_string(tp) + ".safetensors");
  on_main([&] {
    auto bytes = read_file(file);
    bytes[bytes.size() / 2] = static_cast<char>(bytes[bytes.size() / 2] ^ 16);
    write_file(file, bytes);
  });
  const auto before = contents_of(files("run").directory);
  EXPECT_EQ(check(runtime(), {.checkpoint = files("run").checkpoints() / step_name(1)}), 0);
  EXPECT_TRUE(contains(agreed_error([&] { check(runtime(), {.checkpoint = files("run").directory}); }),
                       file.filename().string() + " is damaged"));
  auto text = agreed_error([&] {
    generate(runtime(), {.checkpoint = files("run").checkpoints() / "latest", .images = {pictures() / "picture0.png"}});
  });
  EXPECT_TRUE(contains(text, file.filename().string() + " is damaged"));
  EXPECT_TRUE(contains(text, "the newest whole one beside it is ") && contains(text, step_name(1)));
  text = pretrain_error("run", tp, overrides);
  EXPECT_TRUE(contains(text, file.filename().string() + " is damaged"));
  EXPECT_TRUE(contains(text, "checkpoint.pass_over_damaged=true goes on from ") && contains(text, step_name(1)));
  EXPECT_EQ(contents_of(files("run").directory), before);
  pretrain("run", tp, with(overrides, {"checkpoint.pass_over_damaged=true"}));
  if (runtime().rank() != 0) return;
  EXPECT_EQ(metrics_of(files("run")).size(), 2U);
  const auto again = tensors_of(files("run").checkpoints() / step_name(2));
  for (const auto& [name, tensor] : whole) EXPECT_TRUE(test_support::near(again.at(name), tensor, rounding())) << name;
}

TEST_F(Pretrain, RefusesACheckpointThatDoesNotFit) {
  const int tp = runtime().size();
  pretrain("run", tp, {"training.steps=1"});
  const auto other_size = pretrain_error("run", tp, {"training.steps=2", "model.hidden_size=64"});
  EXPECT_TRUE(contains(other_size, "step-00000001 with model.hidden_size 64 (was 32)"));
  on_main([&] {
    for (const auto& entry : fs::directory_iterator(files("run").checkpoints() / step_name(1))) {
      if (entry.path().extension() != ".safetensors") continue;
      std::fstream(entry.path(), std::ios::binary | std::ios::in | std::ios::out) << "not tensors";
    }
  });
  EXPECT_TRUE(
      contains(pretrain_error("run", tp, {"training.steps=2"}), "of-000" + std::to_string(tp) + ".safetensors"));
}

TEST_F(Pretrain, GoesOnWithItsOwnTokenizerOnly) {
  const int tp = runtime().size();
  pretrain("run", tp, {"training.steps=1"});
  on_main([&] { fs::remove(files("run").tokenizer()); });
  const auto text = pretrain_error("run", tp, {"training.steps=2"});
  EXPECT_TRUE(contains(text, files("run").tokenizer().string() + " is missing"));
  EXPECT_TRUE(contains(text, "run.fresh=true"));
}

TEST_F(Pretrain, NamesTheRunDirectoryThatCannotBeMade) {
  on_main([&] { std::ofstream(files("run").directory) << "a file"; });
  const auto directory = (files("run").directory / "below").string();
  EXPECT_TRUE(contains(pretrain_error("run", runtime().size(), {"run.directory=" + directory}),
                       "run.directory " + directory + " cannot be made: Not a directory"));
}

TEST_F(Pretrain, CaptionsAlikeAtEveryTensorParallelSize) {
  pretrain("run", runtime().size());
  const auto checkpoint = files("run").checkpoints() / "latest";
  const std::string picture = "picture3.png";
  if (runtime().rank() == 0) testing::internal::CaptureStdout();
  const int status = generate(
      runtime(), {.checkpoint = checkpoint, .images = {pictures() / picture}, .prompt = "The", .max_new_tokens = 6});
  const auto printed = runtime().rank() == 0 ? testing::internal::GetCapturedStdout() : std::string();
  EXPECT_EQ(status, 0);
  if (runtime().rank() == 0) {
    EXPECT_TRUE(printed.starts_with("The")) << printed;
  }
  const auto expected = parallel::broadcast_text(printed, 0, world_tp());
  if (runtime().rank() == 0) testing::internal::CaptureStdout();
  generate(runtime(), {.checkpoint = checkpoint,
                       .images = {pictures() / picture},
                       .prompt = "The",
                       .max_new_tokens = 6,
                       .cache = false});
  if (runtime().rank() == 0) {
    EXPECT_EQ(testing::internal::GetCapturedStdout(), expected);
  }

  for (const int tp : divisors_of_world()) {
    SCOPED_TRACE(testing::Message() << "tensor " << tp);
    const CheckpointReader reader(checkpoint);
    const auto state = run_state_of(reader);
    const auto tokenizer = Tokenizer::load(files("run").tokenizer());
    Step37Model model(model_config(state.config, tokenizer.vocab_size()), groups(tp).tp);
    model->to(runtime().device());
    reader.load(sharded_tensors(parameter_shards(*model), published_name, groups(tp)), UnusedTensors::kAllow);
    auto options = captioner_options(state.config, tokenizer, tp);
    options.max_new_tokens = 6;
    const auto reference = reference_to(pictures() / picture, options.format);
    auto prompt = prompt_tokens({reference}, options.format);
    const auto begin = tokenizer.encode("The");
    prompt.insert(prompt.end(), begin.begin(), begin.end());
    const auto ids = caption_ids(model, prompt, {reference}, options, groups(tp).tp, runtime().device());
    auto caption = begin;
    caption.insert(caption.end(), ids.begin(), ids.end());
    EXPECT_EQ(tokenizer.decode(caption) + "\n", expected);
  }
}

// Whatever the model likes best, a caption starts no second picture, for which there would be none.
TEST_F(Pretrain, CaptionsAreTextOnly) {
  pretrain("run", runtime().size(), {"training.steps=1"});
  const auto checkpoint = files("run").checkpoints() / "latest";
  const CheckpointReader reader(checkpoint);
  const auto state = run_state_of(reader);
  const auto tokenizer = Tokenizer::load(files("run").tokenizer());
  Step37Model model(model_config(state.config, tokenizer.vocab_size()), groups(1).tp);
  model->to(runtime().device());
  initialize_parameters(parameter_shards(*model), 1);
  {
    const at::NoGradGuard no_grad;
    auto weight = model->language_model->output_layer->weight;
    weight.zero_();  // one of these two gets the largest logit, whatever the hidden state's sign
    weight.select(0, tokenizer.id_of("<im_start>")).fill_(1.0);
    weight.select(0, tokenizer.id_of("<patch_start>")).fill_(-1.0);
  }
  auto options = captioner_options(state.config, tokenizer, 1);
  options.max_new_tokens = 3;
  const auto reference = reference_to(pictures() / "picture3.png", options.format);
  const auto prompt = prompt_tokens({reference}, options.format);
  std::vector<int64_t> ids;
  EXPECT_NO_THROW(ids = caption_ids(model, prompt, {reference}, options, groups(1).tp, runtime().device()));
  EXPECT_EQ(ids, std::vector<int64_t>(3, tokenizer.unk_id()));
}

}  // namespace megatron_cpp::step37
