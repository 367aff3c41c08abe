// A rehearsed group: what one rank of many would send and get, with nobody else there.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "parallel/collectives.h"
#include "parallel/paced_stream.h"
#include "parallel/recording_backend.h"
#include "parallel/rehearsal_backend.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::parallel {
namespace {

using test_support::exact_values;

/// Notes what collectives of a stream would send, and lets them happen when they are waited for.
class NotedStream final : public PacedStream {
 public:
  class Late final : public c10d::Work {
   public:
    explicit Late(std::function<void()> fill) : fill_(std::move(fill)) {}
    bool wait(std::chrono::milliseconds /*timeout*/) override {
      fill_();
      return true;
    }

   private:
    std::function<void()> fill_;
  };

  c10::intrusive_ptr<c10d::Work> run(const std::function<void()>& fill, int64_t /*filled_bytes*/, int64_t sent_bytes,
                                     std::vector<at::Tensor> /*tensors*/) override {
    sent += sent_bytes;
    return c10::make_intrusive<Late>(fill);
  }

  int64_t sent = 0;
};

}  // namespace

// On a GPU a collective takes the time of the bytes that recordings count.
TEST(Rehearsal, HandsAStreamTheBytesThatAreCounted) {
  constexpr int kT = 4;
  const auto stream = std::make_shared<NotedStream>();
  auto group = c10::make_intrusive<c10d::ProcessGroup>(1, kT);
  group->setBackend(at::kCPU, c10d::ProcessGroup::CUSTOM, make_rehearsal_backend(1, kT, stream));
  const auto recorded = record(group);
  const auto input = exact_values({8, 2}, 1);
  const auto expect_counted = [&](const at::Tensor& result, const at::Tensor& expected) {
    EXPECT_TRUE(test_support::equal(result, expected));
    EXPECT_GT(stream->sent, 0);
    EXPECT_EQ(stream->sent, recorded.count->bytes_sent);
  };
  const auto only = [](int64_t rows, int64_t begin, const at::Tensor& values) {
    auto result = at::zeros({rows, 2});
    result.narrow(0, begin, values.size(0)).copy_(values);
    return result;
  };
  expect_counted(all_reduce(input, recorded.group), input);
  expect_counted(all_gather(input, recorded.group), only(32, 8, input));
  expect_counted(all_gather_uneven(input, {1, 8, 0, 2}, recorded.group), only(11, 1, input));
  expect_counted(reduce_scatter(input, recorded.group), input.narrow(0, 2, 2));
  expect_counted(all_to_all(input, {}, {}, recorded.group), only(8, 2, input.narrow(0, 2, 2)));
  expect_counted(all_to_all(input, {1, 3, 0, 0}, {0, 3, 1, 4}, recorded.group), only(4, 1, input.narrow(0, 0, 3)));
  expect_counted(broadcast(input, 2, recorded.group), at::zeros({8, 2}));
}

TEST(PacedTransfer, MovesTheBytesAndIdlesTheRestOfTheTime) {
  // 100 MB at 100 GB/s are a millisecond, of which copying them at 1000 GB/s takes a tenth.
  const auto all_reduce = paced_transfer(100'000'000, 0, 100, 1000);
  EXPECT_EQ(all_reduce.copied_bytes, 100'000'000);
  EXPECT_NEAR(all_reduce.idle_seconds, 0.9e-3, 1e-9);
  // A result that is larger than what is sent, and was filled already.
  const auto all_gather = paced_transfer(75'000'000, 100'000'000, 100, 1000);
  EXPECT_EQ(all_gather.copied_bytes, 0);
  EXPECT_NEAR(all_gather.idle_seconds, 0.65e-3, 1e-9);
  EXPECT_EQ(paced_transfer(100, 0, 2000, 1000).idle_seconds, 0);
  EXPECT_EQ(paced_transfer(0, 0, 100, 1000).copied_bytes, 0);
}

TEST(Rehearsal, RefusesATimeOnTheCpu) {
  EXPECT_THROW(make_rehearsal_group(0, 2, {.gigabytes_per_second = 100}), c10::ValueError);
  EXPECT_THROW(make_rehearsal_group(0, 2, {.device = at::kMeta}), c10::ValueError);
}

TEST(Rehearsal, OthersContributeZeros) {
  constexpr int kT = 3;
  for (int rank = 0; rank < kT; ++rank) {
    const auto group = make_rehearsal_group(rank, kT);
    const auto input = exact_values({6, 2}, rank + 1);
    EXPECT_TRUE(test_support::equal(all_reduce(input, group), input));
    EXPECT_TRUE(test_support::equal(reduce_scatter(input, group), input.narrow(0, 2 * rank, 2)));
    auto gathered = at::zeros({18, 2});
    gathered.narrow(0, 6 * rank, 6).copy_(input);
    EXPECT_TRUE(test_support::equal(all_gather(input, group), gathered));
    auto uneven = at::zeros({6 + 2 * kT - 2, 2});  // the others have two rows each
    uneven.narrow(0, 2 * rank, 6).copy_(input);
    std::vector<int64_t> rows(kT, 2);
    rows[static_cast<size_t>(rank)] = 6;
    EXPECT_TRUE(test_support::equal(all_gather_uneven(input, rows, group), uneven));
    auto kept = at::zeros({6, 2});
    kept.narrow(0, 2 * rank, 2).copy_(input.narrow(0, 2 * rank, 2));
    EXPECT_TRUE(test_support::equal(all_to_all(input, {}, {}, group), kept));
    EXPECT_TRUE(test_support::equal(broadcast(input, 1, group), rank == 1 ? input : at::zeros({6, 2})));
    barrier(group);
  }
}

// The formulas at sizes that no test could run.
TEST(Rehearsal, CountsWhatARankOfThousandsSends) {
  for (const int t : {1, 64, 4096, 262144}) {
    const auto recorded = record(make_rehearsal_group(t - 1, t));
    const auto input = at::zeros({t, 1});
    const int64_t share = t == 1 ? 0 : 4 * (t - 1);
    all_reduce(input, recorded.group);
    EXPECT_EQ(recorded.count->bytes_sent, 2 * share) << t;
    reduce_scatter(input, recorded.group);
    EXPECT_EQ(recorded.count->bytes_sent, 3 * share) << t;
    all_gather(at::zeros({1, 1}), recorded.group);
    EXPECT_EQ(recorded.count->bytes_sent, 4 * share) << t;
    all_to_all(input, {}, {}, recorded.group);
    EXPECT_EQ(recorded.count->bytes_sent, 5 * share) << t;
    EXPECT_EQ(recorded.count->of(CollectiveKind::kAllToAll), t == 1 ? 0 : 1);
  }
}

TEST(Rehearsal, RefusesRanksThatAreNotInTheGroup) {
  EXPECT_THROW(make_rehearsal_group(4, 4), c10::ValueError);
  EXPECT_THROW(make_rehearsal_group(-1, 4), c10::ValueError);
}

}  // namespace megatron_cpp::parallel
