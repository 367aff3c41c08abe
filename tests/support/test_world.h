// The ranks a multi-rank test runs on: groups for every tensor-parallel size that divides the world, made once.
#pragma once

#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "parallel/group.h"
#include "parallel/process_groups.h"
#include "parallel/runtime.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp::test_support {

/// The runtime of this process, on the device that TEST_DEVICE names (cpu if unset). It starts MPI, so it isn't for
/// tests whose ranks come from environment variables (gloo_main.cpp).
parallel::Runtime& runtime();

/// The device of the tests: that of the runtime, or the CPU if ranks come from environment variables.
c10::Device device();

/// `group`, or one of the same ranks over the backend that TEST_BACKEND names: like_nccl (nccl_like_backend.h) or
/// staged (parallel/nccl/staged_backend.h).
parallel::GroupPtr over_test_backend(const parallel::GroupPtr& group);

/// Groups with tensor-parallel size `tp`, which must divide the world, and data-parallel size world/tp, over MPI or, if
/// ranks come from environment variables, over Gloo; all but the world over_test_backend(). Collective over the world
/// on the first call for each size.
const parallel::ProcessGroups& groups(int tp);

/// The same for any grid of the world's size.
const parallel::ProcessGroups& groups(const parallel::RankGrid& grid);

/// groups(world size).tp: the whole world as one tensor-parallel group.
const parallel::GroupPtr& world_tp();

/// A group of this rank alone, for the dense counterpart of a layer.
const parallel::GroupPtr& single();

/// The sizes that divide the world, in increasing order.
std::vector<int> divisors_of_world();

/// `tensor` on device().
at::Tensor on_device(const at::Tensor& tensor);

/// This rank's part of `whole`: one of equal chunks along `dim`, in the order of the ranks of `tp`.
at::Tensor part(const at::Tensor& whole, int64_t dim, const parallel::GroupPtr& tp);

/// Ends the runtime; main() calls it after the last test.
void end_test_world();

/// A new folder for all ranks; rank 0 creates it, and removes it with everything in it. Constructor and destructor are
/// collective over the world.
class SharedFolder {
 public:
  SharedFolder();
  ~SharedFolder();
  SharedFolder(const SharedFolder&) = delete;
  SharedFolder& operator=(const SharedFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }

 private:
  std::optional<TemporaryFolder> own_;  ///< on rank 0
  std::filesystem::path path_;
};

/// True on every rank if `condition` holds on every rank. Collective over the world.
bool on_all_ranks(bool condition);

/// The text of the exception that `action` throws on this rank; "" if none.
template <class Action>
std::string message_of(const Action& action) {
  try {
    action();
  } catch (const std::exception& error) {
    return error.what();
  }
  return {};
}

/// |actual - expected| <= tolerance * max(1e-30, max |expected|), the same shape; a message with the largest difference
/// otherwise.
testing::AssertionResult near(const at::Tensor& actual, const at::Tensor& expected, double tolerance);

/// Equal shape and bits.
testing::AssertionResult equal(const at::Tensor& actual, const at::Tensor& expected);

/// Values that differ by seed and index, multiples of 1/8 in [-4, 4]: sums of products of a few hundred are exact in
/// float32, and the values themselves in bfloat16.
at::Tensor exact_values(at::IntArrayRef shape, int64_t seed, at::ScalarType dtype = at::kFloat);

}  // namespace megatron_cpp::test_support
