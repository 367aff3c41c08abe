// Step37Model, whose pictures may be on any rank: loss and gradients at every tensor-parallel size against one rank.
#include "step37/step37_model.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "megatron_cpp/checkpoint/sharded_checkpoint.h"
#include "megatron_cpp/optimizer/gradient_buffer.h"
#include "megatron_cpp/parameters/parameter_shard.h"
#include "megatron_cpp/training/expert_balance.h"
#include "megatron_cpp/training/trainer.h"
#include "parallel/collectives.h"
#include "parallel/recording_backend.h"
#include "step37/program/run_config.h"
#include "tests/step37/small_run.h"
#include "tests/support/errors.h"
#include "tests/support/operator_watch.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::step37 {
namespace {

using small_run::Overrides;
using small_run::with;
using namespace test_support;
using Tensors = std::map<std::string, at::Tensor>;

constexpr int64_t kVocabulary = 300;
constexpr int64_t kImStart = 4;
constexpr int64_t kPatchStart = 7;
constexpr int64_t kS = 32;

/// Two sequences with two patches (one row each) and three images (four rows each): the second has an image only.
Step37Batch batch_without_pictures() {
  Step37Batch batch;
  batch.input_ids = (at::arange(2 * kS, at::kLong) * 37).remainder(200).add(20).view({2, kS});
  auto ids = batch.input_ids.accessor<int64_t, 2>();
  ids[0][1] = kPatchStart;
  ids[0][4] = kPatchStart;
  ids[0][8] = kImStart;
  ids[0][14] = kImStart;
  ids[1][20] = kImStart;
  batch.labels = (at::arange(2 * kS, at::kLong) * 53).remainder(kVocabulary).view({2, kS});
  batch.labels.narrow(1, 0, 10).fill_(-100);
  batch.attention.position_ids = at::arange(kS, at::kLong).unsqueeze(0);
  return batch;
}

at::Tensor pixels(int64_t count, int64_t side, int64_t seed) {
  return test_support::exact_values({count, 3, side, side}, seed).div(2);
}

/// Patches and images, all of them on every rank.
std::vector<ImageForInsert> pictures_for_all() {
  std::vector<ImageForInsert> images(2);
  images[0].insert_start_token = kPatchStart;
  images[0].images = pixels(2, 56, 1);
  images[1].insert_start_token = kImStart;
  images[1].images = pixels(3, 112, 2);
  return images;
}

/// The same, of which each rank of `tp` keeps the pictures that `holders` gives it, counted over both groups.
std::vector<ImageForInsert> pictures_held_by(const std::vector<int64_t>& holders, const parallel::GroupPtr& tp) {
  auto images = pictures_for_all();
  auto next = holders.begin();
  for (auto& group : images) {
    const int64_t count = group.images.size(0);
    std::vector<int64_t> own;
    for (int64_t i = 0; i < count; ++i) {
      if (next[i] == tp->getRank()) own.push_back(i);
    }
    group.held = HeldImages{at::full({count}, group.insert_start_token == kImStart ? 4 : 1, at::kLong),
                            at::tensor(at::ArrayRef<int64_t>(&*next, static_cast<size_t>(count)), at::kLong)};
    group.images = group.images.index_select(0, at::tensor(at::ArrayRef<int64_t>(own), at::kLong));
    next += count;
  }
  return images;
}

/// Loss and gradients of one backward.
struct Gradients {
  double loss = 0.0;
  std::vector<ParameterShard> shards;  ///< with their gradients complete over tp
};

/// As a program gives it to a model on the test's device: ids, labels and positions stay on the CPU.
Step37Batch on_device(Step37Batch batch) {
  for (auto& group : batch.images) {
    if (group.images.defined()) group.images = test_support::on_device(group.images);
  }
  return batch;
}

Gradients backward(const Step37Config& config, const Step37Batch& batch, const parallel::GroupPtr& tp) {
  Step37Model model(config, tp);
  model->to(test_support::runtime().device());
  Gradients result;
  result.shards = parameter_shards(*model);
  initialize_parameters(result.shards, 7);
  for (auto& shard : result.shards) {
    if (shard.parameter.requires_grad()) shard.parameter.mutable_grad() = at::zeros_like(shard.parameter.detach());
  }
  const auto sums = model->loss_sum(on_device(batch));
  auto loss = sums.tokens;
  for (const auto& auxiliary : sums.auxiliary) loss = loss + auxiliary;
  EXPECT_EQ(sums.auxiliary.size(), config.auxiliary_losses().size());
  loss.backward();
  result.loss = loss.item<double>();
  for (auto& shard : result.shards) {
    if (!shard.parameter.requires_grad() || shard.domain != GradientDomain::kReplicatedPartial) continue;
    shard.parameter.mutable_grad() = parallel::all_reduce(shard.parameter.grad(), tp);
  }
  return result;
}

void expect_gradients(const Gradients& actual, const Gradients& dense) {
  EXPECT_NEAR(actual.loss, dense.loss, 1e-4 * std::abs(dense.loss));
  Tensors whole;
  double largest = 0.0;
  for (const auto& shard : dense.shards) {
    if (!shard.parameter.requires_grad()) continue;
    largest = std::max(largest, shard.parameter.grad().abs().max().item<double>());
    for (const auto& segment : shard.segments) {
      whole[segment.name] = segment.in_local(shard.parameter.grad());
    }
  }
  EXPECT_GT(largest, 0.0);
  for (const auto& shard : actual.shards) {
    for (const auto& segment : shard.segments) {
      EXPECT_EQ(shard.parameter.requires_grad(), whole.count(segment.name) == 1) << segment.name;
      if (!shard.parameter.requires_grad() || segment.box.numel() == 0) continue;
      const auto gradient = segment.in_local(shard.parameter.grad());
      const auto expected = segment.in_global(whole.at(segment.name));
      // Some are 0 but for rounding, which has the size of their neighbours'.
      const double scale = std::max(1e-2 * largest, whole.at(segment.name).abs().max().item<double>());
      EXPECT_LE((gradient - expected).abs().max().item<double>(), 1e-4 * scale) << segment.name;
    }
  }
}

class Model : public small_run::SmallRun {
 protected:
  Step37Config config(const Overrides& more) const {
    return model_config(load_run_config(config_file(), overrides_of("none", 1, more)), kVocabulary);
  }

  /// `images_of(tp)` on every tensor-parallel size give what `dense_images` give on one rank with the whole tower.
  void expect_like_dense(const Overrides& overrides, const std::vector<ImageForInsert>& dense_images,
                         const std::function<std::vector<ImageForInsert>(const parallel::GroupPtr&)>& images_of,
                         Step37Batch batch = batch_without_pictures()) const {
    for (const std::string sp : {"false", "true"}) {
      auto with_sp = overrides;
      with_sp.push_back("parallel.sequence_parallel=" + sp);
      batch.images = dense_images;
      auto whole_tower = with_sp;
      whole_tower.emplace_back("parallel.mm_encoder_tp_mode=data");
      const auto dense = backward(config(whole_tower), batch, single());
      for (const int tp : divisors_of_world()) {
        SCOPED_TRACE(testing::Message() << "tensor " << tp << ", sequence_parallel " << sp);
        batch.images = images_of(groups(tp).tp);
        expect_gradients(backward(config(with_sp), batch, groups(tp).tp), dense);
      }
    }
  }
};

const std::vector<Overrides> kFrozen = {
    {}, {"model.freeze_projector=true", "model.freeze_language_model=true"}, {"vision.freeze=true"}};

}  // namespace

TEST_F(Model, PicturesOnOneRankOnly) {
  for (const auto& frozen : kFrozen) {
    SCOPED_TRACE(testing::PrintToString(frozen));
    expect_like_dense(frozen, pictures_for_all(), [](const parallel::GroupPtr& tp) {
      return pictures_held_by(std::vector<int64_t>(5, tp->getSize() - 1), tp);
    });
  }
}

TEST_F(Model, PicturesHereAndThere) {
  for (const auto& frozen : kFrozen) {
    for (const char* layout : {"projector_sharding=replicated", "projector_sharding=column", "projector_sharding=row",
                               "embedding_sharding=hidden"}) {
      auto overrides = frozen;
      overrides.push_back(std::string("parallel.") + layout);
      SCOPED_TRACE(testing::PrintToString(overrides));
      expect_like_dense(overrides, pictures_for_all(), [](const parallel::GroupPtr& tp) {
        const int64_t t = tp->getSize();
        return pictures_held_by({1 % t, 0, 3 % t, 0, 2 % t}, tp);
      });
    }
  }
}

TEST_F(Model, PicturesOnEveryRank) {
  expect_like_dense({}, pictures_for_all(), [](const parallel::GroupPtr& /*tp*/) { return pictures_for_all(); });
}

/// Heads for four ranks.
const Overrides kSplitTower = {"parallel.mm_encoder_tp_mode=weights", "vision.heads=4"};

TEST_F(Model, PicturesOnEveryRankOfASplitTower) {
  const auto expect_like_whole_tower = [&](const Overrides& overrides) {
    SCOPED_TRACE(testing::PrintToString(overrides));
    expect_like_dense(with(kSplitTower, overrides), pictures_for_all(),
                      [](const parallel::GroupPtr& /*tp*/) { return pictures_for_all(); });
  };
  for (const char* sharding : {"replicated", "column", "row"}) {
    const auto projector = std::string("parallel.projector_sharding=") + sharding;
    expect_like_whole_tower({projector});
    expect_like_whole_tower({projector, "vision.freeze=true", "model.freeze_language_model=true"});
  }
  expect_like_whole_tower({"parallel.embedding_sharding=hidden"});
  expect_like_whole_tower({"parallel.exchange=all-gather"});
  expect_like_whole_tower({"model.freeze_projector=true", "model.freeze_language_model=true"});
}

// Features from elsewhere are on single ranks, and with them the gradients of all.
TEST_F(Model, FeaturesOnSingleRanksBesideASplitTower) {
  const auto features = test_support::exact_values({2, 1, 64}, 3);
  auto dense_images = pictures_for_all();
  dense_images[0].images.reset();
  dense_images[0].image_features = features;
  for (const char* sharding : {"replicated", "column", "row"}) {
    SCOPED_TRACE(sharding);
    const auto overrides = with(kSplitTower, {std::string("parallel.projector_sharding=") + sharding});
    expect_like_dense(overrides, dense_images, [&](const parallel::GroupPtr& tp) {
      auto images = dense_images;
      const int64_t last = tp->getSize() - 1;
      images[0].held = HeldImages{at::full({2}, 1, at::kLong), at::full({2}, last, at::kLong)};
      images[0].image_features = tp->getRank() == last ? features : features.narrow(0, 0, 0);
      return images;
    });
  }
}

TEST_F(Model, AGroupWithoutPicturesReachesTheSplitTower) {
  auto images = pictures_for_all();
  images[0].images = images[0].images.narrow(0, 0, 0);
  auto batch = batch_without_pictures();
  batch.input_ids.masked_fill_(batch.input_ids.eq(kPatchStart), 20);
  for (const char* sharding : {"replicated", "column"}) {
    SCOPED_TRACE(sharding);
    expect_like_dense(
        with(kSplitTower, {std::string("parallel.projector_sharding=") + sharding}), images,
        [&](const parallel::GroupPtr& /*tp*/) { return images; }, batch);
  }
}

TEST_F(Model, ASplitTowerRefusesPicturesOnSingleRanks) {
  const auto& tp = world_tp();
  Step37Model model(config(kSplitTower), tp);
  auto batch = batch_without_pictures();
  batch.images = pictures_held_by(std::vector<int64_t>(5, 0), tp);
  EXPECT_EQ(
      value_error([&] { model->embed(batch); }),
      "the group of start token 7 has each picture on one rank (held): with mm_encoder_tp_mode weights every rank "
      "needs them all");
  auto narrow = config(kSplitTower);
  narrow.vision.mlp_width = 33;
  EXPECT_EQ(value_error([&] { narrow.validate(2); }),
            "mm_encoder_tp_mode weights: vision mlp_width 33 is not divisible by tensor-parallel size 2");
  narrow.mm_encoder_tp_mode = MmEncoderTpMode::kData;
  EXPECT_NO_THROW(narrow.validate(2));
}

TEST_F(Model, NoPictures) {
  expect_like_dense({}, {}, [](const parallel::GroupPtr& /*tp*/) { return std::vector<ImageForInsert>(); });
}

TEST_F(Model, MultiTokenPredictionWithPictures) {
  const Overrides mtp{"model.mtp_num_layers=2", "model.mtp_loss_scaling_factor=0.5"};
  for (const Overrides& more :
       {Overrides{}, Overrides{"parallel.projector_sharding=column"}, Overrides{"parallel.embedding_sharding=hidden"},
        Overrides{"vision.freeze=true", "model.freeze_projector=true"}}) {
    auto overrides = mtp;
    overrides.insert(overrides.end(), more.begin(), more.end());
    SCOPED_TRACE(testing::PrintToString(overrides));
    expect_like_dense(overrides, pictures_for_all(), [](const parallel::GroupPtr& tp) {
      const int64_t t = tp->getSize();
      return pictures_held_by({1 % t, 0, 3 % t, 0, 2 % t}, tp);
    });
  }
}

// The weights are the same with and without it, so that the decoder's own loss is, too.
TEST_F(Model, MultiTokenPredictionIsForTrainingOnly) {
  const auto batch = on_device(batch_without_pictures());
  const auto sums = [&](const Overrides& overrides) {
    Step37Model model(config(overrides), world_tp());
    model->to(test_support::runtime().device());
    initialize_parameters(parameter_shards(*model), 7);
    return model->loss_sum(batch);
  };
  const Overrides trained{"model.mtp_num_layers=2", "model.mtp_loss_scaling_factor=0.5", "run.checked=false"};
  const auto plain = sums({"run.checked=false"});
  EXPECT_TRUE(plain.auxiliary.empty());
  EXPECT_TRUE(sums({"model.mtp_num_layers=2", "run.checked=false"}).auxiliary.empty());
  const auto with_mtp = sums(trained);
  EXPECT_TRUE(test_support::equal(with_mtp.tokens, plain.tokens));
  ASSERT_EQ(with_mtp.auxiliary.size(), 1U);
  const double mean = with_mtp.auxiliary[0].item<double>() / 0.5;
  EXPECT_NEAR(mean / plain.tokens.item<double>(), 1.0, 0.2);
  const at::NoGradGuard no_grad;
  EXPECT_TRUE(sums(trained).auxiliary.empty());
}

// On a GPU each of these operators waits until all that was asked of it is done.
TEST_F(Model, ReadsNothingBackInForwardAndBackward) {
  auto batch = batch_without_pictures();
  for (const int tp : divisors_of_world()) {
    for (const std::string sp : {"false", "true"}) {
      for (const bool on_every_rank : {false, true}) {
        SCOPED_TRACE(testing::Message() << "tensor " << tp << ", sequence_parallel " << sp << ", " << on_every_rank);
        const auto& group = groups(tp).tp;
        batch.images = on_every_rank ? pictures_for_all() : pictures_held_by({1 % tp, 0, 3 % tp, 0, 2 % tp}, group);
        Step37Model model(config({"parallel.sequence_parallel=" + sp, "run.checked=false", "model.mtp_num_layers=2",
                                  "model.mtp_loss_scaling_factor=0.5"}),
                          group);
        model->to(test_support::runtime().device());
        initialize_parameters(parameter_shards(*model), 7);
        const auto there = on_device(batch);
        const test_support::OperatorWatch watch;
        const auto sums = model->loss_sum(there);
        (sums.tokens + sums.auxiliary.at(0)).backward();
        EXPECT_GT(watch.count("aten::convolution_backward"), 0);
        EXPECT_EQ(watch.count("aten::_local_scalar_dense"), 0);
        EXPECT_EQ(watch.count("aten::nonzero"), 0);
        EXPECT_EQ(watch.copies_to_host(), 0);
      }
    }
  }
}

TEST_F(Model, FeaturesAndPicturesTogether) {
  auto images = pictures_for_all();
  images[0].image_features = test_support::exact_values({2, 1, 64}, 3);
  auto pictures_gone = images;
  pictures_gone[0].images.reset();
  expect_like_dense({}, pictures_gone, [&](const parallel::GroupPtr& /*tp*/) { return images; });
  expect_like_dense({}, pictures_gone, [&](const parallel::GroupPtr& /*tp*/) { return pictures_gone; });
}

// ---- the routing of a batch ----

const Overrides kBalancedExperts = {"model.num_moe_experts=8",         "model.moe_ffn_hidden_size=16",
                                    "model.moe_router_topk=2",         "model.moe_aux_loss_coeff=0.1",
                                    "model.moe_z_loss_coeff=0.01",     "model.moe_group_balance_loss_coeff=0.05",
                                    "model.moe_group_balance_groups=4"};

/// A packed row of 24 tokens, and `padding` positions behind them.
Step37Batch packed_batch(int64_t padding) {
  constexpr int64_t kTokens = 24;
  const auto fill = [&](const at::Tensor& row, int64_t value) { return at::constant_pad_nd(row, {0, padding}, value); };
  Step37Batch batch;
  batch.input_ids = fill((at::arange(kTokens, at::kLong) * 37).remainder(200).add(20).unsqueeze(0), 3);
  batch.labels = fill((at::arange(kTokens, at::kLong) * 53).remainder(kVocabulary).unsqueeze(0), -100);
  batch.labels.narrow(1, 0, 5).fill_(-100);
  batch.attention.position_ids = at::cat({at::arange(kTokens, at::kLong), at::arange(padding, at::kLong)}).unsqueeze(0);
  batch.attention.cu_seqlens = at::tensor({int64_t{0}, kTokens, kTokens + padding}, at::kInt);
  if (padding > 0) batch.padding_mask = fill(at::zeros({1, kTokens}, at::kLong), 1);
  return batch;
}

TEST_F(Model, PaddingIsNoPartOfTheRoutersLosses) {
  for (const int tp : divisors_of_world()) {
    for (const std::string sp : {"false", "true"}) {
      SCOPED_TRACE(testing::Message() << "tensor " << tp << ", sequence_parallel " << sp);
      auto overrides = kBalancedExperts;
      overrides.push_back("parallel.sequence_parallel=" + sp);
      Step37Model model(config(overrides), groups(tp));
      model->to(test_support::runtime().device());
      initialize_parameters(parameter_shards(*model), 7);
      ExpertBalance balance(model->language_model->decoder->moe_layers(), groups(tp));
      const auto plain = model->loss_sum(packed_batch(0), &balance);
      const auto tokens = balance.tokens_per_expert().clone();
      EXPECT_EQ(parallel::all_reduce(tokens, groups(tp).tp).sum().item<double>(),
                2 * 2 * 24);  // layers, experts, tokens
      balance.zero();
      const auto padded = model->loss_sum(packed_batch(40), &balance);
      EXPECT_NEAR(padded.tokens.item<double>(), plain.tokens.item<double>(), 1e-3);
      ASSERT_EQ(plain.auxiliary.size(), 3U);
      ASSERT_EQ(padded.auxiliary.size(), 3U);
      for (size_t i = 0; i < 3; ++i)
        EXPECT_TRUE(test_support::near(padded.auxiliary[i], plain.auxiliary[i], 1e-5)) << i;
      EXPECT_TRUE(test_support::equal(parallel::all_reduce(balance.tokens_per_expert(), groups(tp).tp),
                                      parallel::all_reduce(tokens, groups(tp).tp)));
      // As in validation.
      const at::NoGradGuard no_grad;
      balance.zero();
      EXPECT_TRUE(model->loss_sum(packed_batch(40), &balance).auxiliary.empty());
      EXPECT_EQ(balance.tokens_per_expert().sum().item<double>(), 0.0);
      auto wrong = packed_batch(40);
      wrong.padding_mask = wrong.padding_mask.narrow(1, 0, 63);
      const at::AutoGradMode grad(true);
      EXPECT_NE(test_support::message_of([&] {
                  model->loss_sum(wrong);
                }).find("the padding mask is [1, 63], the batch [1, 64]"),
                std::string::npos);
    }
  }
}

/// The model's parameters after four steps, the norms of its gradients, and what a checkpoint after the third step has.
struct Trained {
  Tensors parameters;
  std::vector<double> norms;
  Tensors saved;
};

/// Trains with two micro-batches a step, but with none in the second step on the last replica.
Trained train(const Step37Config& config, const parallel::ProcessGroups& layout,
              const GradientBufferOptions& gradients) {
  Step37Model model(config, layout);
  model->to(test_support::runtime().device(), at::kBFloat16);
  const auto shards = parameter_shards(*model);
  TrainerOptions options;
  options.learning_rate = {.peak = 0.01, .floor = 0.001, .warmup_steps = 1, .total_steps = 4};
  options.clip_grad_norm = 0.5;
  options.gradients = gradients;
  options.auxiliary_losses = config.auxiliary_losses();
  const auto moe_layers = model->language_model->decoder->moe_layers();
  if (!moe_layers.empty()) options.expert_balance = std::make_shared<ExpertBalance>(moe_layers, layout);
  Trainer trainer(shards, layout, options);
  trainer.optimizer().fill_parameters(shards, [](const ParameterShard& shard) { initialize_parameters({shard}, 7); });
  trainer.write_parameters();
  const int replicas = layout.dp->getSize();
  // Of two groups whose collectives run late, each rank waits for them in its own order: only where there is one.
  const bool is_last = layout.dp->getRank() == replicas - 1;
  const bool may_have_none = replicas > 1 && is_last && layout.tp->getSize() == 1 && !config.text.moe;
  Trained result;
  for (int64_t step = 0; step < 4; ++step) {
    const auto loss_sum = [&](int64_t micro_batch) {
      auto batch = batch_without_pictures();
      batch.input_ids.narrow(1, 24, 8).add_(step + 2 * micro_batch + layout.dp->getRank());
      batch.images = pictures_for_all();
      return model->loss_sum(on_device(batch), options.expert_balance.get());
    };
    const int64_t tokens = 2 * replicas * batch_without_pictures().labels.ne(-100).sum().item<int64_t>();
    result.norms.push_back(trainer.step(loss_sum, step == 1 && may_have_none ? 0 : 2, tokens).grad_norm);
    if (step != 2) continue;
    // Parameters are on their way now.
    const auto same_name = [](const std::string& name) { return name; };
    for (const auto& tensor : sharded_tensors(shards, trainer.optimizer(), same_name, layout)) {
      // Of a tensor in several boxes each has a place of its own.
      result.saved[c10::str(result.saved.size(), " ", tensor.id.text())] = tensor.local.clone();
    }
  }
  trainer.finish_gather();
  for (const auto& shard : shards) result.parameters[shard.name] = shard.parameter.detach().clone();
  return result;
}

// Over a backend whose collectives run late (TEST_BACKEND=like_nccl) a parameter that is read too early is NaN, and a
// gradient that is reduced too early is incomplete.
TEST_F(Model, OverlapChangesNoBit) {
  const int size = runtime().size();
  const std::vector<std::pair<parallel::RankGrid, Overrides>> cases{
      {{.tp = 1, .dp = size}, {}},
      {{.tp = size > 2 ? 2 : 1, .dp = size > 2 ? size / 2 : size},
       {"parallel.sequence_parallel=true", "parallel.projector_sharding=column", "model.mtp_num_layers=1",
        "model.mtp_loss_scaling_factor=0.5", "training.recompute=full"}},
      {{.tp = 1, .dp = size}, {"parallel.embedding_sharding=hidden", "vision.freeze=true"}},
      {{.tp = 1, .dp = size, .ep = size}, kBalancedExperts}};
  for (const auto& [grid, overrides] : cases) {
    SCOPED_TRACE(testing::Message() << grid.text() << " " << testing::PrintToString(overrides));
    auto settings = config(overrides);
    settings.checked = false;
    const auto& layout = groups(grid);
    const auto plain = train(settings, layout, {.overlap_reduction = false});
    for (const bool distributed_optimizer : {false, true}) {
      const auto overlapped =
          train(settings, layout, {.distributed_optimizer = distributed_optimizer, .bucket_elements = 1});
      for (const auto& [name, parameter] : plain.parameters) {
        EXPECT_TRUE(parameter.isfinite().all().item<bool>()) << name;
        // Other buckets round the norm otherwise, in its last bits.
        EXPECT_TRUE(test_support::near(overlapped.parameters.at(name), parameter, 1e-2)) << name;
      }
      const auto whole = train(settings, layout,
                               {.distributed_optimizer = distributed_optimizer,
                                .bucket_elements = 1,
                                .overlap_reduction = false,
                                .overlap_gather = false});
      EXPECT_EQ(overlapped.norms, whole.norms);
      for (const auto& [name, parameter] : whole.parameters) {
        EXPECT_TRUE(test_support::equal(overlapped.parameters.at(name), parameter)) << name;
      }
      for (const auto& [name, values] : whole.saved) {
        EXPECT_TRUE(test_support::equal(overlapped.saved.at(name), values)) << name;
      }
    }
  }
}

// Buckets are reduced in their order, so this must be about the order in which backward completes them.
TEST_F(Model, MostIsReducedBeforeBackwardReachesTheEmbedding) {
  const auto& layout = groups(1);
  if (!parallel::overlaps_computation(layout.dp, runtime().device().type()) || layout.dp->getSize() == 1) {
    GTEST_SKIP() << "nothing overlaps";
  }
  Step37Model model(config({"run.checked=false", "model.mtp_num_layers=1", "model.mtp_loss_scaling_factor=0.5"}),
                    layout);
  model->to(test_support::runtime().device());
  int64_t bytes = 0;
  const auto observed = parallel::observe(layout, [&](parallel::CollectiveKind, int64_t sent) { bytes += sent; });
  const auto shards = parameter_shards(*model);
  initialize_parameters(shards, 7);
  GradientBuffer gradients(shards, observed, {.bucket_elements = 1});
  auto batch = batch_without_pictures();
  batch.images = pictures_for_all();
  const auto sums = model->loss_sum(on_device(batch));
  int64_t before = 0;
  int64_t after_mtp = 0;
  model->language_model->embedding->word_embeddings->weight.register_hook([&](const at::Tensor&) { before = bytes; });
  model->language_model->output_layer->weight.register_hook([&](const at::Tensor&) { after_mtp = bytes; });
  gradients.reduce_in_backward();
  (sums.tokens + sums.auxiliary.front()).backward();
  const auto in_backward = bytes;
  gradients.reduce();
  EXPECT_EQ(bytes, in_backward);  // nothing was left
  EXPECT_GT(after_mtp, 0);
  // The rest is the table itself, tower and projector, and the bucket whose gradients are just being completed.
  int64_t late = 0;
  int64_t all = 0;
  for (const auto& shard : shards) {
    if (!shard.parameter.requires_grad()) continue;
    all += shard.parameter.numel();
    const bool is_decoder = shard.name.starts_with("language_model.") && !contains(shard.name, "word_embeddings");
    if (!is_decoder) late += shard.parameter.numel();
  }
  EXPECT_GT(static_cast<double>(before) / static_cast<double>(bytes),
            0.95 * static_cast<double>(all - late) / static_cast<double>(all));
}

}  // namespace megatron_cpp::step37
