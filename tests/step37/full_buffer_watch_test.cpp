// What a FullBufferWatch counts.
#include "step37/program/full_buffer_watch.h"

#include <ATen/ATen.h>
#include <ATen/ThreadLocalState.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <thread>

namespace megatron_cpp::step37 {
namespace {

constexpr int64_t kBytes = 5 * 2 * 3 * 4;

TEST(FullBufferWatch, CountsWhatIsAliveAtOnce) {
  const FullBufferWatch watch(5, 2, 3, at::kFloat);
  const auto kept = at::zeros({5, 2, 3});
  for (int i = 0; i < 3; ++i) at::ones({5, 2, 3});
  EXPECT_EQ(watch.peak_bytes(), 2 * kBytes);
  const auto view = kept.view({10, 3}).view({5, 2, 3});
  const auto other_size = at::zeros({5, 2, 4});
  const auto other_dtype = at::zeros({5, 2, 3}, at::kDouble);
  EXPECT_EQ(watch.peak_bytes(), 2 * kBytes);
}

// On a GPU a backward pass runs on a thread of autograd's, with the caller's thread-local state.
TEST(FullBufferWatch, SeesThreadsThatRunABackwardPass) {
  const FullBufferWatch watch(5, 2, 3, at::kFloat);
  const at::ThreadLocalState state;
  std::thread other([&] {
    const at::ThreadLocalStateGuard guard(state);
    at::zeros({5, 2, 3});
  });
  other.join();
  EXPECT_EQ(watch.peak_bytes(), kBytes);
}

TEST(FullBufferWatch, IsAloneInItsProcess) {
  const FullBufferWatch watch(5, 2, 3, at::kFloat);
  EXPECT_THROW(FullBufferWatch(5, 2, 3, at::kFloat), c10::Error);
  at::zeros({5, 2, 3});
  EXPECT_EQ(watch.peak_bytes(), kBytes);
}

}  // namespace
}  // namespace megatron_cpp::step37
