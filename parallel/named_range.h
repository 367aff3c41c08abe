// Names for parts of a program in a trace of PyTorch's profiler.
#pragma once

#include <ATen/record_function.h>

#include <type_traits>

namespace megatron_cpp::parallel {

/// While an object lives, its thread is in a range of this name, which a profiler that records this thread shows
/// (StepProfile). Ranges nest, and end in the reverse order on the same thread. Without a profiler it costs some
/// nanoseconds.
class NamedRange {
 public:
  /// @param name  a literal, or what returns a text; that is called only if there is a profiler.
  template <class Name>
  explicit NamedRange(const Name& name) : range_(at::RecordScope::USER_SCOPE) {
    if (!range_.isActive()) return;
    if constexpr (std::is_invocable_v<Name>) {
      range_.before(name());
    } else {
      range_.before(name);
    }
  }
  NamedRange(const NamedRange&) = delete;
  NamedRange& operator=(const NamedRange&) = delete;

 private:
  at::RecordFunction range_;
};

/// What `action` returns, called in a NamedRange of this name.
template <class Action>
decltype(auto) in_range(const char* name, const Action& action) {
  const NamedRange range(name);
  return action();
}

}  // namespace megatron_cpp::parallel
