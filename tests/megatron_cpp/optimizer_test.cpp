// From gradients to new parameters: GradientBuffer, Trainer; AdamW in between is in adamw_test.cpp.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "megatron_cpp/optimizer/adamw.h"
#include "megatron_cpp/optimizer/flat_layout.h"
#include "megatron_cpp/optimizer/gradient_buffer.h"
#include "megatron_cpp/parameters/parameter_shard.h"
#include "megatron_cpp/tensor_parallel/column_parallel_linear.h"
#include "megatron_cpp/training/trainer.h"
#include "parallel/collectives.h"
#include "parallel/environment_groups.h"
#include "parallel/errors.h"
#include "parallel/recording_backend.h"
#include "tests/support/errors.h"
#include "tests/support/operator_watch.h"
#include "tests/support/test_world.h"

namespace megatron_cpp {
namespace {

using namespace test_support;

at::Tensor parameter(at::IntArrayRef shape, at::ScalarType dtype = at::kFloat) {
  return on_device(at::zeros(shape, dtype)).requires_grad_(true);
}

ParameterShard shard_of(std::string name, const at::Tensor& tensor, GradientDomain domain, bool weight_decay = true) {
  return replicated_parameter(std::move(name), tensor, domain, InitialValue::constant(0.0), weight_decay);
}

/// A part of a gradient as backward leaves it, by data- and tensor-parallel rank.
at::Tensor part(at::IntArrayRef shape, int64_t seed, int dp_rank, int tp_rank) {
  return on_device(exact_values(shape, seed + 100 * dp_rank + 10 * tp_rank));
}

/// A parameter and what its gradient has to become.
struct Case {
  ParameterShard shard;
  at::Tensor part;      ///< that backward adds on this rank, each time
  at::Tensor expected;  ///< on this rank, of one backward
  double square = 0.0;  ///< of the whole, global gradient of one backward
};

Case sharded_case(const parallel::ProcessGroups& group, int64_t seed) {
  const std::vector<int64_t> local_shape{3, 5};
  const int t = group.tp->getSize();
  Case result;
  const int64_t begin = 3 * group.tp->getRank();
  result.shard =
      sharded_parameter("sharded", parameter(local_shape), {3 * t, 5}, 0, begin, InitialValue::constant(0.0), true);
  result.part = part(local_shape, seed, group.dp->getRank(), group.tp->getRank());
  for (int r = 0; r < t; ++r) {
    auto sum = at::zeros_like(result.part);
    for (int d = 0; d < group.dp->getSize(); ++d) sum.add_(part(local_shape, seed, d, r));
    result.square += sum.square().sum().item<double>();
    if (r == group.tp->getRank()) result.expected = sum;
  }
  return result;
}

Case replicated_case(const parallel::ProcessGroups& group, int64_t seed, GradientDomain domain) {
  const bool partial = domain == GradientDomain::kReplicatedPartial;
  const std::vector<int64_t> shape{7};
  Case result;
  result.shard = shard_of(partial ? "partial" : "replicated", parameter(shape), domain);
  result.part = part(shape, seed, group.dp->getRank(), partial ? group.tp->getRank() : 0);
  result.expected = at::zeros_like(result.part);
  for (int d = 0; d < group.dp->getSize(); ++d) {
    for (int r = 0; r < (partial ? group.tp->getSize() : 1); ++r) result.expected.add_(part(shape, seed, d, r));
  }
  result.square = result.expected.square().sum().item<double>();
  return result;
}

/// Backward of a loss whose gradient is each case's part.
void backward(const std::vector<Case>& cases) {
  for (const auto& one : cases) (one.shard.parameter * one.part).sum().backward();
}

void expect_gradients(const GradientBuffer& buffer, const std::vector<Case>& cases, double factor) {
  double square = 0.0;
  for (const auto& one : cases) {
    EXPECT_TRUE(test_support::equal(one.shard.parameter.grad(), one.expected * factor)) << one.shard.name;
    square += one.square * factor * factor;
  }
  EXPECT_NEAR(buffer.norm(), std::sqrt(square), 1e-6 * std::sqrt(square));
}

}  // namespace

TEST(GradientBuffer, SumsAndCountsEveryParameterOnce) {
  for (const int tp : divisors_of_world()) {
    const auto& group = groups(tp);
    for (int kinds = 1; kinds < 8; ++kinds) {  // every choice of the three domains
      SCOPED_TRACE(testing::Message() << "tensor " << tp << ", kinds " << kinds);
      std::vector<Case> cases{replicated_case(group, 1, GradientDomain::kReplicatedPartial), sharded_case(group, 2),
                              replicated_case(group, 3, GradientDomain::kReplicated)};
      for (int kind = 2; kind >= 0; --kind) {
        if ((kinds >> kind & 1) == 0) cases.erase(cases.begin() + kind);
      }
      const auto frozen = on_device(at::zeros({4}));
      std::vector<ParameterShard> shards{shard_of("frozen", frozen, GradientDomain::kReplicated)};
      for (const auto& one : cases) shards.push_back(one.shard);

      GradientBuffer buffer(shards, group);
      EXPECT_EQ(buffer.parameters().size(), cases.size());
      EXPECT_FALSE(frozen.grad().defined());
      for (const auto& one : cases)
        EXPECT_TRUE(test_support::equal(one.shard.parameter.grad(), at::zeros_like(one.part)));
      backward(cases);
      backward(cases);  // a second micro-batch
      buffer.reduce();
      expect_gradients(buffer, cases, 2.0);
      buffer.scale(0.25);
      expect_gradients(buffer, cases, 0.5);

      // Whoever took the gradients away, zero() puts them back.
      for (const auto& one : cases) one.shard.parameter.mutable_grad() = at::Tensor();
      buffer.zero();
      EXPECT_EQ(buffer.norm(), 0.0);
      backward(cases);
      buffer.reduce();
      expect_gradients(buffer, cases, 1.0);
    }
  }
}

TEST(GradientBuffer, RefusesWhatDoesNotFit) {
  const auto& group = groups(1);
  const auto frozen = shard_of("frozen", at::zeros({3}), GradientDomain::kReplicated);
  EXPECT_TRUE(contains(value_error([&] { GradientBuffer({frozen}, group); }), "every parameter is frozen"));
  EXPECT_EQ(value_error([&] { GradientBuffer({frozen}, group, {.bucket_elements = 0}); }),
            "bucket_elements 0: a bucket of gradients holds at least 1 element");
  auto elsewhere = shard_of("elsewhere", parameter({2}), GradientDomain::kReplicated);
  elsewhere.domain.summed_over = "cp";
  EXPECT_EQ(value_error([&] { GradientBuffer({elsewhere}, group); }), "no group of kind \"cp\" was made");
  elsewhere.domain = {.sharded_over = "dp"};
  EXPECT_EQ(value_error([&] { GradientBuffer({elsewhere}, group); }),
            "parameter elsewhere is sharded over \"dp\": the gradient norm knows sharding over tp and etp_ep only");
}

TEST(GradientBuffer, KeepsDtypesApart) {
  const auto& group = groups(world_tp()->getSize());
  const auto narrow = shard_of("narrow", parameter({5}, at::kBFloat16), GradientDomain::kReplicated);
  const auto wide = shard_of("wide", parameter({3}, at::kDouble), GradientDomain::kReplicatedPartial);
  GradientBuffer buffer({narrow, wide}, group, {.low_precision_gradients = at::kBFloat16});
  (narrow.parameter.sum() * 2.0 + wide.parameter.sum()).backward();
  buffer.reduce();
  const double ranks = world_tp()->getSize();
  EXPECT_TRUE(test_support::equal(narrow.parameter.grad(), at::full_like(narrow.parameter, 2.0)));
  EXPECT_TRUE(test_support::equal(wide.parameter.grad(), at::full_like(wide.parameter, ranks)));
  EXPECT_EQ(buffer.squared_norm().item<double>(), 5 * 4.0 + 3 * ranks * ranks);
  EXPECT_EQ(buffer.clip_grad_norm(1.0), std::sqrt(5 * 4.0 + 3 * ranks * ranks));
  EXPECT_NEAR(buffer.norm(), 1.0, 1e-2);  // bfloat16 rounds
}

// In bfloat16 a sum of ones ends at 256.
TEST(GradientBuffer, AddsUpGradientsOfBfloat16ParametersInFloat32) {
  const auto& group = groups(world_tp()->getSize());
  for (const bool accumulate : {false, true}) {
    ColumnParallelLinear linear(
        ColumnParallelLinearOptions(1, 2 * world_tp()->getSize()).accumulate_into_grad(accumulate), group.tp);
    linear->to(device(), at::kBFloat16);
    const auto alone = parameter({3}, at::kBFloat16);
    auto shards = parameter_shards(*linear);
    shards.push_back(shard_of("alone", alone, GradientDomain::kReplicatedPartial));
    GradientBuffer buffer(shards, group);
    const auto input = on_device(at::ones({1, 1}, at::kBFloat16));
    constexpr int64_t kPasses = 300;
    for (int64_t pass = 0; pass < kPasses; ++pass) (linear->forward(input).sum() + alone.sum()).backward();
    buffer.reduce();
    for (const auto& shard : shards) {
      const int ranks = shard.name == "alone" ? world_tp()->getSize() : 1;
      EXPECT_TRUE(test_support::equal(
          shard.parameter.grad(),
          on_device(at::full(shard.parameter.sizes(), static_cast<double>(kPasses * ranks), at::kFloat))))
          << shard.name;
    }
  }
}

// Whoever holds a slice that begins at a block's border finds the sums that the holder of everything finds.
TEST(GradientBuffer, SumsSquaresOfBlocks) {
  using megatron_cpp::kNormBlock;
  const auto gradient = on_device(at::randn({3 * kNormBlock + 11}, at::detail::createCPUGenerator(3)));
  const auto all = squares_of_blocks({gradient});
  ASSERT_EQ(all.numel(), 4);
  for (int64_t block = 0; block < 4; ++block) {
    const auto slice = gradient.slice(0, block * kNormBlock, (block + 1) * kNormBlock);
    EXPECT_TRUE(test_support::equal(squares_of_blocks({slice}), all.narrow(0, block, 1)));
    const double square = slice.to(at::kDouble).square().sum().item<double>();
    EXPECT_NEAR(all[block].item<double>(), square, 1e-12 * square);
  }
  const auto nothing = gradient.narrow(0, 0, 0);
  EXPECT_EQ(squares_of_blocks({nothing}).numel(), 0);
  const std::vector<at::Tensor> several{nothing, gradient.narrow(0, 5, kNormBlock), gradient.narrow(0, 7, 3), gradient};
  for (const auto dtype : {at::kFloat, at::kDouble, at::kBFloat16}) {
    std::vector<at::Tensor> tensors;
    for (const auto& tensor : several) tensors.push_back(tensor.to(dtype));
    const auto sums = squares_of_blocks(tensors);
    EXPECT_EQ(sums.numel(), 6);
    EXPECT_TRUE(at::allclose(megatron_cpp::internal::squares_of_blocks_by_operators(tensors), sums, 1e-12));
  }
  EXPECT_EQ(megatron_cpp::internal::squares_of_blocks_by_operators({nothing}).numel(), 0);
}

// The optimizer's kernel on a GPU reads 16 bytes at a time where it can.
TEST(GradientBuffer, BeginsEveryGradientAtAMultipleOfSixteenBytes) {
  for (const auto dtype : {at::kFloat, at::kDouble, at::kBFloat16}) {
    std::vector<ParameterShard> shards;
    for (const int64_t size : {3, 1, 0, 8, 5}) {
      shards.push_back(shard_of(std::to_string(size), parameter({size}, dtype), GradientDomain::kReplicated));
      shards.push_back(shard_of("partial", parameter({size}, dtype), GradientDomain::kReplicatedPartial));
    }
    GradientBuffer buffer(shards, groups(world_tp()->getSize()));
    for (const auto& shard : shards) {
      shard.parameter.grad().fill_(2.0);
      const auto& gradient = shard.parameter.grad();
      const auto place = gradient.storage_offset() * gradient.element_size();
      EXPECT_EQ(place % 16, 0) << shard.name;
    }
    buffer.reduce();
    for (const auto& shard : shards) {
      const int ranks = shard.name == "partial" ? world_tp()->getSize() : 1;
      EXPECT_TRUE(test_support::equal(shard.parameter.grad(), at::full_like(shard.parameter.grad(), 2.0 * ranks)));
    }
    const double ranks = world_tp()->getSize();
    EXPECT_NEAR(buffer.norm(), 2.0 * std::sqrt(17 * (1 + ranks * ranks)), 1e-5 * ranks);
    EXPECT_NEAR(buffer.squared_norm().item<double>(), 4.0 * 17 * (1 + ranks * ranks), 1e-4 * ranks * ranks);
  }
}

TEST(GradientBuffer, TakesFloat64) {
  const auto& group = groups(1);
  const auto shard = shard_of("double", parameter({7}, at::kDouble), GradientDomain::kReplicated);
  GradientBuffer buffer({shard}, group);
  (shard.parameter * 1e30).sum().backward();
  EXPECT_NEAR(buffer.norm(), std::sqrt(7.0) * 1e30, 1e18);  // no float32 holds its square
}

// ---- distributed optimizer ----

TEST(FlatLayout, GivesEachRankAnEqualSlice) {
  const FlatLayout layout({5, 0, 1000, 3}, 3);
  EXPECT_EQ(layout.parameters, (std::vector<parallel::Range>{{0, 5}, {16, 16}, {16, 1016}, {1024, 1027}}));
  EXPECT_EQ(layout.numel, 1040);
  EXPECT_EQ(layout.slice_numel, 384);  // 1040 / 3, to a multiple of 64
  EXPECT_EQ(layout.elements_of(2, 0), (parallel::Range{0, 368}));
  EXPECT_EQ(layout.elements_of(2, 1), (parallel::Range{368, 752}));
  EXPECT_EQ(layout.elements_of(2, 2), (parallel::Range{752, 1000}));
  EXPECT_EQ(layout.elements_of(3, 2), (parallel::Range{0, 3}));
  EXPECT_EQ(layout.elements_of(3, 0).length(), 0);
  EXPECT_EQ(FlatLayout({5}, 1).numel, 16);
  EXPECT_EQ(FlatLayout({}, 4).numel_of_slices(), 0);
}

TEST(FlatLayout, EveryElementIsInOneSlice) {
  for (const int ranks : {1, 2, 3, 4, 7, 64}) {
    SCOPED_TRACE(testing::Message() << ranks << " ranks");
    const std::vector<int64_t> numels{1, 63, 64, 65, 0, 4097, 13};
    const FlatLayout layout(numels, ranks);
    EXPECT_GE(layout.numel_of_slices(), layout.numel);
    EXPECT_LT(layout.numel_of_slices(), layout.numel + ranks * FlatLayout::kSliceMultiple);
    EXPECT_EQ(layout.slice_numel, FlatLayout::slice_numel_of(layout.numel, ranks));
    int64_t place = 0;
    for (size_t i = 0; i < numels.size(); ++i) {
      EXPECT_EQ(layout.parameters[i], (parallel::Range{place, place + numels[i]}));
      place += FlatLayout::padded_numel(numels[i]);
      int64_t next = 0;
      for (int rank = 0; rank < ranks; ++rank) {
        const auto elements = layout.elements_of(i, rank);
        if (elements.length() == 0) continue;
        EXPECT_EQ(elements.begin, next);
        EXPECT_EQ(elements.begin % FlatLayout::kParameterMultiple, 0);
        next = elements.end;
        const int64_t first = layout.parameters[i].begin + elements.begin;
        EXPECT_GE(first, layout.slice(rank).begin);
        EXPECT_LE(first + elements.length(), layout.slice(rank).end);
      }
      EXPECT_EQ(next, numels[i]);
    }
  }
}

namespace {

TrainerOptions trainer_options(double clip) {
  TrainerOptions options;
  options.learning_rate = {.peak = 0.1, .floor = 0.01, .warmup_steps = 2, .total_steps = 4};
  options.clip_grad_norm = clip;
  return options;
}

/// Parameters of all domains with odd sizes; one is large enough for several slices and blocks of the norm, one is
/// frozen, one is used in two places, and no loss uses "unused".
struct OddParameters {
  OddParameters(const parallel::ProcessGroups& layout, at::ScalarType dtype) {
    const auto add = [&](const char* name, at::IntArrayRef shape, GradientDomain domain, bool decays) {
      auto tensor = parameter(shape, dtype);
      auto segment = ParameterSegment::rows(name, shape.vec(), 0, 0, 0, shape[0]);
      shards.push_back({name, tensor, domain, {std::move(segment)}, InitialValue::normal(0.5), decays, before_use});
    };
    add("bias", {7}, GradientDomain::kSharded, false);
    add("weight", {3, kNormBlock / 2 + 5}, GradientDomain::kSharded, true);
    add("norm", {131}, GradientDomain::kReplicated, false);
    add("empty", {0, 4}, GradientDomain::kReplicated, true);
    add("frozen", {9}, GradientDomain::kReplicated, true);
    add("unused", {301}, GradientDomain::kReplicated, true);
    add("q_norm", {65}, GradientDomain::kReplicatedPartial, false);
    add("tower", {31, 29}, GradientDomain::kReplicatedPartial, true);
    add("expert", {3, 5, 61}, GradientDomain::kExpert, true);
    add("tied", {17, 3}, GradientDomain::kReplicated, true);
    shards[4].parameter.requires_grad_(false);
    int64_t seed = 0;
    for (const auto& shard : shards) {
      const bool is_replicated = shard.domain == GradientDomain::kReplicated;
      const auto rank = is_replicated ? layout.dp->getRank() : layout.world->getRank();
      const auto generator = at::detail::createCPUGenerator(static_cast<uint64_t>(10 * ++seed + rank));
      factors.push_back(on_device(at::randn(shard.parameter.sizes(), generator).to(dtype)));
    }
  }

  /// Gradients that no sum adds up exactly.
  at::Tensor loss_sum(int64_t step, int64_t micro_batch) const {
    if (*before_use) (*before_use)();
    auto sum = on_device(at::zeros({}));
    for (size_t i = 0; i < shards.size(); ++i) {
      if (!shards[i].parameter.requires_grad() || shards[i].name == "unused") continue;
      sum = sum + (shards[i].parameter * factors[i]).to(at::kFloat).sum();
      if (shards[i].name == "tied") sum = sum + (shards[i].parameter + factors[i]).square().to(at::kFloat).sum();
    }
    return sum * (1.0 + 0.3 * std::sin(static_cast<double>(2 * step + micro_batch)));
  }

  std::shared_ptr<BeforeUse> before_use = std::make_shared<BeforeUse>();
  std::vector<ParameterShard> shards;
  std::vector<at::Tensor> factors;  ///< of this rank
};

/// Layouts of the world, of experts too: enough to try every group with and without peers, or all if the environment
/// has TEST_EVERY_LAYOUT.
std::vector<parallel::RankGrid> grids() {
  const int size = world_tp()->getSize();
  const bool every_layout = std::getenv("TEST_EVERY_LAYOUT") != nullptr;
  std::vector<parallel::RankGrid> result;
  for (const int tp : divisors_of_world()) {
    for (const int etp : divisors_of_world()) {
      for (const int ep : divisors_of_world()) {
        if (size % (ep * etp) != 0) continue;
        if (every_layout || ep * etp == size || etp == tp) {
          result.push_back({.tp = tp, .dp = size / tp, .ep = ep, .etp = etp});
        }
      }
    }
  }
  return result;
}

}  // namespace

TEST(DistributedOptimizer, DoesWhatEveryReplicaWouldDo) {
  if (parallel::ranks_in_environment() && world_tp()->getSize() > 2) {
    GTEST_SKIP() << "Gloo adds the summands of more than two ranks in orders of its own";
  }
  struct Precision {
    at::ScalarType parameters;
    at::ScalarType gradients;
    at::ScalarType moments;
    int64_t steps;
  };
  for (const auto& grid : grids()) {
    for (const auto& dtypes :
         {Precision{at::kFloat, at::kFloat, at::kFloat, 20}, Precision{at::kBFloat16, at::kFloat, at::kFloat, 5},
          Precision{at::kBFloat16, at::kBFloat16, at::kBFloat16, 5}}) {
      SCOPED_TRACE(testing::Message() << grid.text() << ", " << dtypes.parameters << " " << dtypes.gradients);
      const auto& layout = test_support::groups(grid);
      const auto make = [&](const OddParameters& model, bool distributed_optimizer, bool overlap) {
        auto options = trainer_options(0.5);
        options.adamw.exp_avg = options.adamw.exp_avg_sq = dtypes.moments;
        options.gradients = {.low_precision_gradients = dtypes.gradients,
                             .distributed_optimizer = distributed_optimizer,
                             .bucket_elements = 200,
                             .overlap_reduction = overlap,
                             .overlap_gather = overlap};
        auto trainer = std::make_unique<Trainer>(model.shards, layout, options);
        trainer->optimizer().fill_parameters(model.shards,
                                             [](const ParameterShard& shard) { initialize_parameters({shard}, 5); });
        return trainer;
      };
      const OddParameters plain_model(layout, dtypes.parameters);
      const OddParameters model(layout, dtypes.parameters);
      const OddParameters overlapped_model(layout, dtypes.parameters);
      const auto plain = make(plain_model, false, false);
      const auto trainer = make(model, true, true);
      const auto overlapped = make(overlapped_model, false, true);
      const bool may_have_none = layout.dp->getRank() > 0;
      for (int64_t step = 0; step < dtypes.steps; ++step) {
        const int64_t micro_batches = step % 3 == 1 && may_have_none ? 0 : 2;
        const auto expected = plain->step([&](int64_t i) { return plain_model.loss_sum(step, i); }, micro_batches, 16);
        const auto result = trainer->step([&](int64_t i) { return model.loss_sum(step, i); }, micro_batches, 16);
        overlapped->step([&](int64_t i) { return overlapped_model.loss_sum(step, i); }, micro_batches, 16);
        ASSERT_EQ(result.loss, expected.loss) << step;
        ASSERT_EQ(result.grad_norm, expected.grad_norm) << step;
        EXPECT_GT(result.grad_norm, 0.5);
      }
      trainer->finish_gather();
      for (size_t i = 0; i < model.shards.size(); ++i) {
        const auto& expected = plain_model.shards[i];
        EXPECT_TRUE(test_support::equal(model.shards[i].parameter, expected.parameter)) << expected.name;
        EXPECT_TRUE(test_support::equal(overlapped_model.shards[i].parameter, expected.parameter)) << expected.name;
      }
      const auto& slices = trainer->optimizer().slices();
      ASSERT_EQ(slices.size(), model.shards.size() - 1);
      for (size_t i = 0; i < slices.size(); ++i) {
        const auto& [begin, end] = slices[i].elements;
        const auto& whole = plain->optimizer().slices()[i];
        ASSERT_EQ(slices[i].shard.name, whole.shard.name);
        EXPECT_TRUE(test_support::equal(slices[i].main, whole.main.slice(0, begin, end))) << whole.shard.name;
        EXPECT_TRUE(test_support::equal(slices[i].exp_avg, whole.exp_avg.slice(0, begin, end))) << whole.shard.name;
        EXPECT_TRUE(test_support::equal(slices[i].exp_avg_sq, whole.exp_avg_sq.slice(0, begin, end)));
        EXPECT_EQ(slices[i].exp_avg.numel(), end - begin);
        // Each element has its moments once.
        const auto& group = layout.of(whole.shard.domain.summed_over);
        const auto held = parallel::all_reduce(at::full({1}, end - begin, at::kLong), group).item<int64_t>();
        EXPECT_EQ(held, whole.elements.end) << whole.shard.name;
      }
    }
  }
}

namespace {

/// `groups` with a note in `events` of each reduction of gradients that begins.
parallel::ProcessGroups noting(const parallel::ProcessGroups& groups, std::vector<std::string>& events) {
  return parallel::observe(groups, [&](parallel::CollectiveKind kind, int64_t /*bytes*/) {
    events.emplace_back(parallel::collective_name(kind));
  });
}

/// A chain of products, whose gradients backward completes from the last to the first.
struct Chain {
  explicit Chain(std::vector<std::string>& events) {
    for (const char* name : {"first", "second", "third"}) {
      shards.push_back(shard_of(name, parameter({4}), GradientDomain::kReplicated));
      shards.back().parameter.detach().fill_(2.0);
      shards.back().parameter.register_hook([name, &events](const at::Tensor&) { events.emplace_back(name); });
    }
  }
  /// @param uses_all  whether all parameters count; otherwise all but the last.
  at::Tensor loss(bool uses_all) const {
    const auto product = shards[0].parameter * shards[1].parameter;
    return (uses_all ? product * shards[2].parameter : product).sum();
  }

  std::vector<ParameterShard> shards;
};

}  // namespace

TEST(Overlap, ABucketIsReducedWhileBackwardGoesOn) {
  const auto& layout = groups(1);
  const bool overlaps = layout.dp->getSize() > 1 && parallel::overlaps_computation(layout.dp, device().type());
  for (const bool distributed_optimizer : {false, true}) {
    std::vector<std::string> events;
    const Chain chain(events);
    GradientBuffer buffer(chain.shards, noting(layout, events),
                          {.distributed_optimizer = distributed_optimizer, .bucket_elements = 5});
    ASSERT_EQ(buffer.parameters().front().name, "third");  // with "second" in a bucket of 8 elements
    const std::string_view reduction = distributed_optimizer ? "reduce_scatter" : "all_reduce";
    const int ranks = layout.dp->getSize();
    // A backward pass that isn't the last one of a step reduces nothing.
    chain.loss(true).backward();
    EXPECT_EQ(events.size(), 3U) << testing::PrintToString(events);
    events.clear();
    buffer.reduce_in_backward();
    chain.loss(true).backward();
    if (overlaps) {
      EXPECT_EQ(std::count(events.begin(), events.end(), reduction), 2) << testing::PrintToString(events);
      EXPECT_NE(events.back(), "first");
    } else {
      EXPECT_EQ(events.size(), 3U) << testing::PrintToString(events);
    }
    buffer.reduce();
    EXPECT_EQ(std::count(events.begin(), events.end(), reduction), ranks > 1 ? 2 : 0);
    // 4 = 2 * 2 of each backward pass on each rank.
    if (!distributed_optimizer || ranks == 1) {
      for (const auto& shard : chain.shards) {
        EXPECT_TRUE(test_support::equal(shard.parameter.grad(), at::full_like(shard.parameter, 8.0 * ranks)));
      }
    }
  }
}

// Rank 0 doesn't reach the parameters of the first bucket, so that it can't reduce the second one before reduce();
// the others do. No rank may hang, or sum one bucket with another.
TEST(Overlap, RanksWhoseGraphsDifferAgreeOnTheOrder) {
  const auto& layout = groups(1);
  std::vector<std::string> events;
  const Chain chain(events);
  GradientBuffer buffer(chain.shards, layout, {.bucket_elements = 1});
  const bool uses_all = layout.dp->getRank() > 0;
  for (int repetition = 0; repetition < 2; ++repetition) {
    buffer.zero();
    buffer.reduce_in_backward();
    chain.loss(uses_all).backward();
    buffer.reduce();
    const double others = layout.dp->getSize() - 1;
    for (const auto& shard : chain.shards) {
      const double of_rank_0 = shard.name == "third" ? 0.0 : 2.0;
      EXPECT_TRUE(test_support::equal(shard.parameter.grad(), at::full_like(shard.parameter, of_rank_0 + 4.0 * others)))
          << shard.name;
    }
  }
}

TEST(Overlap, GroupsOfLayersAreLeftAlone) {
  auto layout = groups(world_tp()->getSize());
  layout.dp = layout.tp;  // as a program's own groups may be
  std::vector<std::string> events;
  const Chain chain(events);
  GradientBuffer buffer(chain.shards, noting(layout, events), {.bucket_elements = 1});
  buffer.reduce_in_backward();
  chain.loss(true).backward();
  EXPECT_EQ(events.size(), 3U) << testing::PrintToString(events);
  buffer.reduce();
}

// As where a program replaces its trainer: the old one ends after the new one has begun.
TEST(Overlap, ABufferMayFollowAnotherOne) {
  const auto& layout = groups(1);
  auto shard = shard_of("weight", parameter({99}), GradientDomain::kReplicated);
  shard.before_use = std::make_shared<BeforeUse>();
  auto first = std::make_unique<GradientBuffer>(std::vector<ParameterShard>{shard}, layout,
                                                GradientBufferOptions{.distributed_optimizer = true});
  first->gather_parameters();
  first->finish_gather();
  GradientBuffer second({shard}, layout, {.distributed_optimizer = true});
  first.reset();
  const auto slice = second.slices({}).front();
  shard.parameter.detach().slice(0, slice.elements.begin, slice.elements.end).fill_(3.0);
  second.gather_parameters();
  if (*shard.before_use) (*shard.before_use)();
  EXPECT_TRUE(test_support::equal(shard.parameter.detach(), at::full_like(shard.parameter.detach(), 3.0)));
  shard.parameter.sum().backward();
  second.reduce();
  const auto complete = shard.parameter.grad().slice(0, slice.elements.begin, slice.elements.end);
  EXPECT_TRUE(test_support::equal(complete, at::full_like(complete, layout.dp->getSize())));
}

// Over MPI, too, where the values would have been complete.
TEST(Overlap, AModuleThatDoesNotWaitIsNamed) {
  const auto& layout = groups(1);
  auto shard = shard_of("impatient", parameter({99}), GradientDomain::kReplicated);
  shard.before_use = std::make_shared<BeforeUse>();
  GradientBuffer buffer({shard}, layout, {.distributed_optimizer = true});
  shard.parameter.sum().backward();  // nothing has been gathered yet
  buffer.gather_parameters();
  const auto loss = shard.parameter.sum();
  if (layout.dp->getSize() == 1) {
    loss.backward();
    return;
  }
  EXPECT_TRUE(contains(message_of([&] { loss.backward(); }), "parameter impatient was used before it was complete"));
  buffer.finish_gather();
  shard.parameter.sum().backward();
}

TEST(Overlap, ParametersAreGatheredBeforeTheyAreUsed) {
  const auto& layout = groups(1);
  const int ranks = layout.dp->getSize();
  const auto before_use = std::make_shared<BeforeUse>();
  std::vector<ParameterShard> shards;
  for (const char* name : {"first", "second", "of no module"}) {
    shards.push_back(shard_of(name, parameter({99}, at::kBFloat16), GradientDomain::kReplicated));
    if (shards.size() < 3) shards.back().before_use = before_use;
  }
  const auto expected = on_device(at::arange(99).to(at::kBFloat16));
  {
    GradientBuffer buffer(shards, layout, {.distributed_optimizer = true, .bucket_elements = 1});
    EXPECT_EQ(static_cast<bool>(*before_use), ranks > 1);
    for (int round = 0; round < 3; ++round) {
      for (const auto& slice : buffer.slices({})) {
        const auto& [begin, end] = slice.elements;
        slice.shard.parameter.detach().slice(0, begin, end).copy_(expected.slice(0, begin, end) + round);
      }
      buffer.gather_parameters();
      EXPECT_TRUE(test_support::equal(shards[2].parameter.detach(), expected + round));
      if (round == 2) break;  // the end of the buffer completes them
      if (round == 0 && *before_use) (*before_use)();
      if (round == 1) buffer.finish_gather();
      for (const auto& shard : shards) {
        EXPECT_TRUE(test_support::equal(shard.parameter.detach(), expected + round)) << shard.name;
      }
    }
  }
  if (*before_use) (*before_use)();  // nothing to wait for any more
  for (const auto& shard : shards) EXPECT_TRUE(test_support::equal(shard.parameter.detach(), expected + 2));
}

// ---- Trainer ----

namespace {

constexpr int64_t kTokens = 16;  // of the global batch; divisible by every number of micro-batches here
constexpr int64_t kWidth = 6;

/// Least squares on kTokens points: token losses (w x + b - y)^2.
struct Regression {
  at::Tensor weight = on_device(exact_values({kWidth}, 1)).requires_grad_(true);
  at::Tensor bias = on_device(exact_values({1}, 2)).requires_grad_(true);
  at::Tensor x = on_device(exact_values({kTokens, kWidth}, 3));
  at::Tensor y = on_device(exact_values({kTokens}, 4));

  std::vector<ParameterShard> shards() const {
    return {shard_of("weight", weight, GradientDomain::kReplicated),
            shard_of("bias", bias, GradientDomain::kReplicated, false)};
  }
  at::Tensor loss_sum(int64_t begin, int64_t count) const {
    return ((at::mv(x.narrow(0, begin, count), weight) + bias - y.narrow(0, begin, count)).square()).sum();
  }
};

/// Steps with this data-parallel rank's tokens in `num_micro_batches` parts.
StepResult step(Trainer& trainer, const Regression& model, const parallel::ProcessGroups& group,
                int64_t num_micro_batches) {
  const int64_t own = kTokens / group.dp->getSize();
  const int64_t begin = own * group.dp->getRank();
  const int64_t count = own / num_micro_batches;
  return trainer.step([&](int64_t i) { return model.loss_sum(begin + i * count, count); }, num_micro_batches, kTokens);
}

/// This rank alone.
parallel::ProcessGroups alone() {
  const auto& group = test_support::single();
  return {{}, group, group, group, group};
}

/// One step of a rank alone, over all tokens.
struct OneStep {
  Regression model;
  StepResult result;

  OneStep() {
    Trainer trainer(model.shards(), alone(), trainer_options(1.0));
    result = step(trainer, model, alone(), 1);
  }
};

}  // namespace

TEST(Trainer, MicroBatchesAndReplicasAreOneBatch) {
  const Regression reference;
  Trainer reference_trainer(reference.shards(), alone(), trainer_options(1.0));
  std::vector<StepResult> expected;
  for (int i = 0; i < 4; ++i) expected.push_back(step(reference_trainer, reference, alone(), 1));
  EXPECT_LT(expected.back().loss, expected.front().loss);
  for (const int tp : divisors_of_world()) {
    for (const int64_t num_micro_batches : {1, 2, 4}) {
      SCOPED_TRACE(testing::Message() << "tensor " << tp << ", " << num_micro_batches << " micro-batches");
      const Regression model;
      Trainer trainer(model.shards(), groups(tp), trainer_options(1.0));
      for (size_t i = 0; i < 4; ++i) {
        const auto result = step(trainer, model, groups(tp), num_micro_batches);
        EXPECT_NEAR(result.loss, expected[i].loss, 1e-5 * expected[i].loss);
        EXPECT_NEAR(result.grad_norm, expected[i].grad_norm, 1e-5 * expected[i].grad_norm);
        EXPECT_DOUBLE_EQ(result.learning_rate, trainer_options(1.0).learning_rate.at(static_cast<int64_t>(i) + 1));
      }
      EXPECT_TRUE(near(model.weight, reference.weight, 1e-5));
      EXPECT_TRUE(near(model.bias, reference.bias, 1e-5));
    }
  }
}

TEST(Trainer, AReplicaMayHaveNoMicroBatch) {
  const OneStep expected;
  for (const int tp : divisors_of_world()) {
    SCOPED_TRACE(testing::Message() << "tensor " << tp);
    const auto& group = groups(tp);
    const Regression model;
    Trainer trainer(model.shards(), group, trainer_options(1.0));
    const bool is_last = group.dp->getRank() == group.dp->getSize() - 1;
    const auto result =
        trainer.step([&](int64_t /*i*/) { return model.loss_sum(0, kTokens); }, is_last ? 1 : 0, kTokens);
    EXPECT_EQ(result.loss, expected.result.loss);
    EXPECT_EQ(result.grad_norm, expected.result.grad_norm);
    EXPECT_TRUE(test_support::equal(model.weight, expected.model.weight));
  }
}

TEST(Trainer, AuxiliaryLossesAreTrainedOnAndReportedByName) {
  // (1 - 1/4 - 1/2 + 3/4) of the token losses is all of them.
  const OneStep expected;
  for (const int tp : divisors_of_world()) {
    SCOPED_TRACE(testing::Message() << "tensor " << tp);
    const auto& group = groups(tp);
    const Regression model;
    auto options = trainer_options(1.0);
    options.auxiliary_losses = {"quarter", "rest"};
    Trainer trainer(model.shards(), group, options);
    const bool is_last = group.dp->getRank() == group.dp->getSize() - 1;  // the others know the names alone
    const auto result = trainer.step(
        [&](int64_t /*i*/) {
          const auto sum = model.loss_sum(0, kTokens);
          return LossSum(sum * 0.5, {sum * -0.25, sum * 0.75});
        },
        is_last ? 1 : 0, kTokens);
    EXPECT_NEAR(result.loss, 0.5 * expected.result.loss, 1e-6 * expected.result.loss);
    ASSERT_EQ(result.auxiliary_losses.size(), 2U);
    EXPECT_EQ(result.auxiliary_losses[0].first, "quarter");
    EXPECT_NEAR(result.auxiliary_losses[0].second, -0.25 * expected.result.loss, 1e-6 * expected.result.loss);
    EXPECT_EQ(result.auxiliary_losses[1].first, "rest");
    EXPECT_NEAR(result.auxiliary_losses[1].second, 0.75 * expected.result.loss, 1e-6 * expected.result.loss);
    EXPECT_NEAR(result.grad_norm, expected.result.grad_norm, 1e-5 * expected.result.grad_norm);
    EXPECT_TRUE(near(model.weight, expected.model.weight, 1e-5));
  }
}

TEST(Trainer, ClipsTheGradientOnly) {
  const auto& group = groups(world_tp()->getSize());
  double unclipped = 0.0;
  for (const double clip : {0.0, 0.5, 1e6}) {
    SCOPED_TRACE(testing::Message() << "clip_grad_norm " << clip);
    const Regression model;
    Trainer trainer(model.shards(), group, trainer_options(clip));
    const auto result = step(trainer, model, group, 1);
    if (clip == 0.0) unclipped = result.grad_norm;
    EXPECT_GT(result.grad_norm, 0.5);
    EXPECT_EQ(result.grad_norm, unclipped);  // reported as it was
    double square = 0.0;
    for (const auto& slice : trainer.optimizer().slices()) {
      square += (slice.exp_avg / (1 - AdamWOptions().beta1)).square().sum().item<double>();
    }
    const double taken = clip == 0.5 ? 0.5 : unclipped;
    EXPECT_NEAR(std::sqrt(square), taken, 1e-5 * taken);
  }
}

// On a GPU each such operator waits until all that was asked of it is done.
TEST(Trainer, ReadsNothingBackButLossAndNormTogether) {
  const std::string read = "aten::_local_scalar_dense";
  for (const int tp : divisors_of_world()) {
    SCOPED_TRACE(testing::Message() << "tensor " << tp);
    const Regression model;
    Trainer trainer(model.shards(), groups(tp), trainer_options(0.5));
    step(trainer, model, groups(tp), 2);
    int64_t in_optimizer = 0;  // the CPU's kernel reads its step numbers
    {
      AdamW other(model.shards(), {});
      const test_support::OperatorWatch watch;
      other.step(0.0);
      in_optimizer = watch.count(read);
    }
    const test_support::OperatorWatch watch;
    step(trainer, model, groups(tp), 2);
    EXPECT_EQ(watch.count(read), in_optimizer);
    EXPECT_EQ(watch.copies_to_host(), device().is_cpu() ? 0 : 1);
  }
}

TEST(Trainer, LossesThatAreNotFiniteChangeNothing) {
  for (const int tp : divisors_of_world()) {
    for (const auto& [factor, distributed_optimizer] : {std::pair{std::numeric_limits<double>::infinity(), false},
                                                        {std::numeric_limits<double>::quiet_NaN(), false},
                                                        {std::numeric_limits<double>::quiet_NaN(), true}}) {
      SCOPED_TRACE(testing::Message() << "tensor " << tp << ", " << factor << " " << distributed_optimizer);
      const auto& group = groups(tp);
      const Regression model;
      auto options = trainer_options(1.0);
      options.gradients.distributed_optimizer = distributed_optimizer;
      Trainer trainer(model.shards(), group, options);
      step(trainer, model, group, 1);
      const auto weight = model.weight.detach().clone();
      const auto exp_avg = trainer.optimizer().slices()[0].exp_avg.clone();
      // On the last replica only; the error is everybody's.
      const double scale = group.dp->getRank() == group.dp->getSize() - 1 ? factor : 1.0;
      const auto text = error_of<parallel::AgreedError>(
          [&] { trainer.step([&](int64_t /*i*/) { return model.loss_sum(0, 1) * scale; }, 1, kTokens); });
      EXPECT_TRUE(contains(text, "step 2: loss "));
      EXPECT_TRUE(contains(text, "are not all finite"));
      EXPECT_TRUE(test_support::equal(model.weight, weight));
      EXPECT_TRUE(test_support::equal(trainer.optimizer().slices()[0].exp_avg, exp_avg));
      EXPECT_EQ(trainer.optimizer().num_steps(), 1);
      EXPECT_TRUE(std::isfinite(step(trainer, model, group, 1).grad_norm));  // and the next batch is taken
    }
  }
}

TEST(Trainer, RefusesWhatDoesNotFit) {
  const auto& group = groups(1);
  const Regression model;
  EXPECT_TRUE(contains(value_error([&] { Trainer(model.shards(), group, trainer_options(-1.0)); }),
                       "clip_grad_norm -1 is below 0"));
  auto options = trainer_options(1.0);
  options.learning_rate.total_steps = 0;
  EXPECT_TRUE(contains(value_error([&] { Trainer(model.shards(), group, options); }), "number of steps 0"));
  Trainer trainer(model.shards(), group, trainer_options(1.0));
  EXPECT_TRUE(contains(value_error([&] { trainer.step([&](int64_t /*i*/) { return model.loss_sum(0, 1); }, 1, 0); }),
                       "no loss token"));
  EXPECT_TRUE(contains(value_error([&] {
                         trainer.step([&](int64_t /*i*/) { return LossSum(model.loss_sum(0, 1), {at::ones({})}); }, 1,
                                      kTokens);
                       }),
                       "1 auxiliary losses, and 0 have names"));
}

}  // namespace megatron_cpp
