// Where the files of a tar archive are, without unpacking it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace megatron_cpp::step37 {

/// A regular file in an archive.
struct TarMember {
  std::string name;    ///< its path in the archive, any bytes but 0
  int64_t offset = 0;  ///< of its first byte in the archive
  int64_t bytes = 0;
};

/// The members of an archive, in order.
struct TarListing {
  std::vector<TarMember> members;
  std::string damage;  ///< empty, or why the members may not be all: "it ends inside of 000012.jpg"
};

/// Reads the headers of an archive: those of POSIX (ustar and pax) and GNU (long names, large files). Links, folders
/// and devices are passed over. The archive ends with the first block of zeros; without one it is read to the end of
/// the file, and may be cut there. (libarchive doesn't tell where a member's bytes are.)
/// @throws c10::ValueError naming the file if it can't be read, is compressed (naming the program), or doesn't begin
///         with a header.
TarListing list_tar(const std::filesystem::path& file);

/// The file or files that `shards` names: a file; a folder's files *.tar, sorted by the bytes of their names; or a
/// pattern with ranges of numbers in braces, whose first number's digits say how many are written:
/// "shard-{000000..000009}.tar".
/// @throws c10::ValueError naming `shards` if there is none, a range is no range or has more than a million numbers, or
///         a folder has a compressed archive.
std::vector<std::filesystem::path> shards_of(const std::string& shards);

}  // namespace megatron_cpp::step37
