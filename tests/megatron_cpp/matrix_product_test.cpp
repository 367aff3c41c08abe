// Products and the moving of rows that layers are made of, against plain LibTorch.
#include "megatron_cpp/tensor_parallel/matrix_product.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <vector>

#include "megatron_cpp/tensor_parallel/rows.h"
#include "tests/support/test_world.h"

namespace megatron_cpp {
namespace {

using namespace test_support;

}  // namespace

// Sizes below, at and above the blocks in which half-precision products may be made. Sums of multiples of 1/64 below
// 2^17 are exact in float32: rounded once, a product has the bits of the rounded float64 one.
TEST(MatrixProduct, OfEveryDtypeIsRoundedOnce) {
  for (const auto dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    for (const int64_t size : {1, 3, 511, 512, 513, 1100}) {
      SCOPED_TRACE(testing::Message() << dtype << ", size " << size);
      const auto a = on_device(exact_values({5, 7}, 1, dtype));
      const auto weight = on_device(exact_values({size, 7}, 2, dtype));
      const auto wide = on_device(exact_values({7, size}, 3, dtype));
      const auto expected = a.to(at::kDouble).mm(weight.to(at::kDouble).t()).to(dtype);
      EXPECT_TRUE(test_support::equal(megatron_cpp::internal::linear_product(a, weight, {}), expected));
      EXPECT_TRUE(test_support::equal(megatron_cpp::internal::matrix_product(a, wide),
                                      a.to(at::kDouble).mm(wide.to(at::kDouble)).to(dtype)));
      const auto sum = on_device(exact_values({size, 7}, 4, dtype));
      const auto gradient = on_device(exact_values({5, size}, 5, dtype));
      const auto added = sum.to(at::kDouble).addmm(gradient.to(at::kDouble).t(), a.to(at::kDouble)).to(dtype);
      megatron_cpp::internal::add_matrix_product(sum, gradient.t(), a);
      EXPECT_TRUE(test_support::equal(sum, added));
      // A float32 sum of products isn't rounded to their dtype.
      const auto wide_sum = on_device(exact_values({size, 7}, 4));
      const auto wide_added = wide_sum.to(at::kDouble).addmm(gradient.to(at::kDouble).t(), a.to(at::kDouble));
      megatron_cpp::internal::add_matrix_product(wide_sum, gradient.t(), a);
      EXPECT_TRUE(test_support::equal(wide_sum, wide_added.to(at::kFloat)));
    }
  }
}

TEST(MatrixProduct, TakesShapesOfLayers) {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const auto input = on_device(exact_values({4, 3, 7}, 1, dtype));
    const auto weight = on_device(exact_values({5, 7}, 2, dtype));
    const auto bias = on_device(exact_values({5}, 3, dtype));
    EXPECT_TRUE(
        test_support::near(megatron_cpp::internal::linear_product(input, weight, bias),
                           at::linear(input.to(at::kDouble), weight.to(at::kDouble), bias.to(at::kDouble)).to(dtype),
                           dtype == at::kFloat ? 0.0 : 1e-2));
    EXPECT_EQ(megatron_cpp::internal::linear_product(input.narrow(0, 0, 0), weight, {}).sizes(),
              (std::vector<int64_t>{0, 3, 5}));
    EXPECT_EQ(megatron_cpp::internal::matrix_product(input.transpose(0, 1), weight.t()).sizes(),
              (std::vector<int64_t>{3, 4, 5}));
  }
}

TEST(Rows, MoveByNumberWhateverTheStrides) {
  const auto source = on_device(exact_values({5, 6}, 1));
  const auto indices = megatron_cpp::internal::index_tensors(
      {std::vector<int64_t>{4, 0, 2}, std::vector<int64_t>{}, std::vector<int64_t>{1, 3, 0}}, source.device());
  EXPECT_EQ(indices[1].numel(), 0);
  // Columns of a wider matrix into columns of a wider matrix.
  const auto target = on_device(at::zeros({4, 8}));
  megatron_cpp::internal::copy_rows(target.narrow(1, 3, 2), indices[2], source.narrow(1, 2, 2), indices[0]);
  const auto expected = on_device(at::zeros({4, 8}));
  expected.narrow(1, 3, 2).index_copy_(0, indices[2], source.narrow(1, 2, 2).index_select(0, indices[0]));
  EXPECT_TRUE(test_support::equal(target, expected));

  EXPECT_TRUE(test_support::equal(megatron_cpp::internal::gather_rows(source.narrow(1, 1, 3), indices[0]),
                                  source.narrow(1, 1, 3).index_select(0, indices[0])));
  EXPECT_EQ(megatron_cpp::internal::gather_rows(source, indices[1]).sizes(), (std::vector<int64_t>{0, 6}));
  const auto first = on_device(at::zeros({4, 6}));
  megatron_cpp::internal::copy_rows(first, {}, source, indices[0]);
  EXPECT_TRUE(test_support::equal(first.narrow(0, 0, 3), source.index_select(0, indices[0])));
  const auto scattered = on_device(at::zeros({4, 6}));
  megatron_cpp::internal::copy_rows(scattered, indices[2], source, {});
  EXPECT_TRUE(test_support::equal(scattered.index_select(0, indices[2]), source.narrow(0, 0, 3)));

  EXPECT_TRUE(megatron_cpp::internal::as_rows(source.view({5, 3, 2}).narrow(2, 0, 1)).is_alias_of(source));
  const auto transposed = source.t();
  EXPECT_TRUE(test_support::equal(megatron_cpp::internal::as_rows(transposed), transposed));
  EXPECT_EQ(megatron_cpp::internal::as_rows(transposed).stride(1), 1);
}

// A wrong number is a bug of ours, but not one that writes anywhere.
TEST(Rows, OutsideTheMatrixAreRefused) {
  const auto source = at::zeros({5, 6});
  for (const int64_t wrong : {int64_t{5}, int64_t{-1}}) {
    EXPECT_THROW(megatron_cpp::internal::gather_rows(source, at::full({1}, wrong, at::kLong)), c10::Error);
  }
}

}  // namespace megatron_cpp
