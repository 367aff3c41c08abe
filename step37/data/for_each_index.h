// A loop over several threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <future>
#include <vector>

namespace megatron_cpp::step37 {

/// Calls action(0) to action(count - 1), each once, on `num_threads` threads, this one included. What an action throws
/// is thrown here when all threads have ended.
template <class Action>
void for_each_index(size_t count, int64_t num_threads, const Action& action) {
  std::atomic<size_t> next = 0;
  const auto work = [&] {
    for (size_t i = next++; i < count; i = next++) action(i);
  };
  std::vector<std::future<void>> others;
  for (int64_t thread = 1; thread < num_threads && static_cast<size_t>(thread) < count; ++thread) {
    others.push_back(std::async(std::launch::async, work));
  }
  others.push_back(std::async(std::launch::deferred, work));
  others.back().wait();
  for (auto& done : others) done.wait();
  for (auto& done : others) done.get();
}

}  // namespace megatron_cpp::step37
