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

/// The runtime of this process, on the device that TEST_DEVICE names (cpu if unset). Not where ranks come from
/// environment variables (gloo_main.cpp): it starts MPI.
parallel::Runtime& runtime();

/// The device of the tests: the runtime's, or without one the CPU.
c10::Device device();

/// Groups with tensor-parallel size `tp`, which must divide the world, and data-parallel size world/tp. Collective over
/// the world on the first call for each size. They come from environment variables where these have ranks. TEST_BACKEND
/// in the environment puts another backend between all groups but the world and MPI: like_nccl (nccl_like_backend.h) or
/// staged (parallel/nccl/staged_backend.h).
const parallel::ProcessGroups& groups(int tp);

/// groups(world size).tp: the whole world as one tensor-parallel group.
const parallel::GroupPtr& world_tp();

/// A group of this rank alone, for the dense counterpart of a layer.
const parallel::GroupPtr& single();

/// The sizes that divide the world, in increasing order.
std::vector<int> divisors_of_world();

/// `tensor` on the test's device.
at::Tensor on_device(const at::Tensor& tensor);

/// This rank's part of `whole`: one of equal chunks along `dim`, in the order of the ranks of `tp`.
at::Tensor part(const at::Tensor& whole, int64_t dim, const parallel::GroupPtr& tp);

/// Ends the runtime; the test main calls it after the last test.
void end_test_world();

/// A new folder that all ranks know; rank 0 makes it and removes it with everything in it. Making and removing are
/// collective over the world.
class SharedFolder {
 public:
  SharedFolder();
  ~SharedFolder();
  SharedFolder(const SharedFolder&) = delete;
  SharedFolder& operator=(const SharedFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }

 private:
  std::optional<TemporaryFolder> own_;  ///< rank 0's
  std::filesystem::path path_;
};

/// True on every rank if `condition` holds on every rank. Collective over the world.
bool on_all_ranks(bool condition);

/// What `action` throws on this rank as "Type: text"... "" if nothing. Only the text counts.
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
