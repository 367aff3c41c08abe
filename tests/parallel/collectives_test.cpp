// Collectives on every dtype, size and stride, against what all ranks give to them.
#include "parallel/collectives.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/parallel/rank_values.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::parallel {

using namespace rank_values;
using namespace test_support;

TEST(AllReduce, EveryDtypeAndReduction) {
  for (const int t : test_support::divisors_of_world()) {
    for (const auto dtype : kDtypes) {
      for (const auto reduction : {Reduction::kSum, Reduction::kMax, Reduction::kMin}) {
        const auto all = of_all(t, {3, 5}, dtype);
        const auto input = on_device(own(t, {3, 5}, dtype));
        EXPECT_TRUE(test_support::equal(all_reduce(input, groups(t).tp, reduction), reduced(all, reduction)))
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
          const auto result = all_reduce(on_device(own(t, {elements}, dtype)), groups(t).tp, reduction);
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
          test_support::equal(all_reduce(input, groups(t).tp), reduced(of_all(t, shape, at::kFloat), Reduction::kSum)));
    }
  }
}

TEST(AllReduce, InPlaceWritesToTheTensorAndNeedsItContiguous) {
  for (const int t : test_support::divisors_of_world()) {
    for (const int64_t rows : {3, 3000}) {
      auto tensor = on_device(own(t, {rows, 2}, at::kFloat)).clone();
      const void* memory = tensor.data_ptr();
      all_reduce_in_place(tensor, groups(t).tp, Reduction::kMax);
      EXPECT_EQ(tensor.data_ptr(), memory);
      EXPECT_TRUE(test_support::equal(tensor, reduced(of_all(t, {rows, 2}, at::kFloat), Reduction::kMax)));
    }
    if (t == 1) continue;
    auto transposed = on_device(at::zeros({2, 3})).t();
    EXPECT_TRUE(contains(value_error([&] { all_reduce_in_place(transposed, groups(t).tp); }),
                         "needs a contiguous tensor, got strides [1, 3]"));
  }
}

TEST(AllReduce, StartedAndWaitedFor) {
  for (const int t : test_support::divisors_of_world()) {
    auto first = start_all_reduce_in_place(on_device(own(t, {4, 3}, at::kFloat)), groups(t).tp);
    auto second = start_all_reduce_in_place(on_device(own(t, {5}, at::kDouble)), groups(t).tp);
    EXPECT_TRUE(test_support::equal(second.wait(), reduced(of_all(t, {5}, at::kDouble), Reduction::kSum)));
    EXPECT_TRUE(test_support::equal(first.wait(), reduced(of_all(t, {4, 3}, at::kFloat), Reduction::kSum)));
  }
}

TEST(AllGather, EveryDtype) {
  for (const int t : test_support::divisors_of_world()) {
    for (const auto dtype : kDtypes) {
      const auto all = of_all(t, {3, 5}, dtype);
      const auto input = on_device(own(t, {3, 5}, dtype));
      EXPECT_TRUE(test_support::equal(all_gather(input, groups(t).tp), at::cat(all, 0))) << dtype;
      EXPECT_TRUE(test_support::equal(all_gather_last_dim(input, groups(t).tp), at::cat(all, -1))) << dtype;
    }
  }
}

TEST(AllGather, InPlaceSendsTheOwnRowsOfTheTensor) {
  for (const int t : test_support::divisors_of_world()) {
    for (const auto dtype : kDtypes) {
      const auto all = at::cat(of_all(t, {3, 5}, dtype), 0);
      const auto tensor = on_device(at::zeros_like(all));
      tensor.narrow(0, 3 * groups(t).tp->getRank(), 3).copy_(own(t, {3, 5}, dtype));
      const void* memory = tensor.data_ptr();
      auto pending = start_all_gather_in_place(tensor, groups(t).tp);
      EXPECT_EQ(pending.wait().data_ptr(), memory);
      EXPECT_TRUE(test_support::equal(tensor, all)) << dtype;
    }
    if (t == 1) continue;
    EXPECT_TRUE(contains(value_error([&] { start_all_gather_in_place(at::zeros({2 * t + 1}), groups(t).tp); }),
                         "all_gather: number of rows"));
    EXPECT_TRUE(contains(value_error([&] {
                           start_all_gather_in_place(at::zeros({t, t}).t(), groups(t).tp);
                         }),
                         "all_gather in place needs a contiguous tensor"));
  }
}

TEST(AllGather, TakesAnyShapeAndStrides) {
  for (const int t : test_support::divisors_of_world()) {
    for (const auto& shape : std::vector<std::vector<int64_t>>{{3, 5, 2}, {2, 3000}, {0, 4}, {4, 0, 3}, {7}}) {
      const auto all = of_all(t, shape, at::kFloat);
      const auto input = on_device(transposed_storage(own(t, shape, at::kFloat)));
      EXPECT_TRUE(test_support::equal(all_gather(input, groups(t).tp), at::cat(all, 0))) << shape;
      EXPECT_TRUE(test_support::equal(all_gather_last_dim(input, groups(t).tp), at::cat(all, -1))) << shape;
      EXPECT_TRUE(test_support::equal(start_all_gather(input, groups(t).tp).wait(), at::cat(all, 0))) << shape;
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
        EXPECT_TRUE(test_support::equal(all_gather_uneven(input, rows, groups(t).tp), at::cat(parts))) << dtype;
      }
    }
    if (t == 1) continue;
    const std::vector<int64_t> rows(static_cast<size_t>(t), 2);
    EXPECT_TRUE(contains(value_error([&] {
                           all_gather_uneven(at::zeros({3, 1}), rows, groups(t).tp);
                         }),
                         "[3, 1] does not have this rank's rows of [2, 2"));
  }
}

TEST(ReduceScatter, InPlaceLeavesTheSumInTheOwnRows) {
  for (const int t : test_support::divisors_of_world()) {
    for (const int64_t rows : {1, 3000}) {  // by messages, and through the host's shared memory
      const auto tensor = on_device(own(t, {t * rows, 5}, at::kFloat)).clone();
      const void* memory = tensor.data_ptr();
      auto pending = start_reduce_scatter_in_place(tensor, groups(t).tp);
      EXPECT_EQ(pending.wait().data_ptr(), memory);
      const auto sum = reduced(of_all(t, {t * rows, 5}, at::kFloat), Reduction::kSum);
      const int64_t first = rows * groups(t).tp->getRank();
      EXPECT_TRUE(test_support::equal(tensor.narrow(0, first, rows), sum.narrow(0, first, rows))) << rows;
    }
  }
}

TEST(ReduceScatter, EveryDtype) {
  for (const int t : test_support::divisors_of_world()) {
    const int r = groups(t).tp->getRank();
    for (const auto dtype : kDtypes) {
      const auto sum = reduced(of_all(t, {3 * t, 2 * t}, dtype), Reduction::kSum);
      const auto input = on_device(own(t, {3 * t, 2 * t}, dtype));
      EXPECT_TRUE(test_support::equal(reduce_scatter(input, groups(t).tp), sum.narrow(0, 3 * r, 3))) << dtype;
      EXPECT_TRUE(test_support::equal(reduce_scatter_last_dim(input, groups(t).tp), sum.narrow(1, 2 * r, 2))) << dtype;
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
      EXPECT_TRUE(test_support::equal(reduce_scatter(input, groups(t).tp), rows)) << shape;
      EXPECT_TRUE(test_support::equal(reduce_scatter_last_dim(input, groups(t).tp), columns)) << shape;
      EXPECT_TRUE(test_support::equal(start_reduce_scatter(input, groups(t).tp).wait(), rows)) << shape;
    }
  }
}

TEST(ReduceScatter, RefusesWhatDoesNotDivide) {
  for (const int t : test_support::divisors_of_world()) {
    if (t == 1) continue;
    const auto input = on_device(at::zeros({t + 1, 2 * t - 1}));
    const std::string divisor = "is not divisible by group size " + std::to_string(t);
    EXPECT_EQ(value_error([&] { reduce_scatter(input, groups(t).tp); }),
              "reduce_scatter: number of rows " + std::to_string(t + 1) + " " + divisor);
    EXPECT_EQ(value_error([&] { reduce_scatter_last_dim(input, groups(t).tp); }),
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
      EXPECT_TRUE(test_support::equal(all_to_all(input, {}, {}, groups(t).tp), at::cat(expected, 0))) << dtype;
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
    const auto input = on_device(values({rows, 3, 2}, groups(t).world->getRank(), at::kFloat));
    const auto result = all_to_all(input, output_splits, input_splits, groups(t).tp);
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
        EXPECT_TRUE(test_support::equal(broadcast(input, root, groups(t).tp), all[static_cast<size_t>(root)])) << dtype;
        EXPECT_TRUE(test_support::equal(input, own(t, {3, 5}, dtype))) << "the input was written to";
      }
    }
    EXPECT_EQ(broadcast(on_device(at::zeros({0, 2})), t - 1, groups(t).tp).numel(), 0);
  }
}

TEST(Collectives, OfOneRankReturnTheirInput) {
  const auto& group = test_support::single();
  const auto input = on_device(own(1, {3, 4}, at::kFloat)).t();
  for (const auto& result :
       {all_reduce(input, group), all_reduce(input, group, Reduction::kMin),
        start_all_reduce_in_place(input, group).wait(), all_gather(input, group), start_all_gather(input, group).wait(),
        all_gather_last_dim(input, group), reduce_scatter(input, group), start_reduce_scatter(input, group).wait(),
        reduce_scatter_last_dim(input, group), all_to_all(input, {}, {}, group), broadcast(input, 0, group)}) {
    EXPECT_TRUE(result.is_alias_of(input));
    EXPECT_TRUE(test_support::equal(result, input));
  }
  EXPECT_NO_THROW(barrier(group));
}

// Below and above the size from which reductions go through shared memory.
TEST(Collectives, HaveNoGradientEvenIfTheirInputNeedsOne) {
  for (const int t : test_support::divisors_of_world()) {
    const auto& group = groups(t).tp;
    for (const int64_t rows : {4, 1 << 14}) {
      const auto leaf = on_device(at::ones({rows, 2})).requires_grad_(true);
      for (const auto& input : {leaf, leaf * 2}) {
        for (const auto& result :
             {all_reduce(input, group), all_gather(input, group), all_gather_last_dim(input, group),
              reduce_scatter(input, group), reduce_scatter_last_dim(at::cat({input, input}, -1), group),
              all_to_all(input, {}, {}, group), broadcast(input, 0, group)}) {
          EXPECT_FALSE(result.requires_grad());
        }
      }
      EXPECT_TRUE(test_support::equal(all_reduce(leaf, group), on_device(at::full({rows, 2}, double(t)))));
    }
  }
}

TEST(Collectives, RefuseTensorsWithoutDimensions) {
  for (const int t : test_support::divisors_of_world()) {
    if (t == 1) continue;
    const auto scalar = on_device(at::ones({}));
    EXPECT_TRUE(contains(value_error([&] { all_gather(scalar, groups(t).tp); }), "without dimensions"));
    EXPECT_TRUE(contains(value_error([&] { reduce_scatter(scalar, groups(t).tp); }), "without dimensions"));
    EXPECT_TRUE(contains(value_error([&] { all_to_all(scalar, {}, {}, groups(t).tp); }), "without dimensions"));
    EXPECT_EQ(all_reduce(scalar, groups(t).tp).item<float>(), static_cast<float>(t));
  }
}

}  // namespace megatron_cpp::parallel
