// What `plan` says, against one real step: bytes sent, peak of live tensors, parameters, FLOPs.
#include "step37/program/plan.h"

#include <ATen/ATen.h>
#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "megatron_cpp/training/trainer.h"
#include "parallel/recording_backend.h"
#include "parallel/rehearsal_backend.h"
#include "tests/step37/small_run.h"
#include "tests/support/environment.h"
#include "tests/support/live_bytes.h"
#include "tests/support/temporary_folder.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::step37 {
namespace {

using namespace test_support;
using small_run::Overrides;
using small_run::with;
using Bytes = std::map<std::string, int64_t>;

constexpr int64_t kImStart = 1;

/// The vocabulary isn't divisible by 2 or 4; windows are shorter than a pack.
constexpr std::string_view kConfig =
    "data: {directory: none, vocabulary_size: 301}\n"
    "model:\n"
    "  {hidden_size: 64, num_layers: 5, head_dim: 16, num_attention_heads: 4, num_sliding_attention_heads: 8,\n"
    "   num_query_groups: 4, ffn_hidden_size: 160, sliding_window: 24, projector_bias: true}\n"
    "vision: {image_size: 112, width: 32, layers: 2, heads: 2, mlp_width: 128}\n"
    "training: {steps: 1, global_batch_size: 8, micro_batch_size: 2, sequence_length: 128}\n";

RunConfig load(const Overrides& overrides = {}, std::string_view text = kConfig) {
  const TemporaryFolder folder;
  return load_run_config(folder.write("plan.yaml", text), overrides);
}

/// The picture's rows stand behind the start token at the beginning of a pack, one picture after the other.
Step37Batch batch_of(const RunConfig& config, const StepShape& shape, const parallel::GroupPtr& tp) {
  const int64_t length = shape.sequence_length;
  const int64_t packs = shape.micro_batch_size;
  const int64_t rows = config.vision.feature_rows(config.vision.image_size, config.vision.image_size);
  Step37Batch batch;
  batch.input_ids = at::arange(packs * length, at::kLong).remainder(200).add(50).unsqueeze(0);
  batch.labels = batch.input_ids.roll(-1, 1);
  batch.attention.position_ids = at::arange(length, at::kLong).repeat({packs}).unsqueeze(0);
  batch.attention.cu_seqlens = at::arange(packs + 1, at::kInt) * length;
  const int64_t images = packs * shape.images_per_pack;
  if (images == 0) return batch;
  for (int64_t image = 0; image < images; ++image) {
    const int64_t pack = image / shape.images_per_pack;
    const int64_t place = image % shape.images_per_pack;
    batch.input_ids[0][pack * length + place * (rows + 4) + 1].fill_(kImStart);
  }
  const int64_t t = tp->getSize();
  ImageForInsert group;
  group.insert_start_token = kImStart;
  int64_t own = images;
  if (config.parallel.mm_encoder_tp_mode == MmEncoderTpMode::kData) {
    group.held = HeldImages{at::full({images}, rows, at::kLong), at::arange(images, at::kLong).remainder(t)};
    own = (images - tp->getRank() + t - 1) / t;
  }
  if (shape.runs_tower) {
    group.images = at::ones({own, 3, config.vision.image_size, config.vision.image_size});
  } else {
    group.image_features = at::ones({own, rows, config.vision.output_dim()}, at::kBFloat16);
  }
  batch.images = {group};
  return batch;
}

struct Measured {
  Bytes bytes;  ///< that this rank sent, by kind
  int64_t peak = 0;
  int64_t local_elements = 0;
  int64_t whole_elements = 0;
};

/// One step of the real model over `groups`.
Measured measure(const RunConfig& config, const Plan& plan, parallel::ProcessGroups groups) {
  Measured measured;
  groups = parallel::observe(groups, [&](parallel::CollectiveKind collective, int64_t sent) {
    if (sent > 0) measured.bytes[std::string(parallel::collective_name(collective))] += sent;
  });
  const auto watch = std::make_shared<LiveBytes>();
  {
    const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, watch);
    auto model_settings = model_config(config, config.data.vocabulary_size);
    model_settings.checked = false;
    Step37Model model(model_settings, groups);
    model->to(config.training.precision);
    const auto shards = parameter_shards(*model);
    initialize_parameters(shards, 3);
    for (const auto& shard : shards) {
      if (shard.name.ends_with("expert_bias")) continue;
      const int64_t elements = shard.parameter.numel();
      const auto& over = shard.domain.sharded_over;
      measured.local_elements += elements;
      measured.whole_elements += elements * (over.empty() ? 1 : groups.of(over)->getSize());
    }
    TrainerOptions options{.adamw = config.training, .learning_rate = learning_rate_schedule(config)};
    options.gradients = gradient_buffer_options(config.training);
    options.auxiliary_losses = model_settings.auxiliary_losses();
    const auto moe_layers = model->language_model->decoder->moe_layers();
    if (!moe_layers.empty()) options.expert_balance = std::make_shared<ExpertBalance>(moe_layers, groups);
    Trainer trainer(shards, groups, options);
    const int64_t micro_batches = plan.shape.global_batch_size / (plan.shape.micro_batch_size * plan.grid.dp);
    const int64_t num_loss_tokens = plan.shape.global_batch_size * plan.shape.sequence_length;
    trainer.step(
        [&](int64_t) {
          return model->loss_sum(batch_of(config, plan.shape, groups.tp), options.expert_balance.get(),
                                 1.0 / static_cast<double>(num_loss_tokens));
        },
        micro_batches, num_loss_tokens);
  }
  measured.peak = watch->peak;
  return measured;
}

Bytes bytes_of(const Plan& plan) {
  Bytes bytes;
  for (int kind = 0; kind < parallel::kNumCollectiveKinds; ++kind) {
    const int64_t sent = plan.bytes_of(static_cast<parallel::CollectiveKind>(kind));
    if (sent > 0) bytes[std::string(parallel::collective_name(static_cast<parallel::CollectiveKind>(kind)))] = sent;
  }
  return bytes;
}

/// A plan for the layout of `groups`, and the same measured.
std::pair<Plan, Measured> plan_and_measure(Overrides overrides, const parallel::ProcessGroups& groups) {
  overrides.push_back(c10::str("tp=", groups.grid.tp));
  const auto config = load(overrides);
  const auto plan = make_plan(config, groups.grid.world_size());
  return {plan, measure(config, plan, groups)};
}

/// What a plan says of one part.
int64_t elements_of(const Plan& plan, std::string_view part) {
  auto tensors = plan.tensors;
  std::erase_if(tensors, [&](const TensorGroup& tensor) { return tensor.part != part; });
  return whole_elements(tensors);
}

RunConfig released(const Overrides& overrides = {}) {
  return load_run_config(cases() / "../../configs/step37_flash.yaml", overrides);
}

std::string refusal(const std::function<void()>& body) {
  try {
    body();
  } catch (const c10::ValueError& error) {
    return error.what_without_backtrace();
  }
  return "none";
}

}  // namespace

const Overrides kBfloat16 = {"training.precision=bfloat16"};
const Overrides kFeatures = {"vision.freeze=true", "data.features=somewhere"};
const Overrides kZero1 = {"training.precision=bfloat16", "training.distributed_optimizer=true"};

void expect_a_real_steps_parameters_and_bytes(const std::vector<Overrides>& variants) {
  for (const int tp : divisors_of_world()) {
    for (const auto& variant : variants) {
      SCOPED_TRACE(testing::Message() << "tp " << tp << ", " << testing::PrintToString(variant));
      const auto [plan, measured] = plan_and_measure(variant, groups(tp));
      EXPECT_EQ(bytes_of(plan), measured.bytes);
      EXPECT_EQ(local_elements(plan.tensors), measured.local_elements);
      EXPECT_EQ(whole_elements(plan.tensors), measured.whole_elements);
    }
  }
}

TEST(Plan, ParametersAndBytesAreThoseOfARealStep) {
  expect_a_real_steps_parameters_and_bytes(
      {{},
       {"parallel.sequence_parallel=false"},
       {"training.micro_batch_size=1", "model.projector_bias=false"},
       {"parallel.projector_sharding=column"},
       {"parallel.projector_sharding=row"},
       {"parallel.embedding_sharding=hidden"},
       {"parallel.exchange=all-gather"},
       {"model.freeze_language_model=true"},
       {"vision.freeze=true"},
       {"vision.freeze=true", "model.freeze_projector=true", "parallel.sequence_parallel=false"},
       kFeatures,
       {"model.mtp_num_layers=2"},
       {"model.mtp_num_layers=2", "model.mtp_loss_scaling_factor=0.3"},
       {"model.mtp_num_layers=1", "model.mtp_loss_scaling_factor=0.3", "parallel.sequence_parallel=false"},
       {"training.loss_chunk=50"},
       {"training.loss_chunk=1000", "model.freeze_language_model=true"},
       {"training.loss_chunk=64", "model.mtp_num_layers=1", "model.mtp_loss_scaling_factor=0.3",
        "parallel.sequence_parallel=false"},
       kBfloat16,
       with(kBfloat16, {"training.main_gradients=bfloat16", "parallel.projector_sharding=column"}),
       {"training.distributed_optimizer=true"},
       with(kBfloat16, {"training.distributed_optimizer=true", "vision.freeze=true"})});
}

/// Heads for four ranks; few packs, since every rank runs the tower on all pictures.
const Overrides kSplitTower = {"parallel.mm_encoder_tp_mode=weights", "vision.heads=4", "training.global_batch_size=4",
                               "training.micro_batch_size=1"};

// Every rank has the features: a replicated projector that is trained alone sends nothing backward.
TEST(Plan, ParametersAndBytesOfASplitTowerAreThoseOfARealStep) {
  std::vector<Overrides> variants = {{},
                                     {"parallel.sequence_parallel=false"},
                                     {"parallel.projector_sharding=column"},
                                     {"parallel.projector_sharding=row"},
                                     {"parallel.embedding_sharding=hidden"},
                                     {"parallel.exchange=all-gather"},
                                     {"vision.freeze=true"},
                                     kFeatures,
                                     with(kFeatures, {"parallel.projector_sharding=column"}),
                                     {"vision.freeze=true", "model.freeze_language_model=true"}};
  for (auto& variant : variants) variant = with(kSplitTower, variant);
  expect_a_real_steps_parameters_and_bytes(variants);
}

const Overrides kExperts = {"model.num_moe_experts=8", "model.moe_ffn_hidden_size=64", "model.moe_router_topk=2",
                            "model.moe_shared_expert_intermediate_size=96", "model.moe_first_layer=1"};

const Overrides kAuxiliaryLosses = {"model.moe_aux_loss_coeff=0.01", "model.moe_z_loss_coeff=0.001",
                                    "model.moe_group_balance_loss_coeff=0.001", "model.moe_group_balance_groups=4",
                                    "model.moe_router_bias_update_rate=0.001"};

// Without expert parallelism bytes don't depend on the routing.
TEST(Plan, BytesOfExpertsAreThoseOfARealStep) {
  const int size = runtime().size();
  for (const int tp : divisors_of_world()) {
    for (const int etp : divisors_of_world()) {
      for (const std::string sequence_parallel : {"true", "false"}) {
        SCOPED_TRACE(testing::Message() << "tp " << tp << ", etp " << etp << " " << sequence_parallel);
        const auto& groups = test_support::groups(parallel::RankGrid{.tp = tp, .dp = size / tp, .ep = 1, .etp = etp});
        auto overrides = with(kExperts, {c10::str("etp=", etp), "parallel.sequence_parallel=" + sequence_parallel});
        if (sequence_parallel == "true") overrides = with(overrides, kAuxiliaryLosses);
        overrides.push_back("training.distributed_optimizer=" + sequence_parallel);
        const auto [plan, measured] = plan_and_measure(overrides, groups);
        EXPECT_EQ(bytes_of(plan), measured.bytes);
        EXPECT_EQ(local_elements(plan.tensors), measured.local_elements);
        EXPECT_EQ(whole_elements(plan.tensors), measured.whole_elements);
      }
    }
  }
}

// What the all-to-alls send depends on the routing, which a plan takes as even.
TEST(Plan, OnlyAllToAllsOfExpertParallelismDependOnTheRouting) {
  const int size = runtime().size();
  for (const int ep : divisors_of_world()) {
    SCOPED_TRACE(testing::Message() << "ep " << ep);
    const auto& groups = test_support::groups(parallel::RankGrid{.tp = size, .ep = ep, .etp = 1});
    const auto [plan, measured] = plan_and_measure(with(kExperts, {c10::str("ep=", ep), "etp=1"}), groups);
    const auto planned = bytes_of(plan);
    EXPECT_EQ(planned.size(), measured.bytes.size());
    for (const auto& [kind, bytes] : measured.bytes) {
      if (kind == "all_to_all") continue;
      EXPECT_EQ(planned.at(kind), bytes) << kind;
    }
  }
}

const Overrides kFull = {"training.recompute=full"};
const Overrides kParts = {"training.recompute=core_attention, mlp, tower"};
const Overrides kExpertParts = {"training.recompute=mlp, experts"};
const Overrides kNorms = {"training.recompute=norms"};
const Overrides kNormsAndParts = {"training.recompute=core_attention, mlp, experts, norms"};
/// Packs so long that activations are most of a rank's memory.
const Overrides kLong = {"training.sequence_length=512", "training.micro_batch_size=1", "training.global_batch_size=4"};

// What is computed again is sent again, but for the experts' counts.
TEST(Plan, BytesOfRecomputingAreThoseOfARealStep) {
  const Overrides replicated = {"parallel.sequence_parallel=false"};
  expect_a_real_steps_parameters_and_bytes(
      {with(kFull, {"model.mtp_num_layers=1", "model.mtp_loss_scaling_factor=0.3", "training.micro_batch_size=1"}),
       with(with(kFull, kSplitTower), replicated), with(kParts, kSplitTower), with(kFull, kExperts),
       with(with(kFull, kExperts), replicated), with(with(kExpertParts, kExperts), replicated),
       with(kNormsAndParts, kExperts)});
  const int size = runtime().size();
  const auto& groups = test_support::groups(parallel::RankGrid{.tp = size, .ep = size, .etp = 1});
  const auto experts = with(kExperts, {c10::str("ep=", size), "etp=1"});
  for (const auto& recompute : {kFull, kExpertParts}) {
    const auto [plan, measured] = plan_and_measure(with(experts, recompute), groups);
    const auto planned = bytes_of(plan);
    for (const auto& [kind, bytes] : measured.bytes) {
      if (kind == "all_to_all") continue;  // depends on the routing
      EXPECT_EQ(planned.at(kind), bytes) << kind;
    }
  }
}

TEST(Plan, MemoryOfRecomputingIsThePeakOfLiveTensors) {
  const Overrides wide_tower = {"model.num_layers=1", "vision.layers=6", "vision.mlp_width=512"};
  const std::vector<Overrides> variants = {
      kFull,
      with(kFull, {"training.sequence_length=512", "parallel.sequence_parallel=false"}),
      with(kFull, wide_tower),
      {"training.recompute=core_attention"},
      {"training.recompute=mlp", "model.ffn_hidden_size=1024"},
      with(kParts, wide_tower),
      with(with(kExperts, kAuxiliaryLosses), kFull),
      with(kExperts, kExpertParts),
      with(with(kNorms, kLong), {"parallel.sequence_parallel=false"}),
      with(with(kExperts, kNorms), kLong),
      with(with(kExperts, kNormsAndParts), kLong)};
  for (const int tp : divisors_of_world()) {
    for (const auto& variant : variants) {
      SCOPED_TRACE(testing::Message() << "tp " << tp << ", " << testing::PrintToString(variant));
      const auto [plan, measured] = plan_and_measure(variant, groups(tp));
      EXPECT_NEAR(static_cast<double>(plan.memory.total()) / static_cast<double>(measured.peak), 1.0, 0.05);
    }
  }
}

TEST(Plan, MemoryOfExpertsIsThePeakOfLiveTensors) {
  for (const int tp : divisors_of_world()) {
    for (const auto& overrides : {kExperts, with(kExperts, kAuxiliaryLosses)}) {
      SCOPED_TRACE(testing::Message() << "tp " << tp << " " << testing::PrintToString(overrides));
      const auto [plan, measured] = plan_and_measure(overrides, groups(tp));
      EXPECT_NEAR(static_cast<double>(plan.memory.total()) / static_cast<double>(measured.peak), 1.0, 0.05);
    }
  }
}

TEST(Plan, MemoryIsThePeakOfLiveTensors) {
  const std::vector<Overrides> variants = {
      {},
      {"parallel.sequence_parallel=false"},
      {"training.sequence_length=512", "training.micro_batch_size=1"},
      {"data.vocabulary_size=10000"},
      {"data.vocabulary_size=10000", "training.loss_chunk=100"},
      {"data.vocabulary_size=10000", "training.loss_chunk=64", "parallel.sequence_parallel=false", "model.num_layers=1",
       "model.mtp_num_layers=2", "model.mtp_loss_scaling_factor=0.3"},
      {"model.ffn_hidden_size=1024"},
      {"model.num_layers=1", "vision.layers=6", "vision.mlp_width=512"},
      {"vision.freeze=true"},
      {"vision.freeze=true", "data.vocabulary_size=10000", "training.loss_chunk=32", "model.num_layers=1"},
      kFeatures,
      with(kFeatures, {"data.vocabulary_size=10000", "training.loss_chunk=32", "model.num_layers=1"}),
      {"training.distributed_optimizer=true"},
      kSplitTower,
      with(kSplitTower, {"parallel.projector_sharding=column"}),
      with(kSplitTower, {"model.num_layers=1", "vision.layers=6", "vision.mlp_width=512"}),
      {"model.mtp_num_layers=2"},
      {"model.mtp_num_layers=2", "model.mtp_loss_scaling_factor=0.3"},
      {"model.mtp_num_layers=3", "model.mtp_loss_scaling_factor=0.3", "parallel.sequence_parallel=false",
       "data.vocabulary_size=3000"}};
  for (const int tp : divisors_of_world()) {
    for (const auto& variant : variants) {
      SCOPED_TRACE(testing::Message() << "tp " << tp << ", " << testing::PrintToString(variant));
      const auto [plan, measured] = plan_and_measure(variant, groups(tp));
      EXPECT_NEAR(static_cast<double>(plan.memory.total()) / static_cast<double>(measured.peak), 1.0, 0.03);
    }
  }
}

// Without a large vocabulary and with a narrow tower: on CPUs bfloat16 products and convolutions have float32 copies.
TEST(Plan, MemoryInBfloat16IsThePeakOfLiveTensors) {
  const std::vector<Overrides> variants = {
      {},
      {"model.ffn_hidden_size=1024", "parallel.sequence_parallel=false"},
      {"training.main_gradients=bfloat16", "training.exp_avg=bfloat16", "training.exp_avg_sq=bfloat16"},
      {"training.distributed_optimizer=true"},
      with(kExperts, {"training.distributed_optimizer=true"}),
      kExperts};
  for (const int tp : divisors_of_world()) {
    for (const auto& variant : variants) {
      SCOPED_TRACE(testing::Message() << "tp " << tp << ", " << testing::PrintToString(variant));
      const auto [plan, measured] = plan_and_measure(with(with(kBfloat16, {"vision.width=16"}), variant), groups(tp));
      EXPECT_NEAR(static_cast<double>(plan.memory.total()) / static_cast<double>(measured.peak), 1.0, 0.05);
    }
  }
}

// Nobody else is there: rehearsed collectives count what this rank would send. The released model's shape with widths
// divided by 32, without experts.
TEST(Plan, BytesOfManyRanksAreThoseOfARehearsedStep) {
  if (runtime().size() > 1) GTEST_SKIP() << "one process is enough";
  constexpr std::string_view kNarrow =
      "data: {directory: none, vocabulary_size: 4025}\n"
      "model:\n"
      "  {hidden_size: 128, num_layers: 5, head_dim: 4, num_attention_heads: 64, num_sliding_attention_heads: 96,\n"
      "   num_query_groups: 8, ffn_hidden_size: 352, sliding_window: 16}\n"
      "vision: {image_size: 112, width: 48, layers: 2, heads: 4, mlp_width: 280}\n"
      "training: {steps: 1, global_batch_size: 1024, sequence_length: 128}\n";
  for (const int ranks : {8, 64, 4096}) {
    const auto config = load({"tp=8", c10::str("parallel.dp=", ranks / 8)}, kNarrow);
    auto few = config;
    few.training.global_batch_size = 2 * ranks / 8;  // two micro-batches of each replica
    const auto plan = make_plan(few, ranks);
    EXPECT_EQ(plan.grid.dp, ranks / 8);
    for (const int rank : {0, ranks / 2 + 3, ranks - 1}) {
      SCOPED_TRACE(testing::Message() << "rank " << rank << " of " << ranks);
      parallel::ProcessGroups groups;
      groups.grid = plan.grid;
      for (const auto& [name, dims, group] : parallel::kGroupKinds) {
        const auto members = plan.grid.group_of(rank, dims);
        const auto place = std::find(members.begin(), members.end(), rank) - members.begin();
        groups.*group = parallel::make_rehearsal_group(static_cast<int>(place), static_cast<int>(members.size()));
      }
      EXPECT_EQ(bytes_of(plan), measure(few, plan, groups).bytes);
    }
  }
}

TEST(Plan, FlopsAreThoseOfTheModelsMatrices) {
  // Without windows and pictures: 6 a parameter of a matrix and token, the embedding aside, and attention's two
  // products over the pairs of positions.
  const auto text = load({"model.sliding_window=4096", "vision.layers=1"});
  const auto plan = make_plan(text, 1, 0);
  const Step37Model model(model_config(text, 301), single());
  double matrices = 0.0;
  for (const auto& shard : parameter_shards(*model->language_model)) {
    const bool is_matrix = shard.parameter.dim() == 2 && shard.name.find("word_embeddings") == std::string::npos;
    if (is_matrix) matrices += static_cast<double>(shard.parameter.numel());
  }
  const double heads = 4 + 3 * 8 + 4;  // layers 0 and 4 have full attention
  const double tokens = 8 * 128;
  const double half = 128.0 / 2;
  EXPECT_DOUBLE_EQ(static_cast<double>(plan.flops), 6 * matrices * tokens + 3 * tokens * half * heads * 16 * 2 * 2);

  // A window of 24 instead of half of 128 positions, in three layers of 8 heads.
  const auto windowed = make_plan(load({"vision.layers=1"}), 1, 0);
  EXPECT_DOUBLE_EQ(static_cast<double>(plan.flops - windowed.flops), 3 * tokens * (64 - 24) * 3 * 8 * 16 * 2 * 2);

  // Multi-token prediction: its matrices, and attention of 8 heads in each layer. Frozen it is not run.
  const std::vector<std::string> mtp{"model.sliding_window=4096", "vision.layers=1", "model.mtp_num_layers=2"};
  EXPECT_EQ(make_plan(load(mtp), 1, 0).flops, plan.flops);
  const auto trained = load(with(mtp, {"model.mtp_loss_scaling_factor=0.3"}));
  const Step37Model with_mtp(model_config(trained, 301), single());
  double mtp_matrices = 0.0;
  for (const auto& shard : parameter_shards(*with_mtp->language_model->mtp)) {
    if (shard.parameter.dim() == 2) mtp_matrices += static_cast<double>(shard.parameter.numel());
  }
  EXPECT_DOUBLE_EQ(static_cast<double>(make_plan(trained, 1, 0).flops - plan.flops),
                   6 * mtp_matrices * tokens + 3 * tokens * half * 2 * 8 * 16 * 2 * 2);

  // One more forward pass, but for the output layer, which isn't recomputed.
  const double output = static_cast<double>(model->language_model->output_layer->weight.numel());
  const auto of = [](const std::string& recompute) {
    return static_cast<double>(
        make_plan(load({"model.sliding_window=4096", "vision.layers=1", "training.recompute=" + recompute}), 1, 0)
            .flops);
  };
  const double kept = static_cast<double>(plan.flops);
  EXPECT_DOUBLE_EQ(of("full") - kept, 2 * (matrices - output) * tokens + tokens * half * heads * 16 * 2 * 2);
  EXPECT_DOUBLE_EQ(of("core_attention") - kept, tokens * half * heads * 16 * 2 * 2);
  EXPECT_DOUBLE_EQ(of("mlp") - kept, 2 * 5 * 3.0 * 64 * 160 * tokens);

  // One picture a pack: its weights at each place where they are applied, and attention over all pairs of patches.
  double picture = 0.0;
  for (const auto& item : model->vision_model->named_parameters()) {
    const auto& weight = item.value();
    if (weight.dim() < 2 || item.key() == "positional_embedding") continue;
    const bool first = item.key() == "conv1.weight";
    const double places = item.key().starts_with("vit_downsampler1") ? 16 : item.key().starts_with("vit") ? 4 : 64;
    picture += (first ? 2 : 3) * 2 * places * static_cast<double>(weight.numel());
  }
  picture += 3 * 2 * 2 * 64 * 64 * 32;
  picture += 3 * 2 * 4 * static_cast<double>(model->image_insert_embedding->align_projector->weight.numel());
  const auto with_picture = make_plan(text, 1, 1);
  EXPECT_DOUBLE_EQ(static_cast<double>(with_picture.flops - plan.flops), 8 * picture);
  const auto frozen = make_plan(load({"model.sliding_window=4096", "vision.layers=1", "vision.freeze=true"}), 1, 1);
  EXPECT_LT(frozen.flops, with_picture.flops);
  // Of given features only the projector's product and the gradient of its weight are left.
  const auto given = make_plan(load(with(kFeatures, {"model.sliding_window=4096", "vision.layers=1"})), 1, 1);
  const double projector =
      2 * 2 * 4 * static_cast<double>(model->image_insert_embedding->align_projector->weight.numel());
  EXPECT_DOUBLE_EQ(static_cast<double>(given.flops - plan.flops), 8 * projector);
}

// The blocks are shared out; patches and downsamplers are computed on every rank.
TEST(Plan, FlopsOfASplitTowerRepeatItsEnds) {
  const auto flops = [](const Overrides& more) {
    return make_plan(load(with({"vision.heads=4", "tp=4", "dp=1"}, more)), 4).flops;
  };
  const double pictures = 8 * 16;
  const double ends = 2 * (2 * 64 * 3 * 14 * 14 * 32) + 3 * (2 * 16 * 18 * 32 * 32) + 3 * (2 * 4 * 72 * 32 * 32);
  EXPECT_DOUBLE_EQ(static_cast<double>(flops({"parallel.mm_encoder_tp_mode=weights"}) - flops({})),
                   3 * pictures * ends);
}

// Counted by hand from the published shapes.
TEST(Plan, HasTheReleasedModelsNumbers) {
  const auto plan = make_plan(released(), 64);
  EXPECT_EQ(elements_of(plan, "experts"), int64_t{42} * 288 * 3 * 4096 * 1280);
  EXPECT_EQ(elements_of(plan, "embedding"), int64_t{128816} * 4096);  // padded to a multiple of 8
  EXPECT_NEAR(static_cast<double>(elements_of(plan, "vision tower")), 1.95e9, 0.01e9);
  EXPECT_NEAR(static_cast<double>(elements_of(plan, "MTP layers")), 2.4e9, 0.05e9);
  EXPECT_NEAR(static_cast<double>(whole_elements(plan.tensors)), (190.3 + 6.7 + 2.4 + 1.95) * 1e9, 0.1e9);
  // 18 bytes a parameter, 12 of them divided over the ranks that the gradient is summed over.
  const auto training_state = [](const Overrides& overrides) {
    const auto memory = make_plan(released(with(overrides, kZero1)), 64).memory;
    return static_cast<double>(memory.weights + memory.gradients + memory.optimizer);
  };
  EXPECT_NEAR(training_state({}), 75e9, 1e9);
  EXPECT_NEAR(training_state({"ep=32", "etp=1"}), 92e9, 1e9);
  EXPECT_EQ(plan.memory.weights, 4 * local_elements(plan.tensors));
  EXPECT_EQ(plan.memory.optimizer, 2 * plan.memory.weights);
}

TEST(Plan, SendsATokenOnceToEachRankThatHasAnExpertOfIt) {
  const Overrides experts = {"model.num_moe_experts=8",
                             "model.moe_router_topk=2",
                             "model.moe_ffn_hidden_size=32",
                             "model.moe_first_layer=2",
                             "training.micro_batch_size=1",
                             "training.global_batch_size=2",
                             "tp=2",
                             "parallel.sequence_parallel=true"};
  const auto sent = [&](const Overrides& more) {
    auto overrides = experts;
    overrides.insert(overrides.end(), more.begin(), more.end());
    std::map<std::pair<std::string, std::string>, int64_t> result;
    for (const auto& traffic : make_plan(load(overrides), 4).traffic) {
      if (!traffic.of_experts) continue;
      result[{std::string(parallel::collective_name(traffic.kind)), std::string(traffic.group)}] = traffic.bytes;
    }
    return result;
  };
  EXPECT_TRUE(sent({"dp=2", "ep=1", "etp=1"}).empty());
  // 3 layers, 64 rows a rank. Of 28 pairs of experts 6 lie on a given rank: 1 - 6/28 of the tokens go to each of two.
  const int64_t m = 64 * 2 * 22 / 28;
  const auto by_ep = sent({"dp=2", "ep=2", "etp=1"});
  EXPECT_EQ(by_ep.at({"all_gather", "etp_ep"}), 3 * (8 + 2) * 8);
  EXPECT_EQ(by_ep.at({"all_to_all", "ep"}), 3 * (4 * (m * 64 * 4 / 2) + 2 * (m * 4 * 4 / 2)));
  EXPECT_EQ(by_ep.size(), 2U);
  const auto by_both = sent({"dp=2", "ep=2"});  // etp is 2 / 2
  EXPECT_EQ(by_both, by_ep);
  const auto by_etp = sent({"dp=2", "ep=1", "etp=2"});
  EXPECT_EQ(by_etp.at({"all_gather", "etp_ep"}), 3 * (2 * (8 + 1) * 8 / 2));
  EXPECT_EQ(by_etp.at({"all_gather", "etp"}), 3 * 64 * (2 * 64 + 4) * 4);
  EXPECT_EQ(by_etp.at({"reduce_scatter", "etp"}), 3 * 64 * (2 * 64 + 4) * 4);
}

TEST(Plan, RefusesWhatDoesNotDivide) {
  const auto error = [](const Overrides& overrides, int ranks) {
    return refusal([&] { make_plan(load(overrides), ranks); });
  };
  EXPECT_EQ(error({"tp=3"}, 3), "hidden_size 64 is not divisible by tensor-parallel size 3");
  EXPECT_EQ(error({"tp=2"}, 6),
            "training.global_batch_size 8 is not divisible by training.micro_batch_size 2 x data-parallel size 3");
  EXPECT_EQ(error(with(kSplitTower, {"tp=2", "dp=1", "vision.mlp_width=127"}), 2),
            "mm_encoder_tp_mode weights: vision mlp_width 127 is not divisible by tensor-parallel size 2");
  EXPECT_EQ(error({"cp=2"}, 2), "parallel.cp 2: context parallelism is not there yet");
  EXPECT_EQ(error({"ep=2"}, 2), "parallel.ep 2: the model has no experts to split over ranks");
  EXPECT_EQ(refusal([] {
              make_plan(released({"ep=5", "etp=1"}), 64);
            }),
            "parallel.ep 5 x parallel.etp 1 does not divide 64 ranks");
  EXPECT_EQ(refusal([] {
              make_plan(released({"ep=64", "etp=1"}), 64);
            }),
            "num_experts 288 is not divisible by expert-parallel size 64");
  EXPECT_EQ(refusal([] { make_plan(load(), 1, 17); }),
            "--images-per-pack 17 is not in [0, 16]: as many fit into training.sequence_length 128");
  EXPECT_EQ(ranks_of(load({"tp=2", "dp=0"})), 2);
  EXPECT_EQ(ranks_of(released()), 64);
}

TEST(Plan, FindsTheLayoutsThatFitAndSendLeast) {
  const auto config = released({"vision.freeze=true", "dp=1"});  // the configuration's own layout isn't asked
  PlanArguments arguments;
  arguments.gpus = 64;
  arguments.memory = 1000;
  arguments.images_per_pack = 0;
  const auto best = best_layouts(config, arguments);
  ASSERT_EQ(best.size(), 3U);
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_LE(best[i].memory.total(), int64_t{1000} * 1000 * 1000 * 1000);
    EXPECT_EQ(best[i].grid.tp * best[i].grid.dp, 64);
    EXPECT_TRUE(best[i].sequence_parallel);
    if (i == 0) continue;
    EXPECT_LE(communication_seconds(best[i - 1], arguments), communication_seconds(best[i], arguments));
  }
  // One byte less than the smallest needs is too little.
  arguments.memory = 1;
  const auto none = best_layouts(config, arguments);
  ASSERT_EQ(none.size(), 1U);
  arguments.memory = static_cast<double>(none[0].memory.total()) / 1e9;
  EXPECT_EQ(best_layouts(config, arguments).front().memory.total(), none[0].memory.total());
  arguments.gpus = 7;
  EXPECT_NE(refusal([&] { best_layouts(config, arguments); }).find("no layout of 7 GPUs divides model and batch"),
            std::string::npos);
}

}  // namespace megatron_cpp::step37
