// Writes files completely or not at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>

#include "megatron_cpp/checkpoint/file_digest.h"
#include "parallel/errors.h"

namespace megatron_cpp {

/// A file or folder can't be written. Its exit status is parallel::kCannotWriteStatus.
class WriteError : public parallel::ExitError {
 public:
  /// @param text  names the file and the system's reason.
  explicit WriteError(const std::string& text) : ExitError(text, parallel::kCannotWriteStatus) {}
};

/// Writes `text` as the file `path`, completely or not at all: writes a file in the same folder whose name ends in
/// .partial, flushes it to disk and renames it. For a link this is the file that the link leads to. A device, a pipe,
/// and a file that the file system can't replace are written in place.
/// @throws WriteError naming the file and the system's reason if it can't be written; a folder, a disk and a pipe that
///         nobody reads are refused.
void write_file(const std::filesystem::path& path, std::string_view text);

namespace internal {

class Checksum;

/// Owns an open file descriptor; negative: none.
class FileDescriptor {
 public:
  /// Owns `descriptor`.
  explicit FileDescriptor(int descriptor) : descriptor_(descriptor) {}
  ~FileDescriptor();
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  int get() const { return descriptor_; }  ///< still owned
  /// Owns `descriptor` from now on; the one before is closed.
  void reset(int descriptor);
  /// Closes it now. Returns what close(2) returns, with errno.
  int close();

 private:
  int descriptor_;
};

/// Whether a failed fsync(2) or similar call with this errno means that data are lost. File systems that can't flush
/// folders (or anything) return other errors, which can only be ignored.
bool means_lost_data(int reason);

/// Whether, after rename(2) to an existing file has failed with this errno, the file may be written in place instead:
/// it is a mount point, or the file system can't replace a file.
bool may_write_in_place(int reason);

/// Whether `name` is a plain file name, which can't lead out of a folder.
bool is_file_name(std::string_view name);

/// Follows links at the end of `path`; the target may not exist.
/// @throws WriteError "cannot write `path`: ..." if the links go in a circle.
std::filesystem::path link_target(const std::filesystem::path& path);

/// fsync(2) of a folder: renames are on disk only once the folder that holds them is.
/// @throws WriteError naming the folder and the reason, if that means_lost_data.
void flush_folder(const std::filesystem::path& folder);

/// Writes all bytes, with as many calls of write(2) as needed.
/// @throws WriteError "cannot write `name`: " and the system's reason.
void write_all(int descriptor, const void* data, size_t bytes, const std::string& name);

/// A file that grows by whole records, without buffering; created if it isn't there.
class AppendedFile {
 public:
  /// @throws WriteError "cannot write `path`: " and the system's reason.
  explicit AppendedFile(const std::filesystem::path& path);

  /// @throws WriteError as write_all. What was written of `bytes` is removed then, for a reader would stop at it; that
  ///         this failed, too, is said by is_cut_short().
  void append(std::string_view bytes);

  /// Whether the file ends in a part of a record.
  bool is_cut_short() const { return is_cut_short_; }

 private:
  std::string name_;
  FileDescriptor file_;
  bool is_cut_short_ = false;
};

/// Writes a temporary file in the same folder, flushes it and renames it: a reader sees the whole new file or the old
/// one, and a writer that fails or is destroyed without commit() leaves the old one. The temporary name is unique.
///
/// Only a regular file is replaced; for a link, the file that it leads to, even if that doesn't exist yet. A device or
/// a pipe is written in place. If the file system can't replace a file, commit() copies the complete new file over it.
class CompleteFile {
 public:
  /// @throws WriteError "cannot write `path`: " and the reason: open(2)'s error; a folder; a disk (a block device); a
  ///         pipe that nobody reads.
  explicit CompleteFile(const std::filesystem::path& path);
  ~CompleteFile();
  CompleteFile(const CompleteFile&) = delete;
  CompleteFile& operator=(const CompleteFile&) = delete;

  void write(const void* data, size_t bytes);  ///< throws as write_all
  /// Makes the file appear under its name. Returns what was written.
  /// @throws WriteError naming the file and the system's reason.
  FileDigest commit();

 private:
  void open_beside();
  void replace_target();

  std::string name_;               ///< for messages: as given, and what it is a link to
  std::filesystem::path target_;   ///< the regular file
  std::filesystem::path partial_;  ///< the temporary file; empty: the target is written in place
  FileDescriptor file_;
  int64_t bytes_ = 0;                   ///< written so far
  std::unique_ptr<Checksum> checksum_;  ///< of these
};

}  // namespace internal

}  // namespace megatron_cpp
