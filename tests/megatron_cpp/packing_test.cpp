#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "megatron_cpp/data/packed_batch.h"
#include "megatron_cpp/data/sampler.h"
#include "tests/support/errors.h"

namespace megatron_cpp::megatron_cpp {
namespace {

using namespace test_support;
using Row = std::vector<int64_t>;

Row values(const at::Tensor& tensor) {
  EXPECT_EQ(tensor.dtype(), at::kLong);
  EXPECT_TRUE(tensor.is_cpu() && tensor.is_contiguous());
  EXPECT_EQ(tensor.dim(), 2);
  EXPECT_EQ(tensor.size(0), 1);
  const auto* data = tensor.const_data_ptr<int64_t>();
  return {data, data + tensor.numel()};
}

std::vector<int32_t> ends(const PackedBatch& batch) {
  EXPECT_EQ(batch.cu_seqlens.dtype(), at::kInt);
  EXPECT_EQ(batch.cu_seqlens.dim(), 1);
  const auto* data = batch.cu_seqlens.const_data_ptr<int32_t>();
  return {data, data + batch.cu_seqlens.numel()};
}

/// A sample of `positions` positions whose tokens are first, first + 1, ..; the loss counts on the second half.
Sample sample(int64_t first, int64_t positions) {
  Sample result;
  for (int64_t i = 0; i <= positions; ++i) {
    result.tokens.push_back(first + i);
    result.loss_mask.push_back(i > positions / 2 ? 1 : 0);
  }
  return result;
}

TEST(Packing, ByHand) {
  const std::vector<Sample> samples = {{{10, 11, 12, 13}, {0, 0, 1, 1}}, {{20, 21, 22}, {1, 0, 1}}};
  const auto packed = pack(samples, {.max_length = 8, .pad_to = 4, .pad_token = 7});
  ASSERT_EQ(packed.batches.size(), 1U);
  const auto& batch = packed.batches[0];
  constexpr int64_t kNone = kIgnoreIndex;
  EXPECT_EQ(values(batch.tokens), (Row{10, 11, 12, 20, 21, 7, 7, 7}));
  EXPECT_EQ(values(batch.labels), (Row{kNone, 12, 13, kNone, 22, kNone, kNone, kNone}));
  EXPECT_EQ(values(batch.loss_mask), (Row{0, 1, 1, 0, 1, 0, 0, 0}));
  EXPECT_EQ(values(batch.position_ids), (Row{0, 1, 2, 0, 1, 0, 1, 2}));
  EXPECT_EQ(values(batch.padding_mask), (Row{0, 0, 0, 0, 0, 1, 1, 1}));
  EXPECT_EQ(ends(batch), (std::vector<int32_t>{0, 3, 5, 8}));
  EXPECT_EQ(packed.samples, (std::vector<Row>{{0, 1}}));
  EXPECT_TRUE(packed.dropped.empty());
}

TEST(Packing, ExactFitNeedsNoPadding) {
  const auto packed = pack({sample(0, 3), sample(100, 5), sample(200, 8)}, {.max_length = 8, .pad_to = 8});
  ASSERT_EQ(packed.batches.size(), 2U);
  EXPECT_EQ(ends(packed.batches[0]), (std::vector<int32_t>{0, 3, 8}));
  EXPECT_EQ(ends(packed.batches[1]), (std::vector<int32_t>{0, 8}));
  EXPECT_EQ(values(packed.batches[1].tokens), (Row{200, 201, 202, 203, 204, 205, 206, 207}));
  EXPECT_EQ(packed.samples, (std::vector<Row>{{0, 1}, {2}}));
}

TEST(Packing, SamplesStayInOrder) {
  // The third doesn't fit behind the second; the fourth, which would fit in the first sequence, comes after the third.
  const auto packed = pack({sample(0, 3), sample(100, 3), sample(200, 5), sample(300, 1), sample(400, 3)},
                           {.max_length = 8, .pad_to = 1});
  EXPECT_EQ(packed.samples, (std::vector<Row>{{0, 1}, {2, 3}, {4}}));
  EXPECT_EQ(ends(packed.batches[0]), (std::vector<int32_t>{0, 3, 6}));
  EXPECT_EQ(ends(packed.batches[2]), (std::vector<int32_t>{0, 3}));
}

TEST(Packing, OversizeSamplesAreDropped) {
  const auto packed = pack({sample(0, 9), sample(100, 3), sample(200, 20), sample(300, 4)},
                           {.max_length = 8, .pad_to = 16, .oversize = OversizePolicy::kDrop});
  EXPECT_EQ(packed.samples, (std::vector<Row>{{1, 3}}));
  EXPECT_EQ(packed.dropped, (Row{0, 2}));
  EXPECT_EQ(ends(packed.batches[0]), (std::vector<int32_t>{0, 3, 7, 16}));
}

TEST(Packing, OversizeSamplesExtend) {
  const auto packed = pack({sample(0, 3), sample(100, 9), sample(200, 1), sample(300, 9)},
                           {.max_length = 8, .pad_to = 4, .oversize = OversizePolicy::kExtend});
  EXPECT_EQ(packed.samples, (std::vector<Row>{{0}, {1}, {2}, {3}}));
  EXPECT_TRUE(packed.dropped.empty());
  EXPECT_EQ(ends(packed.batches[1]), (std::vector<int32_t>{0, 9, 12}));
  EXPECT_EQ(values(packed.batches[1].tokens), (Row{100, 101, 102, 103, 104, 105, 106, 107, 108, 0, 0, 0}));
}

TEST(Packing, SequencesAreConcatenatedByHand) {
  const auto packed = pack({sample(0, 2), sample(100, 1), sample(200, 4)}, {.max_length = 4, .pad_to = 4});
  ASSERT_EQ(packed.batches.size(), 2U);
  const auto both = concatenate(packed.batches);
  constexpr int64_t kNone = kIgnoreIndex;
  EXPECT_EQ(values(both.tokens), (Row{0, 1, 100, 0, 200, 201, 202, 203}));
  EXPECT_EQ(values(both.labels), (Row{kNone, 2, 101, kNone, kNone, kNone, 203, 204}));
  EXPECT_EQ(values(both.loss_mask), (Row{0, 1, 1, 0, 0, 0, 1, 1}));
  EXPECT_EQ(values(both.position_ids), (Row{0, 1, 0, 0, 0, 1, 2, 3}));
  EXPECT_EQ(ends(both), (std::vector<int32_t>{0, 2, 3, 4, 8}));
  EXPECT_EQ(ends(concatenate({packed.batches[1]})), ends(packed.batches[1]));
  EXPECT_TRUE(contains(value_error([] { concatenate({}); }), "no sequence to concatenate"));
}

TEST(Packing, NoSamples) {
  const auto packed = pack({}, {});
  EXPECT_TRUE(packed.batches.empty());
  EXPECT_TRUE(packed.samples.empty());
  EXPECT_TRUE(pack({sample(0, 9)}, {.max_length = 8}).batches.empty());
}

TEST(Packing, KeepsEveryPositionOnce) {
  for (const int64_t pad_to : {1, 16, 48, 64}) {
    std::vector<Sample> samples;
    int64_t num_positions = 0;
    for (int64_t i = 0; i < 50; ++i) {
      samples.push_back(sample(1000 * i, 1 + (i * 37) % 64));
      num_positions += 1 + (i * 37) % 64;
    }
    const auto packed = pack(samples, {.max_length = 64, .pad_to = pad_to, .pad_token = -1});
    int64_t kept = 0;
    for (const auto& batch : packed.batches) {
      const auto tokens = values(batch.tokens);
      const auto labels = values(batch.labels);
      const auto mask = values(batch.loss_mask);
      EXPECT_EQ(static_cast<int64_t>(tokens.size()) % pad_to, 0);
      EXPECT_EQ(static_cast<size_t>(ends(batch).back()), tokens.size());
      for (size_t i = 0; i < tokens.size(); ++i) {
        kept += tokens[i] >= 0 ? 1 : 0;
        EXPECT_EQ(labels[i], mask[i] != 0 ? tokens[i] + 1 : kIgnoreIndex);
      }
    }
    EXPECT_EQ(kept, num_positions);
  }
}

TEST(Packer, SequenceBySequence) {
  SamplePacker packer({.max_length = 4, .pad_to = 4});
  EXPECT_TRUE(packer.empty());
  EXPECT_EQ(packer.add(sample(0, 3)), SamplePacker::Result::kAdded);
  EXPECT_EQ(packer.add(sample(10, 2)), SamplePacker::Result::kFull);
  EXPECT_EQ(packer.add(sample(20, 5)), SamplePacker::Result::kDropped);
  EXPECT_EQ(packer.num_samples(), 1);
  EXPECT_EQ(packer.num_positions(), 3);
  EXPECT_EQ(ends(packer.finish()), (std::vector<int32_t>{0, 3, 4}));
  EXPECT_TRUE(packer.empty());
  EXPECT_EQ(packer.add(sample(10, 2)), SamplePacker::Result::kAdded);
  EXPECT_EQ(values(packer.finish().position_ids), (Row{0, 1, 0, 1}));
}

TEST(Packer, WrongArguments) {
  EXPECT_TRUE(contains(value_error([] { SamplePacker({.max_length = 0}); }), "max_length 0"));
  EXPECT_TRUE(contains(value_error([] { SamplePacker({.pad_to = -1}); }), "pad_to -1"));
  SamplePacker packer(PackingOptions{});
  EXPECT_TRUE(contains(value_error([&] { packer.finish(); }), "no sample"));
  EXPECT_TRUE(contains(value_error([&] { packer.add({{5}, {1}}); }), "1 tokens"));
  EXPECT_TRUE(contains(value_error([&] { packer.add({{5, 6, 7}, {1, 1}}); }), "loss mask of 2"));
  EXPECT_TRUE(packer.empty());
}

TEST(Permutation, EveryElementOnce) {
  for (const int64_t count : {0, 1, 2, 7, 1000}) {
    auto order = permutation(count, 3);
    std::sort(order.begin(), order.end());
    Row expected(static_cast<size_t>(count));
    std::iota(expected.begin(), expected.end(), 0);
    EXPECT_EQ(order, expected);
  }
  EXPECT_NE(permutation(100, 1), permutation(100, 2));
  EXPECT_TRUE(contains(value_error([] { permutation(-1, 0); }), "-1"));
}

TEST(Permutation, IsTheSameEverywhere) {
  // From a second implementation, in Python.
  EXPECT_EQ(permutation(8, 42), (Row{7, 0, 5, 1, 2, 4, 3, 6}));
}

TEST(Permutation, IsUniform) {
  // 6 orders of 3 elements over 6000 seeds: 1000 expected, standard deviation 29.
  std::map<Row, int> counts;
  for (uint64_t seed = 0; seed < 6000; ++seed) ++counts[permutation(3, seed)];
  ASSERT_EQ(counts.size(), 6U);
  for (const auto& [order, count] : counts) EXPECT_NEAR(count, 1000, 150);
}

Row draw(Sampler& sampler, int64_t count) {
  Row drawn;
  for (int64_t i = 0; i < count; ++i) drawn.push_back(sampler.next());
  return drawn;
}

Row sorted(Row row) {
  std::sort(row.begin(), row.end());
  return row;
}

TEST(Sampler, Sequential) {
  Sampler sampler(3, SampleOrder::kSequential);
  EXPECT_EQ(draw(sampler, 7), (Row{0, 1, 2, 0, 1, 2, 0}));
  EXPECT_EQ(sampler.state(), (SamplerState{2, 1, 3}));
}

TEST(Sampler, ShuffledByEpoch) {
  Sampler sampler(20, SampleOrder::kShuffled, 5);
  for (int64_t epoch = 0; epoch < 3; ++epoch) EXPECT_EQ(draw(sampler, 20), permutation(20, epoch_seed(5, epoch)));
  EXPECT_EQ(sampler.state(), (SamplerState{3, 0, 20}));
}

TEST(Sampler, NoTwoPassesOfTwoSeedsAreEqual) {
  std::set<uint64_t> seeds;
  for (uint64_t seed = 0; seed < 100; ++seed) {
    for (int64_t epoch = 0; epoch < 100; ++epoch) seeds.insert(epoch_seed(seed, epoch));
  }
  EXPECT_EQ(seeds.size(), 10'000U);
}

TEST(Sampler, AddedSamplesComeInTheNextPass) {
  for (const auto order : {SampleOrder::kSequential, SampleOrder::kShuffled}) {
    Sampler small(5, order, 7);
    draw(small, 7);  // two of the second pass
    auto undisturbed = small;
    Sampler grown(9, order, 7);
    grown.restore(small.state());
    EXPECT_EQ(draw(grown, 3), draw(undisturbed, 3));
    EXPECT_EQ(grown.state(), (SamplerState{2, 0, 9}));
    EXPECT_EQ(sorted(draw(grown, 9)), (Row{0, 1, 2, 3, 4, 5, 6, 7, 8}));
  }
}

TEST(Sampler, RemovedSamplesBeginTheNextPass) {
  Sampler sampler(9, SampleOrder::kShuffled, 7);
  draw(sampler, 12);
  Sampler shrunk(5, SampleOrder::kShuffled, 7);
  shrunk.restore(sampler.state());
  EXPECT_EQ(shrunk.state(), (SamplerState{2, 0, 5}));
  EXPECT_EQ(draw(shrunk, 5), permutation(5, epoch_seed(7, 2)));
}

TEST(Sampler, ResumesAnywhere) {
  for (const auto order : {SampleOrder::kSequential, SampleOrder::kShuffled}) {
    Sampler uninterrupted(7, order, 11);
    const auto expected = draw(uninterrupted, 40);
    for (int64_t stop = 0; stop <= 21; ++stop) {
      Sampler first(7, order, 11);
      draw(first, stop);
      Sampler second(7, order, 11);
      second.restore(first.state());
      EXPECT_EQ(draw(second, 40 - stop), Row(expected.begin() + stop, expected.end())) << "stopped at " << stop;
      EXPECT_EQ(second.state(), uninterrupted.state());
    }
  }
}

TEST(Sampler, WrongArguments) {
  EXPECT_TRUE(contains(value_error([] { Sampler(0, SampleOrder::kSequential); }), "at least 1 sample, got 0"));
  Sampler sampler(5, SampleOrder::kShuffled);
  EXPECT_TRUE(contains(value_error([&] { sampler.restore({-1, 0}); }), "epoch -1"));
  EXPECT_TRUE(contains(value_error([&] { sampler.restore({0, 5}); }), "position 5"));
  EXPECT_TRUE(contains(value_error([&] { sampler.restore({0, 0, -1}); }), "a sampler's pass of -1 samples"));
  EXPECT_EQ(sampler.state(), (SamplerState{0, 0, 5}));
}

MixedSampler three_data_sets() {
  return MixedSampler({Sampler(10, SampleOrder::kShuffled, 1), Sampler(1000, SampleOrder::kShuffled, 2),
                       Sampler(7, SampleOrder::kSequential), Sampler(3, SampleOrder::kSequential)},
                      {3.0, 6.0, 1.0, 0.0});
}

TEST(MixedSampler, KeepsProportionsAtEveryDraw) {
  auto mix = three_data_sets();
  const double shares[] = {0.3, 0.6, 0.1, 0.0};
  int64_t counts[4] = {};
  for (int num_draws = 1; num_draws <= 5000; ++num_draws) {
    const auto drawn = mix.next();
    ++counts[drawn.data_set];
    for (int i = 0; i < 4; ++i) ASSERT_LT(std::abs(static_cast<double>(counts[i]) - shares[i] * num_draws), 4.0);
  }
  EXPECT_EQ(counts[0], 1500);
  EXPECT_EQ(counts[1], 3000);
  EXPECT_EQ(counts[2], 500);
  EXPECT_EQ(counts[3], 0);
}

TEST(MixedSampler, EachDataSetIsDrawnInItsOwnOrder) {
  auto mix = three_data_sets();
  Sampler alone(10, SampleOrder::kShuffled, 1);
  for (int i = 0; i < 300; ++i) {
    const auto drawn = mix.next();
    if (drawn.data_set == 0) {
      EXPECT_EQ(drawn.sample, alone.next());
    }
  }
}

TEST(MixedSampler, ResumesAnywhere) {
  auto uninterrupted = three_data_sets();
  std::vector<MixedSampler::Draw> expected;
  for (int i = 0; i < 200; ++i) expected.push_back(uninterrupted.next());
  for (size_t stop = 0; stop < 100; stop += 7) {
    auto first = three_data_sets();
    for (size_t i = 0; i < stop; ++i) first.next();
    auto second = three_data_sets();
    second.restore(first.state());
    for (size_t i = stop; i < expected.size(); ++i) ASSERT_EQ(second.next(), expected[i]) << stop << " " << i;
  }
}

TEST(MixedSampler, AnAddedDataSetGetsItsShareFromThenOn) {
  const Sampler sampler(10, SampleOrder::kSequential);
  MixedSampler two({sampler, sampler}, {1.0, 1.0});
  for (int i = 0; i < 1001; ++i) two.next();
  auto states = two.state();
  states.emplace_back();
  MixedSampler three({sampler, sampler, sampler}, {1.0, 1.0, 2.0});
  three.restore(states);
  int counts[3] = {};
  for (int i = 0; i < 400; ++i) ++counts[three.next().data_set];
  EXPECT_NEAR(counts[0], 100, 2);
  EXPECT_NEAR(counts[1], 100, 2);
  EXPECT_NEAR(counts[2], 200, 2);
}

TEST(MixedSampler, WrongArguments) {
  const Sampler one(5, SampleOrder::kSequential);
  EXPECT_TRUE(contains(value_error([&] { MixedSampler({}, {}); }), "at least one data set"));
  EXPECT_TRUE(contains(value_error([&] { MixedSampler({one}, {1.0, 2.0}); }), "1 data sets with 2 weights"));
  EXPECT_TRUE(contains(value_error([&] { MixedSampler({one}, {-1.0}); }), "-1"));
  EXPECT_TRUE(contains(value_error([&] { MixedSampler({one}, {std::numeric_limits<double>::quiet_NaN()}); }), "nan"));
  EXPECT_TRUE(contains(value_error([&] { MixedSampler({one, one}, {0.0, 0.0}); }), "sum to 0"));
  auto mix = three_data_sets();
  EXPECT_TRUE(contains(value_error([&] { mix.restore({MixedSampler::State{}}); }), "1 sampler states for 4"));
}

}  // namespace
}  // namespace megatron_cpp::megatron_cpp
