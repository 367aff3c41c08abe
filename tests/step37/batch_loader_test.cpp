// The loader on data sets of token ids in memory: what each rank gets, mixing, balancing, resuming.
#include "step37/data/batch_loader.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "parallel/agree.h"
#include "parallel/collectives.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::step37 {
namespace {

using test_support::divisors_of_world;
using test_support::groups;

/// Sample i has 3 + (7 i) % 11 tokens `first` + i; the loss counts the last. Where `broken` says so it throws.
class Numbers : public DataSet {
 public:
  Numbers(int64_t num_samples, int64_t first, int64_t broken = -1)
      : num_samples_(num_samples), first_(first), broken_(broken) {}

  int64_t num_samples() const override { return num_samples_; }
  std::string name(int64_t index) const override { return "number " + std::to_string(first_ + index); }
  std::vector<std::string> texts(int64_t /*index*/) const override { return {}; }
  std::vector<PictureReference> pictures(int64_t /*index*/, const SampleFormat& /*format*/) const override {
    return {};
  }
  PictureSample sample(int64_t index, const SampleFormat& /*format*/) const override {
    TORCH_CHECK_VALUE(index != broken_, name(index), " can't be read");
    PictureSample result;
    result.tokens.assign(static_cast<size_t>(3 + 7 * index % 11), first_ + index);
    result.loss_mask.assign(result.tokens.size(), 0);
    result.loss_mask.back() = 1;
    return result;
  }

 private:
  int64_t num_samples_;
  int64_t first_;
  int64_t broken_;
};

std::vector<WeightedDataSet> mix_of_three() {
  return {{"a", std::make_shared<const Numbers>(7, 1000), 2.0},
          {"b", std::make_shared<const Numbers>(5, 2000), 1.0, SampleOrder::kSequential},
          {"c", std::make_shared<const Numbers>(30, 3000), 1.0}};
}

BatchLoaderOptions options(int64_t global_batch_size, int64_t micro_batch_size = 1) {
  BatchLoaderOptions options;
  options.format.crops = {.global_side = 28, .with_crops = false};
  options.packing = {.max_length = 32, .pad_to = 8};
  options.global_batch_size = global_batch_size;
  options.micro_batch_size = micro_batch_size;
  options.seed = 5;
  return options;
}

/// What a rank gets in a step, as text.
std::string text_of(const StepPacks& step) {
  std::string text;
  for (const auto& pack : step.micro_batches) {
    text += c10::str(pack.packed.tokens, pack.packed.labels, pack.packed.cu_seqlens);
    for (const auto& name : pack.samples) text += name + ";";
  }
  for (const auto& [name, state] : step.next) {
    text += c10::str(name, " ", state.sampler.epoch, " ", state.sampler.position, " ", state.credit, ";");
  }
  return text + c10::str(step.num_loss_tokens, " ", step.num_tokens, " ", step.num_positions, " ", step.num_samples);
}

std::vector<StepPacks> load(const BatchLoaderOptions& options, const parallel::ProcessGroups& of, int count,
                            const MixState& start = {}) {
  PictureFaults faults;
  const bool packs = of.tp->getRank() == 0;
  BatchLoader loader(options, packs ? mix_of_three() : std::vector<WeightedDataSet>{}, of, start, faults);
  std::vector<StepPacks> steps;
  for (int i = 0; i < count; ++i) steps.push_back(loader.next().packs);
  return steps;
}

/// The names of all samples of a step, of every replica, sorted. Collective over dp.
std::vector<std::string> all_samples(const StepPacks& step, const parallel::ProcessGroups& of) {
  std::vector<std::string> names;
  for (int rank = 0; rank < of.dp->getSize(); ++rank) {
    std::string own;
    for (const auto& pack : step.micro_batches) {
      for (const auto& name : pack.samples) own += name + "\n";
    }
    const auto text = parallel::broadcast_text(own, rank, of.dp);
    for (size_t begin = 0; begin < text.size();) {
      const auto end = text.find('\n', begin);
      names.push_back(text.substr(begin, end - begin));
      begin = end + 1;
    }
  }
  std::ranges::sort(names);
  return names;
}

TEST(BatchLoader, RanksOfATensorParallelGroupGetTheSame) {
  for (const int tp : divisors_of_world()) {
    for (const auto& step : load(options(4, 1), groups(tp), 5)) {
      const auto text = text_of(step);
      EXPECT_EQ(parallel::broadcast_text(text, 0, groups(tp).tp), text);
      EXPECT_EQ(static_cast<int>(step.micro_batches.size()), 4 / groups(tp).dp->getSize());
    }
  }
}

TEST(BatchLoader, EverySampleOfTheGlobalBatchGoesToOneReplicaInEveryLayout) {
  std::vector<std::vector<std::string>> expected;
  for (const int tp : divisors_of_world()) {
    for (const bool balanced : {false, true}) {
      auto of_layout = options(4);
      if (balanced) of_layout.pack_cost = [](const PicturePack& pack) { return pack.packed.tokens.numel(); };
      const auto steps = load(of_layout, groups(tp), 5);
      for (size_t i = 0; i < steps.size(); ++i) {
        const auto samples = all_samples(steps[i], groups(tp));
        EXPECT_EQ(static_cast<int64_t>(samples.size()), steps[i].num_samples);
        if (expected.size() == i) expected.push_back(samples);
        EXPECT_EQ(samples, expected[i]) << "tp " << tp << " step " << i;
      }
    }
  }
}

TEST(BatchLoader, DrawsByWeight) {
  std::map<char, int> counts;
  for (const auto& step : load(options(static_cast<int64_t>(groups(1).dp->getSize())), groups(1), 40)) {
    for (const auto& name : all_samples(step, groups(1))) ++counts[name[7]];
  }
  const int total = counts['1'] + counts['2'] + counts['3'];
  EXPECT_NEAR(counts['1'], total / 2.0, 3);
  EXPECT_NEAR(counts['2'], total / 4.0, 3);
  EXPECT_NEAR(counts['3'], total / 4.0, 3);
}

TEST(BatchLoader, GoesOnWhereACheckpointWas) {
  for (const int tp : divisors_of_world()) {
    const auto whole = load(options(4), groups(tp), 12);
    for (size_t stop = 1; stop < 12; stop += 3) {
      const auto rest = load(options(4), groups(tp), static_cast<int>(12 - stop), whole[stop - 1].next);
      for (size_t i = stop; i < 12; ++i) EXPECT_EQ(text_of(rest[i - stop]), text_of(whole[i])) << stop << " " << i;
    }
  }
}

TEST(BatchLoader, MicroBatchesAreConcatenatedPacks) {
  const auto& of = groups(test_support::runtime().size());
  const auto single = load(options(4, 1), of, 1).front();
  const auto joined = load(options(4, 2), of, 1).front();
  ASSERT_EQ(joined.micro_batches.size(), 2U);
  const auto tokens = at::cat({single.micro_batches[2].packed.tokens, single.micro_batches[3].packed.tokens}, 1);
  EXPECT_TRUE(at::equal(joined.micro_batches[1].packed.tokens, tokens));
  auto names = single.micro_batches[2].samples;
  names.insert(names.end(), single.micro_batches[3].samples.begin(), single.micro_batches[3].samples.end());
  EXPECT_EQ(joined.micro_batches[1].samples, names);
}

TEST(BatchLoader, ASampleThatCantBeReadEndsEveryRank) {
  for (const int tp : divisors_of_world()) {
    PictureFaults faults;
    const std::vector<WeightedDataSet> mix{{"a", std::make_shared<const Numbers>(7, 1000, 3)}};
    const auto message = test_support::message_of([&] {
      BatchLoader loader(options(4), groups(tp).tp->getRank() == 0 ? mix : std::vector<WeightedDataSet>{}, groups(tp),
                         {}, faults);
      for (int i = 0; i < 4; ++i) loader.next();
    });
    EXPECT_NE(message.find("number 1003 can't be read"), std::string::npos) << message;
  }
}

TEST(BatchLoader, SamplesThatAreTooLong) {
  const auto& of = groups(test_support::runtime().size());
  auto short_packs = options(2);
  short_packs.packing.max_length = 1;
  const auto message = test_support::message_of([&] { load(short_packs, of, 1); });
  EXPECT_NE(message.find("no sample fits a pack of 1 positions"), std::string::npos) << message;
  short_packs.packing.oversize = OversizePolicy::kExtend;
  for (const auto& step : load(short_packs, of, 3)) {
    for (const auto& pack : step.micro_batches) EXPECT_EQ(pack.samples.size(), 1U);
  }
}

TEST(BalancedPacks, AsManyForEachAndNoSumFarAboveTheOthers) {
  const std::vector<int64_t> costs{9, 1, 1, 1, 8, 2, 2, 2};
  const auto packs = balanced_packs(costs, 2);
  std::vector<int64_t> sums;
  for (const auto& of_rank : packs) {
    EXPECT_EQ(of_rank.size(), 4U);
    EXPECT_TRUE(std::ranges::is_sorted(of_rank, [&](size_t a, size_t b) { return costs[a] > costs[b]; }));
    sums.push_back(std::accumulate(of_rank.begin(), of_rank.end(), int64_t{0},
                                   [&](int64_t sum, size_t i) { return sum + costs[i]; }));
  }
  EXPECT_EQ(sums, (std::vector<int64_t>{13, 13}));  // by runs: 12 and 14
  EXPECT_NE(test_support::message_of([&] { balanced_packs(costs, 3); }).find("not divisible"), std::string::npos);
}

}  // namespace
}  // namespace megatron_cpp::step37
