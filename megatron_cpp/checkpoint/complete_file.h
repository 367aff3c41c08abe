// Writing files that are complete or not there.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>

namespace megatron_cpp {

/// Writes `text` as the file `path`, complete or not at all: it is written beside it, under a name of its own that ends
/// in .partial, flushed to disk and renamed. Of a link it is the file that the link leads to; a device or a pipe is
/// written into, and so is a file that the file system can't replace.
/// @throws c10::Error naming the file and the system's reason if it can't be written; a folder, a disk and a pipe that
///         nobody reads are refused.
void write_file(const std::filesystem::path& path, std::string_view text);

namespace internal {

/// Owns an open file descriptor; a negative one is none.
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

/// Whether a failed fsync(2), or the like, with this errno means that data are lost. File systems without such a call
/// for folders (or at all) answer with others, and there is nothing better to do there than to go on.
bool means_lost_data(int reason);

/// Whether a failed rename(2) to a name that is taken may be made up for by writing into the file of that name: it is a
/// mount point, or the file system can't replace a file.
bool may_write_in_place(int reason);

/// What `path` leads to: each link at its end is followed, whether or not the last one leads to anything.
/// @throws c10::Error "cannot write `path`: ..." if the links go in a circle.
std::filesystem::path link_target(const std::filesystem::path& path);

/// fsync(2) of a folder: renames are on disk only once the folder that holds them is.
/// @throws c10::Error naming the folder and the reason, if that means_lost_data.
void flush_folder(const std::filesystem::path& folder);

/// Writes all of it, however many calls that takes.
/// @throws c10::Error "cannot write `name`: " and the system's reason.
void write_all(int descriptor, const void* data, size_t bytes, const std::string& name);

/// Writes a file beside its name, flushes it and renames it: a reader sees the whole new file or the old one, and a
/// writer that fails or is destroyed without commit() leaves the old one. The name beside is of this writer alone.
///
/// Only a regular file is replaced. Of a link it is the file that the link leads to, or would. A device or a pipe is
/// written into. Where the file system can't replace a file, commit() copies the complete new one over it.
class CompleteFile {
 public:
  /// @throws c10::Error "cannot write `path`: " and the reason: as open(2) has it; a folder; a disk (a block device); a
  ///         pipe that nobody reads.
  explicit CompleteFile(const std::filesystem::path& path);
  ~CompleteFile();
  CompleteFile(const CompleteFile&) = delete;
  CompleteFile& operator=(const CompleteFile&) = delete;

  void write(const void* data, size_t bytes);  ///< throws as write_all
  /// Makes the file appear under its name. @throws c10::Error naming the file and the system's reason.
  void commit();

 private:
  void open_beside();
  void replace_target();

  std::string name_;               ///< for messages: as given, and what it is a link to
  std::filesystem::path target_;   ///< the regular file
  std::filesystem::path partial_;  ///< empty: written into what is there
  FileDescriptor file_;
};

}  // namespace internal

}  // namespace megatron_cpp
