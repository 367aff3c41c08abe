// Collectives on every dtype and size, and the MPI backend behind them.
#include "parallel/collectives.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <functional>
#include <string>
#include <vector>

#include "parallel/mpi_backend.h"
#include "parallel/shard.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace {

using parallel::GroupPtr;
using parallel::Reduction;
using test_support::contains;
using test_support::groups;
using test_support::on_device;
using test_support::runtime;
using test_support::value_error;

constexpr std::array kDtypes = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf,
                                at::kLong,  at::kInt,    at::kByte,     at::kBool};

/// Small whole numbers that differ by world rank and by element: sums over a few ranks are exact in every dtype.
at::Tensor values(at::IntArrayRef shape, int world_rank, at::ScalarType dtype) {
  int64_t elements = 1;
  for (const int64_t size : shape) elements *= size;
  const auto index = at::arange(elements, at::kLong);
  auto numbers = (index * 7 + index.floor_divide(31) * 3 + world_rank * 13 + 1).remainder(31);
  if (dtype == at::kBool) numbers = numbers.remainder(3).eq(0);
  return numbers.to(dtype).view(shape);
}

/// The world ranks of this rank's tensor-parallel group of size t.
std::vector<int> peers(int t) { return groups(t).grid.group_of(runtime().rank(), "tp"); }

/// What each rank of the group has, in the order of the ranks.
std::vector<at::Tensor> of_all(int t, at::IntArrayRef shape, at::ScalarType dtype) {
  std::vector<at::Tensor> all;
  for (const int peer : peers(t)) all.push_back(values(shape, peer, dtype));
  return all;
}

at::Tensor own(int t, at::IntArrayRef shape, at::ScalarType dtype) {
  return of_all(t, shape, dtype)[static_cast<size_t>(groups(t).tp->getRank())];
}

at::Tensor reduced(const std::vector<at::Tensor>& all, Reduction reduction) {
  const auto dtype = all.front().scalar_type();
  const auto stacked = at::stack(all).to(at::kDouble);
  switch (reduction) {
    case Reduction::kSum:
      return stacked.sum(0).to(dtype);
    case Reduction::kMax:
      return stacked.amax(0).to(dtype);
    case Reduction::kMin:
      return stacked.amin(0).to(dtype);
  }
  return {};
}

/// The same values in memory of another order: transposed twice.
at::Tensor transposed_storage(const at::Tensor& tensor) {
  return tensor.transpose(0, -1).contiguous().transpose(0, -1);
}

/// A strided tensor of this shape, every second element of its last dimension's memory.
at::Tensor strided_like(const at::Tensor& tensor) {
  auto shape = tensor.sizes().vec();
  shape.back() *= 2;
  return at::zeros(shape, tensor.options()).slice(-1, 0, shape.back(), 2);
}

/// The MPI backend of the whole world, for what collectives.h has no function for.
c10::intrusive_ptr<c10d::Backend> mpi(int t) { return groups(t).tp->getBackend(c10::DeviceType::CPU); }

}  // namespace

TEST(AllReduce, EveryDtypeAndReduction) {
  for (const int t : test_support::divisors_of_world()) {
    for (const auto dtype : kDtypes) {
      for (const auto reduction : {Reduction::kSum, Reduction::kMax, Reduction::kMin}) {
        const auto all = of_all(t, {3, 5}, dtype);
        const auto input = on_device(own(t, {3, 5}, dtype));
        EXPECT_TRUE(test_support::equal(parallel::all_reduce(input, groups(t).tp, reduction), reduced(all, reduction)))
            << dtype << " over " << t << ", reduction " << static_cast<int>(reduction);
        EXPECT_TRUE(test_support::equal(input, own(t, {3, 5}, dtype))) << "the input was written to";
      }
    }
  }
}

// 16 KiB is where the MPI backend goes from one message to two; then a rank reduces ceil(n / t) elements, the last
// ranks fewer or none.
TEST(AllReduce, EverySizeAroundTheSwitch) {
  for (const int t : test_support::divisors_of_world()) {
    for (const auto dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kByte}) {
      const int64_t limit = (1 << 14) / static_cast<int64_t>(at::elementSize(dtype));
      for (const int64_t elements :
           {int64_t{0}, int64_t{1}, int64_t{7}, limit - 1, limit, limit + 1, limit + 2, limit + 3, 2 * limit + 5}) {
        for (const auto reduction : {Reduction::kSum, Reduction::kMin}) {
          const auto result = parallel::all_reduce(on_device(own(t, {elements}, dtype)), groups(t).tp, reduction);
          EXPECT_TRUE(test_support::equal(result, reduced(of_all(t, {elements}, dtype), reduction)))
              << elements << " of " << dtype << " over " << t;
        }
      }
    }
  }
}

TEST(AllReduce, TakesAnyStrides) {
  for (const int t : test_support::divisors_of_world()) {
    for (const auto& shape : std::vector<std::vector<int64_t>>{{3, 5, 2}, {61, 7, 13}}) {
      const auto input = on_device(transposed_storage(own(t, shape, at::kFloat)));
      EXPECT_FALSE(input.is_contiguous());
      EXPECT_TRUE(
          equal(parallel::all_reduce(input, groups(t).tp), reduced(of_all(t, shape, at::kFloat), Reduction::kSum)));
    }
  }
}

TEST(AllReduce, InPlaceWritesToTheTensorAndNeedsItContiguous) {
  for (const int t : test_support::divisors_of_world()) {
    for (const int64_t rows : {3, 3000}) {
      auto tensor = on_device(own(t, {rows, 2}, at::kFloat)).clone();
      const void* memory = tensor.data_ptr();
      parallel::all_reduce_in_place(tensor, groups(t).tp, Reduction::kMax);
      EXPECT_EQ(tensor.data_ptr(), memory);
      EXPECT_TRUE(test_support::equal(tensor, reduced(of_all(t, {rows, 2}, at::kFloat), Reduction::kMax)));
    }
    if (t == 1) continue;
    auto transposed = on_device(at::zeros({2, 3})).t();
    EXPECT_TRUE(contains(value_error([&] { parallel::all_reduce_in_place(transposed, groups(t).tp); }),
                         "needs a contiguous tensor, got strides [1, 3]"));
  }
}

TEST(AllReduce, StartedAndWaitedFor) {
  for (const int t : test_support::divisors_of_world()) {
    auto first = parallel::start_all_reduce_in_place(on_device(own(t, {4, 3}, at::kFloat)), groups(t).tp);
    auto second = parallel::start_all_reduce_in_place(on_device(own(t, {5}, at::kDouble)), groups(t).tp);
    EXPECT_TRUE(test_support::equal(second.wait(), reduced(of_all(t, {5}, at::kDouble), Reduction::kSum)));
    EXPECT_TRUE(test_support::equal(first.wait(), reduced(of_all(t, {4, 3}, at::kFloat), Reduction::kSum)));
  }
}

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
        EXPECT_TRUE(test_support::equal(parallel::all_reduce(input, groups(t).tp), expected))
            << dtype << ", " << elements;
        EXPECT_TRUE(
            test_support::equal(parallel::reduce_scatter(input, groups(t).tp), expected.narrow(0, 0, elements / t)))
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
      EXPECT_TRUE(test_support::equal(parallel::all_reduce(input, groups(t).tp), expected))
          << elements << " over " << t;
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

TEST(AllGather, EveryDtype) {
  for (const int t : test_support::divisors_of_world()) {
    for (const auto dtype : kDtypes) {
      const auto all = of_all(t, {3, 5}, dtype);
      const auto input = on_device(own(t, {3, 5}, dtype));
      EXPECT_TRUE(test_support::equal(parallel::all_gather(input, groups(t).tp), at::cat(all, 0))) << dtype;
      EXPECT_TRUE(test_support::equal(parallel::all_gather_last_dim(input, groups(t).tp), at::cat(all, -1))) << dtype;
    }
  }
}

TEST(AllGather, TakesAnyShapeAndStrides) {
  for (const int t : test_support::divisors_of_world()) {
    for (const auto& shape : std::vector<std::vector<int64_t>>{{3, 5, 2}, {2, 3000}, {0, 4}, {4, 0, 3}, {7}}) {
      const auto all = of_all(t, shape, at::kFloat);
      const auto input = on_device(transposed_storage(own(t, shape, at::kFloat)));
      EXPECT_TRUE(test_support::equal(parallel::all_gather(input, groups(t).tp), at::cat(all, 0))) << shape;
      EXPECT_TRUE(test_support::equal(parallel::all_gather_last_dim(input, groups(t).tp), at::cat(all, -1))) << shape;
      EXPECT_TRUE(test_support::equal(parallel::start_all_gather(input, groups(t).tp).wait(), at::cat(all, 0)))
          << shape;
    }
  }
}

TEST(AllGather, OfUnevenShares) {
  for (const int t : test_support::divisors_of_world()) {
    const auto rank = static_cast<size_t>(groups(t).tp->getRank());
    for (const auto dtype : kDtypes) {
      for (const int64_t offset : {int64_t{0}, int64_t{1}}) {  // with and without a rank that has no rows
        std::vector<int64_t> rows;
        std::vector<at::Tensor> parts;
        const auto all = of_all(t, {t + 1, 3}, dtype);
        for (int64_t r = 0; r < t; ++r) {
          rows.push_back(r + offset);
          parts.push_back(all[static_cast<size_t>(r)].narrow(0, 0, r + offset));
        }
        const auto input = on_device(transposed_storage(parts[rank]));
        EXPECT_TRUE(test_support::equal(parallel::all_gather_uneven(input, rows, groups(t).tp), at::cat(parts)))
            << dtype;
      }
    }
    if (t == 1) continue;
    const std::vector<int64_t> rows(static_cast<size_t>(t), 2);
    EXPECT_TRUE(contains(value_error([&] {
                           parallel::all_gather_uneven(at::zeros({3, 1}), rows, groups(t).tp);
                         }),
                         "[3, 1] does not have this rank's rows of [2, 2"));
  }
}

TEST(ReduceScatter, EveryDtype) {
  for (const int t : test_support::divisors_of_world()) {
    const int r = groups(t).tp->getRank();
    for (const auto dtype : kDtypes) {
      const auto sum = reduced(of_all(t, {3 * t, 2 * t}, dtype), Reduction::kSum);
      const auto input = on_device(own(t, {3 * t, 2 * t}, dtype));
      EXPECT_TRUE(test_support::equal(parallel::reduce_scatter(input, groups(t).tp), sum.narrow(0, 3 * r, 3))) << dtype;
      EXPECT_TRUE(test_support::equal(parallel::reduce_scatter_last_dim(input, groups(t).tp), sum.narrow(1, 2 * r, 2)))
          << dtype;
    }
  }
}

TEST(ReduceScatter, TakesAnyShapeAndStrides) {
  for (const int t : test_support::divisors_of_world()) {
    const int r = groups(t).tp->getRank();
    for (const auto& shape :
         std::vector<std::vector<int64_t>>{{t, 5, 2 * t}, {2 * t, 3000 * t}, {0, t}, {t, 0, 3 * t}, {5 * t}}) {
      const auto sum = reduced(of_all(t, shape, at::kFloat), Reduction::kSum);
      const auto input = on_device(transposed_storage(own(t, shape, at::kFloat)));
      const auto rows = sum.chunk(t, 0)[shape[0] == 0 ? 0U : static_cast<size_t>(r)];
      const auto columns = sum.chunk(t, -1)[static_cast<size_t>(r)];
      EXPECT_TRUE(test_support::equal(parallel::reduce_scatter(input, groups(t).tp), rows)) << shape;
      EXPECT_TRUE(test_support::equal(parallel::reduce_scatter_last_dim(input, groups(t).tp), columns)) << shape;
      EXPECT_TRUE(test_support::equal(parallel::start_reduce_scatter(input, groups(t).tp).wait(), rows)) << shape;
    }
  }
}

TEST(ReduceScatter, RefusesWhatDoesNotDivide) {
  for (const int t : test_support::divisors_of_world()) {
    if (t == 1) continue;
    const auto input = on_device(at::zeros({t + 1, 2 * t - 1}));
    const std::string divisor = "is not divisible by group size " + std::to_string(t);
    EXPECT_EQ(value_error([&] { parallel::reduce_scatter(input, groups(t).tp); }),
              "reduce_scatter: number of rows " + std::to_string(t + 1) + " " + divisor);
    EXPECT_EQ(value_error([&] { parallel::reduce_scatter_last_dim(input, groups(t).tp); }),
              "reduce_scatter_last_dim: number of columns " + std::to_string(2 * t - 1) + " " + divisor);
  }
}

TEST(AllToAll, EqualSplitsOfEveryDtype) {
  for (const int t : test_support::divisors_of_world()) {
    const int r = groups(t).tp->getRank();
    for (const auto dtype : kDtypes) {
      std::vector<at::Tensor> expected;
      for (const auto& theirs : of_all(t, {2 * t, 3}, dtype)) expected.push_back(theirs.narrow(0, 2 * r, 2));
      const auto input = on_device(transposed_storage(own(t, {2 * t, 3}, dtype)));
      EXPECT_TRUE(test_support::equal(parallel::all_to_all(input, {}, {}, groups(t).tp), at::cat(expected, 0)))
          << dtype;
    }
  }
}

// Rank p sends (2p + q) % 3 rows to rank q: nothing to some, to itself too.
TEST(AllToAll, UnevenSplits) {
  const auto num_rows = [](int from, int to) -> int64_t { return (2 * from + to) % 3; };
  for (const int t : test_support::divisors_of_world()) {
    const int r = groups(t).tp->getRank();
    std::vector<int64_t> input_splits;
    std::vector<int64_t> output_splits;
    std::vector<at::Tensor> expected;
    int64_t rows = 0;
    for (int q = 0; q < t; ++q) {
      input_splits.push_back(num_rows(r, q));
      output_splits.push_back(num_rows(q, r));
      rows += num_rows(r, q);
      int64_t rows_of_q = 0;
      int64_t begin = 0;
      for (int to = 0; to < t; ++to) {
        if (to == r) begin = rows_of_q;
        rows_of_q += num_rows(q, to);
      }
      const auto theirs = values({rows_of_q, 3, 2}, peers(t)[static_cast<size_t>(q)], at::kFloat);
      expected.push_back(theirs.narrow(0, begin, num_rows(q, r)));
    }
    const auto input = on_device(values({rows, 3, 2}, runtime().rank(), at::kFloat));
    const auto result = parallel::all_to_all(input, output_splits, input_splits, groups(t).tp);
    if (t > 1) {
      EXPECT_TRUE(test_support::equal(result, at::cat(expected, 0)));
    } else {
      EXPECT_TRUE(test_support::equal(result, input));
    }
  }
}

TEST(Broadcast, EveryDtypeFromEveryRoot) {
  for (const int t : test_support::divisors_of_world()) {
    for (const auto dtype : kDtypes) {
      for (int root = 0; root < t; ++root) {
        const auto all = of_all(t, {3, 5}, dtype);
        const auto input = on_device(transposed_storage(own(t, {3, 5}, dtype)));
        EXPECT_TRUE(test_support::equal(parallel::broadcast(input, root, groups(t).tp), all[static_cast<size_t>(root)]))
            << dtype;
        EXPECT_TRUE(test_support::equal(input, own(t, {3, 5}, dtype))) << "the input was written to";
      }
    }
    EXPECT_EQ(parallel::broadcast(on_device(at::zeros({0, 2})), t - 1, groups(t).tp).numel(), 0);
  }
}

TEST(Collectives, OfOneRankReturnTheirInput) {
  const auto& group = test_support::single();
  const auto input = on_device(own(1, {3, 4}, at::kFloat)).t();
  for (const auto& result :
       {parallel::all_reduce(input, group), parallel::all_reduce(input, group, Reduction::kMin),
        parallel::start_all_reduce_in_place(input, group).wait(), parallel::all_gather(input, group),
        parallel::start_all_gather(input, group).wait(), parallel::all_gather_last_dim(input, group),
        parallel::reduce_scatter(input, group), parallel::start_reduce_scatter(input, group).wait(),
        parallel::reduce_scatter_last_dim(input, group), parallel::all_to_all(input, {}, {}, group),
        parallel::broadcast(input, 0, group)}) {
    EXPECT_TRUE(result.is_same(input));
  }
  EXPECT_NO_THROW(parallel::barrier(group));
}

TEST(Collectives, RefuseTensorsWithoutDimensions) {
  for (const int t : test_support::divisors_of_world()) {
    if (t == 1) continue;
    const auto scalar = on_device(at::ones({}));
    EXPECT_TRUE(contains(value_error([&] { parallel::all_gather(scalar, groups(t).tp); }), "without dimensions"));
    EXPECT_TRUE(contains(value_error([&] { parallel::reduce_scatter(scalar, groups(t).tp); }), "without dimensions"));
    EXPECT_TRUE(
        contains(value_error([&] { parallel::all_to_all(scalar, {}, {}, groups(t).tp); }), "without dimensions"));
    EXPECT_EQ(parallel::all_reduce(scalar, groups(t).tp).item<float>(), static_cast<float>(t));
  }
}

TEST(MpiBackend, FillsStridedOutputs) {
  for (const int t : test_support::divisors_of_world()) {
    const int r = groups(t).tp->getRank();
    const auto all = of_all(t, {2 * t, 3}, at::kFloat);
    const auto sum = reduced(all, Reduction::kSum);
    auto input = transposed_storage(own(t, {2 * t, 3}, at::kFloat));

    auto gathered = strided_like(at::cat(all, 0));
    mpi(t)->all_gather_single(gathered, input, {})->wait();
    EXPECT_TRUE(test_support::equal(gathered, at::cat(all, 0)));

    auto scattered = strided_like(sum.narrow(0, 2 * r, 2));
    mpi(t)->reduce_scatter_single(scattered, input, {})->wait();
    EXPECT_TRUE(test_support::equal(scattered, sum.narrow(0, 2 * r, 2)));

    std::vector<at::Tensor> received;
    for (const auto& theirs : all) received.push_back(theirs.narrow(0, 2 * r, 2));
    auto exchanged = strided_like(input);
    std::vector<int64_t> equal_splits;
    mpi(t)->all_to_all_single(exchanged, input, equal_splits, equal_splits, {})->wait();
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
    EXPECT_NO_THROW(mpi(t)->all_gather_single(none, none, {})->wait());
    EXPECT_NO_THROW(mpi(t)->reduce_scatter_single(none, none, {})->wait());
    EXPECT_NO_THROW(mpi(t)->all_to_all_single(none, none, splits, splits, {})->wait());
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
              "all_reduce: the MPI backend takes tensors on the CPU, got meta");
    EXPECT_TRUE(contains(value_error([&] { mpi(t)->broadcast(tensors, {}); }), "broadcast: the MPI backend"));
    EXPECT_TRUE(contains(value_error([&] { mpi(t)->all_gather_single(here, elsewhere, {}); }), "all_gather: "));
    EXPECT_TRUE(contains(value_error([&] { mpi(t)->reduce_scatter_single(elsewhere, here, {}); }), "got meta"));
    EXPECT_TRUE(contains(value_error([&] { mpi(t)->all_to_all_single(here, undefined, splits, splits, {}); }),
                         "all_to_all: the MPI backend takes tensors on the CPU, got an undefined one"));
  }
}

TEST(MpiBackend, RefusesOtherDtypes) {
  for (const int t : test_support::divisors_of_world()) {
    std::vector<at::Tensor> tensors{at::empty({4}, at::kComplexFloat)};
    auto shorts = at::empty({4 * t}, at::kShort);
    auto output = at::empty({4}, at::kShort);
    EXPECT_EQ(value_error([&] { mpi(t)->allreduce(tensors, {}); }),
              "all_reduce: dtype ComplexFloat is not supported by the MPI backend");
    EXPECT_EQ(value_error([&] { mpi(t)->reduce_scatter_single(output, shorts, {}); }),
              "reduce_scatter: dtype Short is not supported by the MPI backend");
    // Two dtypes that it has, of the same width.
    auto floats = at::empty({4}, at::kFloat);
    auto ints = at::empty({4 * t}, at::kInt);
    EXPECT_TRUE(contains(value_error([&] { mpi(t)->all_gather_single(ints, floats, {}); }), "all_gather: output"));
    EXPECT_TRUE(contains(value_error([&] { mpi(t)->reduce_scatter_single(floats, ints, {}); }), "reduce_scatter: "));
    std::vector<int64_t> splits;
    EXPECT_TRUE(contains(value_error([&] {
                           auto received = at::empty({4 * t}, at::kFloat);
                           mpi(t)->all_to_all_single(received, ints, splits, splits, {});
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
    const std::string group = "group tp, rank " + std::to_string(groups(t).tp->getRank()) + " of " + std::to_string(t);
    auto large = at::empty({4 * t + 1});
    auto small = at::empty({4});
    EXPECT_TRUE(contains(value_error([&] { mpi(t)->all_gather_single(large, small, {}); }), group));
    EXPECT_TRUE(contains(value_error([&] { mpi(t)->reduce_scatter_single(small, large, {}); }), group));
    std::vector<int64_t> equal_splits;
    std::vector<int64_t> too_few(static_cast<size_t>(t), 1);
    std::vector<int64_t> one_too_many(static_cast<size_t>(t + 1), 0);
    auto four = at::empty({4 * t});
    EXPECT_TRUE(contains(value_error([&] { mpi(t)->all_to_all_single(four, four, equal_splits, too_few, {}); }),
                         "input splits of together " + std::to_string(t) + " rows for " + std::to_string(4 * t)));
    EXPECT_TRUE(contains(value_error([&] { mpi(t)->all_to_all_single(four, four, one_too_many, equal_splits, {}); }),
                         std::to_string(t + 1) + " output splits"));
    if (t > 1) {
      EXPECT_TRUE(
          contains(value_error([&] { mpi(t)->all_to_all_single(large, large, equal_splits, equal_splits, {}); }),
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
std::string timed_out(const std::function<void(parallel::MpiBackend&)>& operation) {
  const auto backend = c10::make_intrusive<parallel::MpiBackend>(
      runtime().world().split(0), "impatient", parallel::MpiBackendOptions{.timeout = std::chrono::milliseconds(300)});
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
  parallel::barrier(test_support::world_tp());
  if (late) attempt();
  parallel::barrier(test_support::world_tp());
  return message;
}

void expect_timed_out(const std::string& message, const std::string& operation) {
  const int r = runtime().rank();
  const int t = runtime().size();
  if (r == t - 1) {
    EXPECT_EQ(message, "nothing thrown") << "the others had come";
  } else {
    EXPECT_EQ(message, operation + " timed out after 300 ms (group impatient, rank " + std::to_string(r) + " of " +
                           std::to_string(t) + "): rank " + std::to_string(t - 1) + " is silent");
  }
}

}  // namespace

TEST(MpiBackend, ARankThatDoesNotComeBecomesAnError) {
  expect_timed_out(timed_out([](parallel::MpiBackend& backend) {
                     std::vector<at::Tensor> tensors{at::ones({3})};
                     backend.allreduce(tensors, {});
                   }),
                   "all_reduce of 3 elements");
  expect_timed_out(timed_out([](parallel::MpiBackend& backend) {
                     auto input = at::ones({2, 2});
                     auto output = at::empty({2 * backend.getSize(), 2});
                     backend.all_gather_single(output, input, {});
                   }),
                   "all_gather of 4 elements");
  expect_timed_out(timed_out([](parallel::MpiBackend& backend) { backend.barrier({}); }), "barrier of 0 elements");
}

TEST(MpiBackend, ACallsOwnTimeoutGoesBeforeTheGroups) {
  expect_timed_out(timed_out([](parallel::MpiBackend& backend) {
                     backend.setTimeout(std::chrono::minutes(10));
                     std::vector<at::Tensor> tensors{at::ones({5})};
                     c10d::AllreduceOptions options;
                     options.timeout = std::chrono::milliseconds(300);
                     backend.allreduce(tensors, options);
                   }),
                   "all_reduce of 5 elements");
}
