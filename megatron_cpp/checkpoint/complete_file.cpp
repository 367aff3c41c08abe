#include "megatron_cpp/checkpoint/complete_file.h"

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <random>
#include <system_error>
#include <utility>

#include "megatron_cpp/checkpoint/checksum.h"

namespace megatron_cpp {
namespace internal {
namespace {

namespace fs = std::filesystem;

constexpr int kMaxLinks = 40;  // as many as Linux follows
constexpr size_t kLongestName = 255;

std::string reason_text(int reason) { return std::strerror(reason); }

/// @param parts  of the error's text.
template <class... Parts>
void check_written(bool ok, const Parts&... parts) {
  if (!ok) throw WriteError(c10::str(parts...));
}

/// The folder that holds `path`.
fs::path folder_of(const fs::path& path) { return path.has_parent_path() ? path.parent_path() : fs::path("."); }

/// A unique name in the folder of `target`.
fs::path name_beside(const fs::path& target) {
  std::random_device random;
  const auto ending = fmt::format("{:08x}{:08x}.partial", random(), random());
  const auto name = target.filename().string();
  const bool fits = name.size() + 1 + ending.size() <= kLongestName;
  return target.parent_path() / (fits ? name + "." + ending : ending);
}

/// Blocks SIGPIPE, so that write(2) to a pipe without reader returns EPIPE instead of ending the process.
class NoPipeSignal {
 public:
  NoPipeSignal() {
    sigemptyset(&pipe_);
    sigaddset(&pipe_, SIGPIPE);
    sigset_t pending;
    sigpending(&pending);
    was_pending_ = sigismember(&pending, SIGPIPE) == 1;
    pthread_sigmask(SIG_BLOCK, &pipe_, &before_);
  }
  ~NoPipeSignal() {
    const timespec now{};
    if (!was_pending_) sigtimedwait(&pipe_, nullptr, &now);
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }
  NoPipeSignal(const NoPipeSignal&) = delete;
  NoPipeSignal& operator=(const NoPipeSignal&) = delete;

 private:
  sigset_t pipe_{};
  sigset_t before_{};
  bool was_pending_ = false;
};

/// Opens an existing file to write it in place.
int open_stream(const fs::path& path, mode_t mode) {
  check_written(!S_ISDIR(mode), "cannot write ", path.string(), ": it is a folder");
  check_written(!S_ISBLK(mode), "cannot write ", path.string(), ": it is a disk");
  // O_NONBLOCK: doesn't wait for a reader that may never come.
  const int truncate = S_ISREG(mode) ? O_TRUNC : 0;
  const int descriptor = ::open(path.c_str(), O_WRONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK | truncate);
  const int reason = errno;
  check_written(descriptor >= 0 || reason != ENXIO || !S_ISFIFO(mode), "cannot write ", path.string(),
                ": it is a pipe that nobody reads");
  check_written(descriptor >= 0, "cannot write ", path.string(), ": ", reason_text(reason));
  ::fcntl(descriptor, F_SETFL, ::fcntl(descriptor, F_GETFL) & ~O_NONBLOCK);
  return descriptor;
}

/// Whether `target` is the file of status `there`. /proc/self/fd/1 may open another file than its link text names.
bool is_same(const struct stat& there, const fs::path& target) {
  struct stat other {};
  return ::stat(target.c_str(), &other) == 0 && other.st_dev == there.st_dev && other.st_ino == there.st_ino;
}

void check_flushed(int result, const std::string& name) {
  check_written(result == 0 || !means_lost_data(errno), "cannot flush ", name, ": ", reason_text(errno));
}

}  // namespace

FileDescriptor::~FileDescriptor() { close(); }

void FileDescriptor::reset(int descriptor) {
  close();
  descriptor_ = descriptor;
}

int FileDescriptor::close() {
  const int descriptor = std::exchange(descriptor_, -1);
  return descriptor >= 0 ? ::close(descriptor) : 0;
}

bool means_lost_data(int reason) { return reason == EIO || reason == ENOSPC || reason == EDQUOT; }

bool may_write_in_place(int reason) {
  for (const int one : {EBUSY, EXDEV, EEXIST, EPERM, EACCES, ENOTSUP, ENOSYS}) {
    if (reason == one) return true;
  }
  return false;
}

bool is_file_name(std::string_view name) {
  constexpr std::string_view kSeparators("/\0", 2);
  return !name.empty() && name != "." && name != ".." && name.find_first_of(kSeparators) == std::string_view::npos;
}

fs::path link_target(const fs::path& path) {
  auto target = path;
  std::error_code ignored;
  for (int links = 0; fs::is_symlink(target, ignored); ++links) {
    check_written(links < kMaxLinks, "cannot write ", path.string(), ": ", reason_text(ELOOP));
    const auto next = fs::read_symlink(target);
    target = next.is_absolute() ? next : target.parent_path() / next;
  }
  return target;
}

void flush_folder(const fs::path& folder) {
  const FileDescriptor descriptor(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  const bool flushed = descriptor.get() >= 0 && ::fsync(descriptor.get()) == 0;
  check_written(flushed || !means_lost_data(errno), "cannot flush folder ", folder.string(), ": ", reason_text(errno));
}

void write_all(int descriptor, const void* data, size_t bytes, const std::string& name) {
  const NoPipeSignal guard;
  const auto* position = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = ::write(descriptor, position, bytes);
    if (written < 0 && errno == EINTR) continue;
    check_written(written > 0, "cannot write ", name, ": ", reason_text(errno));
    position += written;
    bytes -= static_cast<size_t>(written);
  }
}

AppendedFile::AppendedFile(const fs::path& path)
    : name_(path.string()), file_(::open(path.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666)) {
  check_written(file_.get() >= 0, "cannot write ", name_, ": ", reason_text(errno));
}

void AppendedFile::append(std::string_view bytes) {
  const auto end = ::lseek(file_.get(), 0, SEEK_END);
  try {
    write_all(file_.get(), bytes.data(), bytes.size(), name_);
  } catch (const WriteError&) {
    is_cut_short_ = ::ftruncate(file_.get(), end) != 0;
    if (is_cut_short_) {
      TORCH_WARN("cannot shorten ", name_, ": ", reason_text(errno));
    }
    throw;
  }
}

CompleteFile::CompleteFile(const fs::path& path)
    : name_(path.string()), file_(-1), checksum_(std::make_unique<Checksum>()) {
  struct stat there {};
  const bool exists = ::stat(path.c_str(), &there) == 0;
  check_written(exists || errno == ENOENT, "cannot write ", name_, ": ", reason_text(errno));
  target_ = link_target(path);
  if (target_ != path) name_ += fmt::format(" (a link to {})", target_.string());
  if (exists && !(S_ISREG(there.st_mode) && is_same(there, target_))) {
    file_.reset(open_stream(path, there.st_mode));
    return;
  }
  open_beside();
  if (exists) ::fchmod(file_.get(), there.st_mode & 07777);  // a failure is ignored
}

CompleteFile::~CompleteFile() {
  if (!partial_.empty()) ::unlink(partial_.c_str());
}

void CompleteFile::open_beside() {
  constexpr int kTries = 100;
  for (int i = 0; i < kTries; ++i) {
    const auto beside = name_beside(target_);
    file_.reset(::open(beside.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
    if (file_.get() >= 0) {
      partial_ = beside;
      return;
    }
    if (errno != EEXIST) break;
  }
  throw WriteError(fmt::format("cannot write {}: {}", name_, reason_text(errno)));
}

void CompleteFile::write(const void* data, size_t bytes) {
  constexpr size_t kBlock = size_t{1} << 20;  // stays in the cache between adding and writing
  const auto* position = static_cast<const char*>(data);
  for (size_t done = 0; done < bytes; done += kBlock) {
    const size_t block = std::min(kBlock, bytes - done);
    checksum_->add(position + done, block);
    write_all(file_.get(), position + done, block, name_);
  }
  bytes_ += static_cast<int64_t>(bytes);
}

FileDigest CompleteFile::commit() {
  check_flushed(::fsync(file_.get()), name_);
  check_flushed(file_.close(), name_);  // a network file system may write only now
  if (!partial_.empty()) {
    replace_target();
    flush_folder(folder_of(target_));
  }
  return {bytes_, checksum_->text()};
}

void CompleteFile::replace_target() {
  if (::rename(partial_.c_str(), target_.c_str()) == 0) {
    partial_.clear();
    return;
  }
  const int reason = errno;
  check_written(may_write_in_place(reason), "cannot replace ", name_, ": ", reason_text(reason));
  try {
    fs::copy_file(partial_, target_, fs::copy_options::overwrite_existing);
    const FileDescriptor copy(::open(target_.c_str(), O_RDONLY | O_CLOEXEC));
    check_flushed(::fsync(copy.get()), name_);
  } catch (const std::exception& error) {
    const auto whole = std::exchange(partial_, fs::path());  // the old file may be damaged, so the new one is kept
    throw WriteError(fmt::format("cannot replace {}: {}, nor write into it: {}; it is in {}", name_,
                                 reason_text(reason), error.what(), whole.string()));
  }
}

}  // namespace internal

void write_file(const std::filesystem::path& path, std::string_view text) {
  internal::CompleteFile file(path);
  file.write(text.data(), text.size());
  file.commit();
}

}  // namespace megatron_cpp
