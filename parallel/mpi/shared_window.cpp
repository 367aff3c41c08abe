#include "parallel/mpi/shared_window.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <functional>
#include <new>
#include <random>
#include <system_error>
#include <utility>

#include "parallel/host_name.h"
#include "parallel/mpi/mpi_check.h"

namespace megatron_cpp::parallel {
namespace {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kStages = 3;

// A part should stay in cache between write and read, yet take far longer to sum than LibTorch's call overhead: of 64
// to 512 KiB, 128 KiB was the fastest at 4 and 33.5 MB, float32 and bfloat16, 2 and 4 ranks (AMD EPYC). Large groups
// get smaller parts: 16 MiB leaves room for other groups if a container allows 64 MiB.
constexpr int64_t kLargestPart = 1 << 17;
constexpr int64_t kLargestWindow = 1 << 24;

/// One cache line for the failures, then one per rank and stage; the parts begin on a new page.
int64_t header_bytes(int size) {
  constexpr int64_t kPage = 4096;
  return ((1 + size * kStages) * kCacheLine + kPage - 1) / kPage * kPage;
}

int64_t hash_of_host() { return static_cast<int64_t>(std::hash<std::string>{}(host_name())); }

/// A name that no other window on the host has: `tag` comes from rank 0.
std::string segment_name(int64_t tag) { return fmt::format("/megatron_cpp-{:016x}", static_cast<uint64_t>(tag)); }

int64_t random_tag() {
  std::random_device random;
  return static_cast<int64_t>((uint64_t{random()} << 32) | random());
}

/// Removes the segment's name when it goes out of scope, on every way out.
struct Name {
  std::string text;
  bool owned;
  ~Name() {
    if (owned) shm_unlink(text.c_str());
  }
};

}  // namespace

/// Counts the steps of one stage; on its own cache line, to avoid false sharing.
struct alignas(kCacheLine) SharedWindow::Counter {
  std::atomic<int64_t> value{0};
  static_assert(std::atomic<int64_t>::is_always_lock_free, "ranks share it: a lock would be each process's own");
};

void SharedWindow::Unmap::operator()(std::byte* memory) const noexcept { munmap(memory, static_cast<size_t>(bytes)); }

int64_t SharedWindow::part_bytes_for(int size) {
  const int64_t parts = kDepth * size * size;
  return std::clamp(kLargestWindow / parts / kCacheLine * kCacheLine, kCacheLine, kLargestPart);
}

int64_t SharedWindow::bytes_for(int size) { return header_bytes(size) + kDepth * size * size * part_bytes_for(size); }

SharedWindow::Memory SharedWindow::map(const std::string& name, int64_t bytes, int64_t byte_limit, bool create) {
  const auto check = [](bool ok, int error) {
    if (!ok) throw std::system_error(error, std::generic_category());
  };
  check(bytes <= byte_limit, ENOSPC);
  const int file = shm_open(name.c_str(), O_RDWR | (create ? O_CREAT | O_EXCL : 0), 0600);
  check(file >= 0, errno);
  // Without reserved space a full /dev/shm would cause a SIGBUS on the first write.
  int error = 0;
  do {
    error = create ? posix_fallocate(file, 0, bytes) : 0;
  } while (error == EINTR);
  void* memory = MAP_FAILED;
  if (error == 0) {
    memory = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file, 0);
  }
  const int map_error = errno;
  close(file);
  check(error == 0, error);
  check(memory != MAP_FAILED, map_error);
  return {static_cast<std::byte*>(memory), Unmap{bytes}};
}

std::optional<SharedWindow> SharedWindow::make(int rank, int size, int64_t byte_limit, const std::string& where,
                                               const Gather& gather) {
  const int64_t bytes = bytes_for(size);
  const auto of_all = [&](int64_t mine) { return gather(at::full({1}, mine, at::kLong)); };
  const auto hosts = of_all(hash_of_host());
  const auto tags = of_all(random_tag());
  if (!hosts.eq(hosts[0]).all().item<bool>()) return std::nullopt;

  // All ranks have arrived here, so the name exists only for a moment.
  Name name{segment_name(tags[0].item<int64_t>()), rank == 0};
  Memory memory(nullptr, Unmap{0});
  const auto try_to_map = [&](bool create) {
    try {
      memory = map(name.text, bytes, byte_limit, create);
    } catch (const std::system_error& error) {
      return int64_t{error.code().value()};
    }
    return int64_t{0};
  };
  auto errors = of_all(rank == 0 ? try_to_map(true) : 0);
  if (errors[0].item<int64_t>() == 0) errors = of_all(rank == 0 ? 0 : try_to_map(false));

  for (int peer = 0; peer < size; ++peer) {
    const auto error = errors[peer].item<int64_t>();
    if (error == 0) continue;
    if (rank == 0) {
      const auto text = fmt::format(
          "{}: large reductions go through MPI messages, which is slower: rank {} cannot have the {} bytes of shared "
          "memory (/dev/shm) that a window takes: {}\n",
          where, peer, bytes, std::generic_category().message(static_cast<int>(error)));
      std::fputs(text.c_str(), stderr);
    }
    return std::nullopt;
  }
  return SharedWindow(std::move(memory), rank, size);
}

SharedWindow::SharedWindow(Memory memory, int rank, int size)
    : memory_(std::move(memory)), rank_(rank), size_(size), part_bytes_(part_bytes_for(size)) {}

// New shared memory is zero, the start of every counter.
SharedWindow::Counter& SharedWindow::failures() const {
  return *std::launder(reinterpret_cast<Counter*>(memory_.get()));
}

SharedWindow::Counter& SharedWindow::counter(int rank, Stage stage) const {
  const int64_t index = 1 + rank * kStages + static_cast<int64_t>(stage);
  return *std::launder(reinterpret_cast<Counter*>(memory_.get() + index * kCacheLine));
}

std::byte* SharedWindow::part(int from, int to, int64_t step) const {
  return memory_.get() + header_bytes(size_) + ((from * kDepth + step % kDepth) * size_ + to) * part_bytes_;
}

int64_t SharedWindow::begin_steps(int64_t count, const CollectiveCall& call) {
  TORCH_CHECK_WITH(DistBackendError, failures().value.load(std::memory_order_relaxed) == 0, call.operation, " of ",
                   call.elements, " elements cannot begin (", call.where, "): an earlier one of the group has failed");
  const int64_t first = next_step_;
  next_step_ += count;
  return first;
}

void SharedWindow::announce(Stage stage, int64_t step) {
  counter(rank_, stage).value.store(step + 1, std::memory_order_release);
}

void SharedWindow::wait_for_all(Stage stage, int64_t step, const CollectiveCall& call) {
  for (int peer = 0; peer < size_; ++peer) {
    const auto& reached = counter(peer, stage).value;
    PeerWait wait(call, /*spins=*/1000);
    while (reached.load(std::memory_order_acquire) <= step) {
      if (!wait.go_on()) throw_timed_out(call);
      if (!wait.is_long()) continue;
      int arrived = 0;
      MCPP_MPI_CHECK(MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, call.communicator, &arrived, MPI_STATUS_IGNORE));
      TORCH_CHECK_WITH(DistBackendError, failures().value.load(std::memory_order_relaxed) == 0, call.operation, " of ",
                       call.elements, " elements failed (", call.where, "): another rank of the group has given up");
    }
  }
}

void SharedWindow::give_up() noexcept { failures().value.store(1, std::memory_order_relaxed); }

}  // namespace megatron_cpp::parallel
