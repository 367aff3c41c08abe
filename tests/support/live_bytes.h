// Counts the memory of tensors.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Device.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace megatron_cpp::test_support {

/// Bytes of the tensors of this thread that are alive, while a c10::DebugInfoGuard with
/// c10::DebugInfoKind::PROFILER_STATE holds it. File mappings don't count.
class LiveBytes final : public c10::MemoryReportingInfoBase {
 public:
  void reportMemoryUsage(void* /*ptr*/, int64_t alloc_size, size_t /*allocated*/, size_t /*reserved*/,
                         c10::Device /*device*/) override {
    live_ += alloc_size;
    peak = std::max(peak, live_);
  }
  bool memoryProfilingEnabled() const override { return true; }
  int64_t live() const { return live_; }  ///< of those made under the guard
  int64_t peak = 0;

 private:
  int64_t live_ = 0;
};

}  // namespace megatron_cpp::test_support
