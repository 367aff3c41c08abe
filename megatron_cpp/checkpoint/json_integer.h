// Integers in JSON files.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

namespace megatron_cpp::internal {

/// The number, if it is an integer and fits. get<int64_t>() of the JSON library takes true, 1.5 and 1e300 as well, the
/// last of them with undefined behaviour.
template <class Json>
std::optional<int64_t> integer_of(const Json& json) {
  if (!json.is_number_integer()) return std::nullopt;
  constexpr uint64_t kMax = std::numeric_limits<int64_t>::max();
  if (json.is_number_unsigned() && json.template get<uint64_t>() > kMax) return std::nullopt;
  return json.template get<int64_t>();
}

/// The list, if all it holds are such integers.
template <class Json>
std::optional<std::vector<int64_t>> integers_of(const Json& json) {
  if (!json.is_array()) return std::nullopt;
  std::vector<int64_t> values;
  for (const auto& element : json) {
    const auto value = integer_of(element);
    if (!value) return std::nullopt;
    values.push_back(*value);
  }
  return values;
}

/// `factor` times all sizes of a shape except zeros, which strides leave out, too; nothing if a size is negative or the
/// product overflows.
inline std::optional<int64_t> product_of_sizes(const std::vector<int64_t>& shape, int64_t factor) {
  for (const int64_t size : shape) {
    if (size < 0 || __builtin_mul_overflow(factor, std::max<int64_t>(size, 1), &factor)) return std::nullopt;
  }
  return factor;
}

}  // namespace megatron_cpp::internal
