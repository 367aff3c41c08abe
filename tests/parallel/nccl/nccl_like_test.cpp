// The stand-in for NCCL does what it is there for: parallel_like_nccl_test runs the collectives over it.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <vector>

#include "parallel/collectives.h"
#include "tests/support/errors.h"
#include "tests/support/nccl_like_backend.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::parallel {

using namespace test_support;

TEST(NcclLike, GivesNoWorkWhereNoneIsAskedFor) {
  const auto group = test_support::like_nccl(test_support::groups(runtime().size()).world);
  const auto backend = group->getBackend(at::kCPU);
  std::vector<at::Tensor> tensors{at::ones({3})};
  c10d::AllreduceOptions options;
  options.asyncOp = false;
  EXPECT_FALSE(backend->allreduce(tensors, options));
  EXPECT_TRUE(test_support::equal(tensors[0], at::full({3}, static_cast<float>(runtime().size()))));
}

TEST(NcclLike, IsLate) {
  const int t = runtime().size();
  const auto group = test_support::like_nccl(test_support::groups(t).world);
  if (t == 1) return;  // collectives of one rank don't ask a backend
  auto first = at::full({2}, static_cast<float>(runtime().rank()));
  auto gathered = start_all_gather(first, group);
  first.add_(1);  // as if the stream hadn't read it yet
  const auto sum = all_reduce(at::ones({1}), group);
  EXPECT_EQ(sum.item<float>(), static_cast<float>(t));
  EXPECT_TRUE(test_support::equal(gathered.wait().slice(0, 0, 2 * t, 2), at::arange(1, t + 1, at::kFloat)));
}

TEST(NcclLike, RefusesStridedTensors) {
  const auto backend = test_support::like_nccl(test_support::groups(runtime().size()).world)->getBackend(at::kCPU);
  std::vector<at::Tensor> strided{at::zeros({2, 3}).t()};
  EXPECT_TRUE(contains(value_error([&] { backend->allreduce(strided, {}); }), "must be contiguous"));
  std::vector<at::Tensor> two{at::zeros({2}), at::zeros({2})};
  EXPECT_TRUE(contains(value_error([&] { backend->allreduce(two, {}); }), "one tensor only"));
}

}  // namespace megatron_cpp::parallel
