// A hash that is the same on every machine, unlike std::hash.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace megatron_cpp::parallel {

inline constexpr uint64_t kHashBasis = 14695981039346656037ULL;

/// FNV-1a (Fowler, Noll, Vo; RFC 9923), 64 bits; `hash` is the hash of the bytes before these.
inline uint64_t stable_hash(std::span<const std::byte> bytes, uint64_t hash = kHashBasis) {
  for (const auto byte : bytes) hash = (hash ^ static_cast<uint64_t>(byte)) * 1099511628211ULL;
  return hash;
}
inline uint64_t stable_hash(std::string_view text, uint64_t hash = kHashBasis) {
  return stable_hash(std::as_bytes(std::span(text)), hash);
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood 2014; a bijection): every bit of `hash` changes about half of the
/// bits of the result. The last bytes hardly change the leading bits of stable_hash alone.
inline uint64_t mixed_hash(uint64_t hash) {
  hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9ULL;
  hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebULL;
  return hash ^ (hash >> 31);
}

}  // namespace megatron_cpp::parallel
