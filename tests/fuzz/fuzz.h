// What every fuzz target needs: a reader of outside data may return or refuse, and nothing else.
#pragma once

#include <c10/util/Exception.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>

/// Ends the process unless `condition` holds: libFuzzer then keeps the input, and ctest counts a failure.
#define FUZZ_CHECK(condition, ...)                                                      \
  do {                                                                                  \
    if (!(condition)) {                                                                 \
      std::fprintf(stderr, "%s:%d: %s is not so. %s\n", __FILE__, __LINE__, #condition, \
                   std::string(::c10::str("" __VA_OPT__(, ) __VA_ARGS__)).c_str());     \
      std::abort();                                                                     \
    }                                                                                   \
  } while (false)

/// libFuzzer calls it with one input after the other (https://llvm.org/docs/LibFuzzer.html).
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace megatron_cpp::fuzz {

inline bool contains(std::string_view text, std::string_view part) { return text.find(part) != std::string_view::npos; }

/// Why `action` refuses its input: the text of the c10::ValueError it throws. Nothing if it returns. Any other
/// exception leaves the target, and so is a finding.
template <class Action>
std::optional<std::string> refusal(const Action& action) {
  try {
    action();
  } catch (const c10::ValueError& error) {
    return error.what_without_backtrace();
  }
  return std::nullopt;
}

inline std::string_view text_of(const uint8_t* data, size_t size) {
  return size == 0 ? std::string_view() : std::string_view(reinterpret_cast<const char*>(data), size);
}

/// An input read as numbers, for targets whose reader takes values instead of bytes. Behind its end there are zeros.
class Numbers {
 public:
  Numbers(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  bool empty() const { return size_ == 0; }
  /// One byte.
  int64_t byte() {
    if (size_ == 0) return 0;
    --size_;
    return *data_++;
  }
  /// One byte, modulo `count`.
  int64_t below(int64_t count) { return byte() % count; }
  /// Eight bytes: any number there is.
  int64_t any() {
    uint64_t value = 0;
    for (int i = 0; i < 8; ++i) value |= static_cast<uint64_t>(byte()) << (8 * i);
    return static_cast<int64_t>(value);
  }
  /// Mostly [0, count); any number if the first byte is at least 0xf8.
  int64_t mostly_below(int64_t count) {
    const auto first = byte();
    return first >= 0xf8 ? any() : first % count;
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

}  // namespace megatron_cpp::fuzz
