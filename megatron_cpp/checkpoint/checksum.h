// Checksums of files: XXH128, the 128-bit form of XXH3 (https://xxhash.com), as the program xxh128sum prints it.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>

#include "megatron_cpp/checkpoint/file_digest.h"

namespace megatron_cpp::internal {

/// The checksum of bytes that come one after the other.
class Checksum {
 public:
  Checksum();
  ~Checksum();
  Checksum(const Checksum&) = delete;
  Checksum& operator=(const Checksum&) = delete;

  void add(const void* data, size_t bytes);
  /// Of all bytes so far: 32 hexadecimal digits.
  std::string text() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// The checksum of a text.
std::string checksum_of(std::string_view text);

/// Reads the whole file.
/// @throws c10::ValueError naming the file and the system's reason if it can't be read.
FileDigest digest_of_file(const std::filesystem::path& path);

}  // namespace megatron_cpp::internal
