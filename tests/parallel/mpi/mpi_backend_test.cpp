// The MPI backend itself: order and rounding of its sums, strided and uneven tensors, what it refuses, and a rank that
// doesn't come.
#include "parallel/mpi/mpi_backend.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "parallel/collectives.h"
#include "tests/parallel/rank_values.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::parallel {
namespace {

using namespace rank_values;
using namespace test_support;

/// A strided tensor of this shape, every second element of its last dimension's memory.
at::Tensor strided_like(const at::Tensor& tensor) {
  auto shape = tensor.sizes().vec();
  shape.back() *= 2;
  return at::zeros(shape, tensor.options()).slice(-1, 0, shape.back(), 2);
}

/// The MPI backend of the whole world, for what collectives.h has no function for.
c10::intrusive_ptr<c10d::Backend> mpi(int t) { return groups(t).tp->getBackend(c10::DeviceType::CPU); }

/// How its messages call it.
std::string where(int t) {
  return "group tp, rank " + std::to_string(groups(t).tp->getRank()) + " of " + std::to_string(t);
}

}  // namespace

// 256 + 1 is 256 in bfloat16, and so is 256 + 1 + 1 + 1 if each sum is rounded; 259 rounds to 260. The same with 2048
// in float16.
TEST(MpiBackend, SumsOfHalfTypesAreRoundedOnce) {
  for (const int t : test_support::divisors_of_world()) {
    const int r = groups(t).tp->getRank();
    for (const auto& [dtype, large] : {std::pair{at::kBFloat16, 256.0}, std::pair{at::kHalf, 2048.0}}) {
      const double sum = large + (t - 1);
      for (const int64_t elements : {8, 1 << 14}) {
        const auto input = at::full({elements}, r == 0 ? large : 1.0, dtype);
        const auto expected = at::full({elements}, sum, at::kFloat).to(dtype);
        EXPECT_TRUE(test_support::equal(all_reduce(input, groups(t).tp), expected)) << dtype << ", " << elements;
        EXPECT_TRUE(test_support::equal(reduce_scatter(input, groups(t).tp), expected.narrow(0, 0, elements / t)))
            << dtype << ", " << elements;
      }
      if (t == 4) {
        EXPECT_NE(at::full({1}, sum, at::kFloat).to(dtype).item<double>(), large);
      }
    }
  }
}

// float32 sums of numbers of different magnitude depend on the order: it is that of the ranks, so all have the same
// bits.
TEST(MpiBackend, SumsInTheOrderOfTheRanks) {
  for (const int t : test_support::divisors_of_world()) {
    for (const int64_t elements : {100, 5003}) {
      std::vector<at::Tensor> all;
      for (const int peer : peers(t)) {
        const auto index = at::arange(elements, at::kDouble);
        all.push_back(
            (at::sin(index * (peer + 1)) * at::pow(10.0, (index + 3 * peer).remainder(9) - 4)).to(at::kFloat));
      }
      auto expected = all[0];
      for (size_t rank = 1; rank < all.size(); ++rank) expected = expected + all[rank];
      const auto& input = all[static_cast<size_t>(groups(t).tp->getRank())];
      EXPECT_TRUE(test_support::equal(all_reduce(input, groups(t).tp), expected)) << elements << " over " << t;
    }
  }
}

TEST(MpiBackend, AveragesAndMultiplies) {
  for (const int t : test_support::divisors_of_world()) {
    std::vector<at::Tensor> tensors{own(t, {6}, at::kDouble)};
    c10d::AllreduceOptions options;
    options.reduceOp = c10d::ReduceOp::AVG;
    mpi(t)->allreduce(tensors, options)->wait();
    const auto all = at::stack(of_all(t, {6}, at::kDouble));
    EXPECT_TRUE(test_support::near(tensors[0], all.mean(0), 1e-15));
    tensors = {own(t, {6}, at::kDouble)};
    options.reduceOp = c10d::ReduceOp::PRODUCT;
    mpi(t)->allreduce(tensors, options)->wait();
    EXPECT_TRUE(test_support::equal(tensors[0], all.prod(0)));
  }
}

TEST(MpiBackend, FillsStridedOutputs) {
  for (const int t : test_support::divisors_of_world()) {
    const int r = groups(t).tp->getRank();
    const auto all = of_all(t, {2 * t, 3}, at::kFloat);
    const auto sum = reduced(all, Reduction::kSum);
    auto input = transposed_storage(own(t, {2 * t, 3}, at::kFloat));

    auto gathered = strided_like(at::cat(all, 0));
    mpi(t)->_allgather_base(gathered, input, {})->wait();
    EXPECT_TRUE(test_support::equal(gathered, at::cat(all, 0)));

    auto scattered = strided_like(sum.narrow(0, 2 * r, 2));
    mpi(t)->_reduce_scatter_base(scattered, input, {})->wait();
    EXPECT_TRUE(test_support::equal(scattered, sum.narrow(0, 2 * r, 2)));

    std::vector<at::Tensor> received;
    for (const auto& theirs : all) received.push_back(theirs.narrow(0, 2 * r, 2));
    auto exchanged = strided_like(input);
    std::vector<int64_t> equal_splits;
    mpi(t)->alltoall_base(exchanged, input, equal_splits, equal_splits, {})->wait();
    EXPECT_TRUE(test_support::equal(exchanged, at::cat(received, 0)));

    for (const int64_t rows : {2 * t, 5000}) {
      std::vector<at::Tensor> tensors{strided_like(own(t, {rows, 3}, at::kFloat))};
      tensors[0].copy_(own(t, {rows, 3}, at::kFloat));
      mpi(t)->allreduce(tensors, {})->wait();
      EXPECT_TRUE(test_support::equal(tensors[0], reduced(of_all(t, {rows, 3}, at::kFloat), Reduction::kSum)));
    }

    std::vector<at::Tensor> sent{strided_like(input)};
    sent[0].copy_(input);
    c10d::BroadcastOptions options;
    options.rootRank = t - 1;
    mpi(t)->broadcast(sent, options)->wait();
    EXPECT_TRUE(test_support::equal(sent[0], all.back()));
  }
}

// Rank p gives p rows: the first none.
TEST(MpiBackend, GathersUnevenParts) {
  for (const int t : test_support::divisors_of_world()) {
    const int r = groups(t).tp->getRank();
    for (const auto dtype : kDtypes) {
      std::vector<at::Tensor> expected;
      std::vector<std::vector<at::Tensor>> outputs(1);
      for (int p = 0; p < t; ++p) {
        expected.push_back(values({p, 3}, peers(t)[static_cast<size_t>(p)], dtype));
        outputs[0].push_back(strided_like(expected.back()));
      }
      std::vector<at::Tensor> inputs{transposed_storage(expected[static_cast<size_t>(r)])};
      mpi(t)->allgather(outputs, inputs, {})->wait();
      for (size_t p = 0; p < expected.size(); ++p)
        EXPECT_TRUE(test_support::equal(outputs[0][p], expected[p])) << dtype << ", " << p;
    }
  }
}

TEST(MpiBackend, MovesNothingWhereThereIsNothing) {
  for (const int t : test_support::divisors_of_world()) {
    auto none = at::empty({0, 3});
    std::vector<at::Tensor> tensors{none};
    std::vector<int64_t> splits(static_cast<size_t>(t), 0);
    EXPECT_NO_THROW(mpi(t)->allreduce(tensors, {})->wait());
    EXPECT_NO_THROW(mpi(t)->broadcast(tensors, {})->wait());
    EXPECT_NO_THROW(mpi(t)->_allgather_base(none, none, {})->wait());
    EXPECT_NO_THROW(mpi(t)->_reduce_scatter_base(none, none, {})->wait());
    EXPECT_NO_THROW(mpi(t)->alltoall_base(none, none, splits, splits, {})->wait());
    EXPECT_NO_THROW(mpi(t)->barrier({})->wait());
  }
}

TEST(MpiBackend, RefusesTensorsThatAreNotOnTheCpu) {
  auto elsewhere = at::empty({4}, at::TensorOptions().device(at::kMeta));
  auto undefined = at::Tensor();
  for (const int t : test_support::divisors_of_world()) {
    auto here = at::empty({4 * t});
    std::vector<int64_t> splits;
    std::vector<at::Tensor> tensors{elsewhere};
    EXPECT_EQ(value_error([&] { mpi(t)->allreduce(tensors, {}); }),
              "all_reduce: the MPI backend takes tensors on the CPU, got meta (" + where(t) + ")");
    EXPECT_TRUE(contains(value_error([&] { mpi(t)->broadcast(tensors, {}); }), "broadcast: the MPI backend"));
    EXPECT_TRUE(contains(value_error([&] { mpi(t)->_allgather_base(here, elsewhere, {}); }), "all_gather: "));
    EXPECT_TRUE(contains(value_error([&] { mpi(t)->_reduce_scatter_base(elsewhere, here, {}); }), "got meta"));
    EXPECT_TRUE(contains(value_error([&] { mpi(t)->alltoall_base(here, undefined, splits, splits, {}); }),
                         "all_to_all: the MPI backend takes tensors on the CPU, got an undefined one"));
  }
}

TEST(MpiBackend, RefusesOtherDtypes) {
  for (const int t : test_support::divisors_of_world()) {
    std::vector<at::Tensor> tensors{at::empty({4}, at::kComplexFloat)};
    auto shorts = at::empty({4 * t}, at::kShort);
    auto output = at::empty({4}, at::kShort);
    EXPECT_EQ(value_error([&] { mpi(t)->allreduce(tensors, {}); }),
              "all_reduce: dtype ComplexFloat is not supported by the MPI backend (" + where(t) + ")");
    EXPECT_EQ(value_error([&] { mpi(t)->_reduce_scatter_base(output, shorts, {}); }),
              "reduce_scatter: dtype Short is not supported by the MPI backend (" + where(t) + ")");
    // Two dtypes that it has, of the same width.
    auto floats = at::empty({4}, at::kFloat);
    auto ints = at::empty({4 * t}, at::kInt);
    EXPECT_TRUE(contains(value_error([&] { mpi(t)->_allgather_base(ints, floats, {}); }), "all_gather: output"));
    EXPECT_TRUE(contains(value_error([&] { mpi(t)->_reduce_scatter_base(floats, ints, {}); }), "reduce_scatter: "));
    std::vector<int64_t> splits;
    EXPECT_TRUE(contains(value_error([&] {
                           auto received = at::empty({4 * t}, at::kFloat);
                           mpi(t)->alltoall_base(received, ints, splits, splits, {});
                         }),
                         "all_to_all: "));
    std::vector<at::Tensor> inputs{floats};
    std::vector<std::vector<at::Tensor>> outputs{
        std::vector<at::Tensor>(static_cast<size_t>(t), at::empty({4}, at::kInt))};
    EXPECT_TRUE(contains(value_error([&] { mpi(t)->allgather(outputs, inputs, {}); }), "all_gather: "));
  }
}

TEST(MpiBackend, RefusesSizesThatDoNotFitTheGroup) {
  for (const int t : test_support::divisors_of_world()) {
    const auto group = where(t);
    auto large = at::empty({4 * t + 1});
    auto small = at::empty({4});
    EXPECT_TRUE(contains(value_error([&] { mpi(t)->_allgather_base(large, small, {}); }), group));
    EXPECT_TRUE(contains(value_error([&] { mpi(t)->_reduce_scatter_base(small, large, {}); }), group));
    std::vector<int64_t> equal_splits;
    std::vector<int64_t> too_few(static_cast<size_t>(t), 1);
    std::vector<int64_t> one_too_many(static_cast<size_t>(t + 1), 0);
    auto four = at::empty({4 * t});
    EXPECT_TRUE(contains(value_error([&] { mpi(t)->alltoall_base(four, four, equal_splits, too_few, {}); }),
                         "input splits of together " + std::to_string(t) + " rows for " + std::to_string(4 * t)));
    EXPECT_TRUE(contains(value_error([&] { mpi(t)->alltoall_base(four, four, one_too_many, equal_splits, {}); }),
                         std::to_string(t + 1) + " output splits"));
    if (t > 1) {
      EXPECT_TRUE(contains(value_error([&] { mpi(t)->alltoall_base(large, large, equal_splits, equal_splits, {}); }),
                           "rows are not divisible by " + group));
    }
    std::vector<at::Tensor> inputs{small};
    std::vector<std::vector<at::Tensor>> outputs{std::vector<at::Tensor>(static_cast<size_t>(t + 1), small)};
    EXPECT_TRUE(contains(value_error([&] { mpi(t)->allgather(outputs, inputs, {}); }), "output tensors for " + group));
    outputs = {std::vector<at::Tensor>(static_cast<size_t>(t), at::empty({3}))};
    EXPECT_TRUE(contains(value_error([&] { mpi(t)->allgather(outputs, inputs, {}); }),
                         "this rank's output has 3 elements, its input 4"));
    std::vector<at::Tensor> tensors{small};
    c10d::AllreduceOptions options;
    options.reduceOp = c10d::ReduceOp::BXOR;
    if (t > 1) {
      EXPECT_TRUE(contains(value_error([&] { mpi(t)->allreduce(tensors, options); }), "reduction"));
    }
  }
}

namespace {

/// What the MPI backend says when the last rank doesn't come to `operation`, on the others. The last rank comes when
/// they have given up, so that no request is open when the communicator is freed; the group isn't used after that.
std::string timed_out(const std::function<void(MpiBackend&)>& operation) {
  const auto backend = c10::make_intrusive<MpiBackend>(runtime().world().split(0), "impatient",
                                                       MpiBackendOptions{.timeout = std::chrono::milliseconds(300)});
  const bool late = backend->getRank() == backend->getSize() - 1;
  std::string message = "nothing thrown";
  const auto attempt = [&] {
    try {
      operation(*backend);
    } catch (const c10::DistBackendError& error) {
      message = error.what_without_backtrace();
    }
  };
  if (!late) attempt();
  barrier(test_support::world_tp());
  if (late) attempt();
  barrier(test_support::world_tp());
  return message;
}

void expect_timed_out(const std::string& message, const std::string& operation) {
  const int r = runtime().rank();
  const int t = runtime().size();
  if (r == t - 1) {
    EXPECT_EQ(message, "nothing thrown") << "the others had come";
  } else {
    EXPECT_EQ(message.find(operation + " timed out after 300 ms (group impatient, rank " + std::to_string(r) + " of " +
                           std::to_string(t) + "): rank "),
              0U)
        << message;
    EXPECT_NE(message.find(" isn't there: in barrier number "), std::string::npos) << message;
  }
}

}  // namespace

TEST(MpiBackend, ARankThatDoesNotComeBecomesAnError) {
  expect_timed_out(timed_out([](MpiBackend& backend) {
                     std::vector<at::Tensor> tensors{at::ones({3})};
                     backend.allreduce(tensors, {});
                   }),
                   "all_reduce of 3 elements");
  expect_timed_out(timed_out([](MpiBackend& backend) {
                     auto input = at::ones({2, 2});
                     auto output = at::empty({2 * backend.getSize(), 2});
                     backend._allgather_base(output, input, {});
                   }),
                   "all_gather of 4 elements");
  expect_timed_out(timed_out([](MpiBackend& backend) { backend.barrier({}); }), "barrier of 0 elements");
}

TEST(MpiBackend, ACallsOwnTimeoutGoesBeforeTheGroups) {
  expect_timed_out(timed_out([](MpiBackend& backend) {
                     backend.setTimeout(std::chrono::minutes(10));
                     std::vector<at::Tensor> tensors{at::ones({5})};
                     c10d::AllreduceOptions options;
                     options.timeout = std::chrono::milliseconds(300);
                     backend.allreduce(tensors, options);
                   }),
                   "all_reduce of 5 elements");
}

}  // namespace megatron_cpp::parallel
