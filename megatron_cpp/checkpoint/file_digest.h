// Size and checksum of a file.
#pragma once

#include <cstdint>
#include <string>

namespace megatron_cpp {

/// What a file holds, in short.
struct FileDigest {
  int64_t bytes = 0;          ///< its size
  std::string checksum = {};  ///< XXH128 of the bytes: 32 hexadecimal digits, as the program xxh128sum prints them

  bool operator==(const FileDigest&) const = default;  ///< both members are equal
};

}  // namespace megatron_cpp
