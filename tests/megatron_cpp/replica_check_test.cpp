// Copies of parameters that are no longer the same are found, and named.
#include "megatron_cpp/training/replica_check.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "megatron_cpp/optimizer/adamw.h"
#include "megatron_cpp/training/trainer.h"
#include "parallel/errors.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp {
namespace {

using namespace test_support;

int64_t hash(const at::Tensor& tensor) { return hash_of_bits(tensor).item<int64_t>(); }

/// Parameters of each domain, of which ranks hold copies or parts. The second isn't trained.
std::vector<ParameterShard> parameters() {
  std::vector<ParameterShard> shards;
  const auto add = [&](const char* name, at::ScalarType dtype, GradientDomain domain) {
    const auto tensor = on_device(at::arange(37).to(dtype)).requires_grad_(shards.size() != 1);
    shards.push_back(
        {name, tensor, domain, {ParameterSegment::rows(name, {37}, 0, 0, 0, 37)}, InitialValue::constant(0.0)});
  };
  add("sharded", at::kFloat, GradientDomain::kSharded);
  add("frozen", at::kBFloat16, GradientDomain::kReplicated);
  add("norm", at::kBFloat16, GradientDomain::kReplicatedPartial);
  add("experts", at::kDouble, GradientDomain::kExpert);
  return shards;
}

std::string error_of(const std::vector<ParameterShard>& shards, const parallel::ProcessGroups& layout) {
  try {
    check_replicas(shards, layout, "after step 7");
  } catch (const parallel::AgreedError& error) {
    return error.what();
  }
  return "";
}

}  // namespace

TEST(HashOfBits, EveryElementAndItsPlaceCount) {
  for (const auto dtype : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf, at::kByte}) {
    const auto tensor = on_device(at::arange(1000).remainder(50).to(dtype));
    const auto before = hash(tensor);
    EXPECT_EQ(hash(tensor.clone()), before);
    for (const int64_t place : {0, 1, 500, 999}) {
      auto changed = tensor.clone();
      changed[place] += 1;
      EXPECT_NE(hash(changed), before) << dtype << " " << place;
    }
    EXPECT_NE(hash(tensor.flip(0)), before) << dtype;
  }
  EXPECT_NE(hash(at::full({3}, 0.0)), hash(at::full({3}, -0.0)));
  EXPECT_EQ(hash(at::zeros({0, 4})), 0);
  // More than is widened at a time.
  auto large = on_device(at::zeros({(1 << 20) + 3}));
  const auto before = hash(large);
  large[large.numel() - 1] = 1.0;
  EXPECT_NE(hash(large), before);
}

TEST(CheckReplicas, NamesTheFirstParameterThatDiffersAndTheRank) {
  const int size = runtime().size();
  for (const int tp : divisors_of_world()) {
    const auto& layout = groups({.tp = tp, .dp = size / tp, .ep = size, .etp = 1});
    EXPECT_EQ(error_of(parameters(), layout), "");
    // Parts differ between tensor-parallel ranks.
    auto parts = parameters();
    parts[0].parameter.detach().add_(layout.tp->getRank());
    EXPECT_EQ(error_of(parts, layout), "");
    // Each rank has experts of its own.
    parts[3].parameter.detach().add_(layout.world->getRank());
    EXPECT_EQ(error_of(parts, layout), "");
    if (size == 1) continue;

    auto drifted = parameters();
    const int last = size - 1;
    if (layout.world->getRank() == last) {
      drifted[1].parameter.detach()[36] = 0;
      drifted[2].parameter.detach()[0] = 1;
    }
    const auto error = error_of(drifted, layout);
    EXPECT_TRUE(
        contains(error, c10::str("after step 7 parameter frozen is not the same on all ranks that hold a copy of "
                                 "it: rank ",
                                 last, " of the world has other values than rank 0")))
        << error;
    // Copies of a sharded parameter are on the ranks of dp.
    auto sharded = parameters();
    if (layout.world->getRank() == last) sharded[0].parameter.detach()[3] = -1;
    const auto error_of_sharded = error_of(sharded, layout);
    EXPECT_EQ(contains(error_of_sharded, "parameter sharded"), layout.dp->getSize() > 1) << error_of_sharded;
  }
}

TEST(CheckReplicas, ATrainerDoesSoNowAndThen) {
  const auto& layout = groups(1);
  const auto shards = parameters();
  TrainerOptions options;
  options.learning_rate = {.peak = 0.1, .floor = 0.01, .warmup_steps = 1, .total_steps = 9};
  options.check_replicas = 2;
  const std::vector<ParameterShard> trained{shards[0], shards[1]};
  Trainer trainer(trained, layout, options);
  const auto step = [&] {
    return trainer.step([&](int64_t) { return shards[0].parameter.square().sum(); }, 1, 4 * layout.dp->getSize());
  };
  step();
  if (layout.dp->getRank() == 1) shards[1].parameter.detach()[4] = 9;
  if (runtime().size() == 1) {
    step();
    return;
  }
  try {
    step();
    FAIL() << "nobody has noticed";
  } catch (const parallel::AgreedError& error) {
    EXPECT_TRUE(contains(error.what(), "after step 2 parameter frozen")) << error.what();
  }
}

}  // namespace megatron_cpp
