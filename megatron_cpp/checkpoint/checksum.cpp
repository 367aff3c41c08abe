#include "megatron_cpp/checkpoint/checksum.h"

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <vector>

#define XXH_INLINE_ALL  // the header has all of the code: there is no library to link
#include <xxhash.h>

namespace megatron_cpp::internal {

struct Checksum::State {
  XXH3_state_t xxh;
};

Checksum::Checksum() : state_(std::make_unique<State>()) { XXH3_128bits_reset(&state_->xxh); }

Checksum::~Checksum() = default;

void Checksum::add(const void* data, size_t bytes) { XXH3_128bits_update(&state_->xxh, data, bytes); }

std::string Checksum::text() const {
  const auto hash = XXH3_128bits_digest(&state_->xxh);
  return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
}

std::string checksum_of(std::string_view text) {
  Checksum checksum;
  checksum.add(text.data(), text.size());
  return checksum.text();
}

FileDigest digest_of_file(const std::filesystem::path& path) {
  const FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  TORCH_CHECK_VALUE(file.get() >= 0, "cannot open ", path.string(), ": ", std::strerror(errno));
  constexpr size_t kBlock = size_t{1} << 20;  // stays in the cache between reading and adding
  std::vector<std::byte> block(kBlock);
  Checksum checksum;
  int64_t bytes = 0;
  while (true) {
    const ssize_t taken = ::read(file.get(), block.data(), block.size());
    if (taken < 0 && errno == EINTR) continue;
    TORCH_CHECK_VALUE(taken >= 0, "cannot read ", path.string(), ": ", std::strerror(errno));
    if (taken == 0) return {bytes, checksum.text()};
    checksum.add(block.data(), static_cast<size_t>(taken));
    bytes += taken;
  }
}

}  // namespace megatron_cpp::internal
