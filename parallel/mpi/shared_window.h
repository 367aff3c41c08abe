// Memory that the ranks of one host share, and the steps in which they pass tensors through it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "parallel/mpi/collective_call.h"

namespace megatron_cpp::parallel {

/// Shared memory in which each of t ranks of a host has one part for each rank. Its size doesn't depend on that of the
/// tensors: they go through it in steps, the same steps on every rank. A step has three stages on each rank: it has
/// copied its parts in, it has reduced its own part of all ranks, and it has read all it needs. A rank announces each
/// stage by a counter. Up to kDepth steps are in progress at a time.
///
/// The memory has no name any more once `make` has returned, so a killed job leaves nothing behind. Not thread-safe:
/// one collective at a time, like the group it belongs to. Move-only.
class SharedWindow {
 public:
  enum class Stage { kCopiedIn, kReduced, kDone };
  static constexpr int64_t kDepth = 3;

  /// Gathers an int64 tensor [1] of each rank into [t]; may throw when a rank doesn't come.
  using Gather = std::function<at::Tensor(const at::Tensor&)>;

  /// Makes the window of the ranks that `gather` connects. Collective over them.
  /// @param byte_limit  most bytes to ask for on this rank; a window that needs more isn't made.
  /// @param where       for messages: "group tp, rank 0 of 2".
  /// @return            on every rank a window, or on every rank none: ranks on several hosts, or too little shared
  ///                    memory on some rank, which rank 0 then reports on stderr.
  /// Throws what `gather` throws.
  static std::optional<SharedWindow> make(int rank, int size, int64_t byte_limit, const std::string& where,
                                          const Gather& gather);

  /// Bytes of one part in a window for `size` ranks, a multiple of a cache line. Not collective.
  static int64_t part_bytes_for(int size);
  /// Bytes of shared memory of such a window. Not collective.
  static int64_t bytes_for(int size);

  int rank() const { return rank_; }
  int size() const { return size_; }
  int64_t part_bytes() const { return part_bytes_; }

  /// Begins a collective of `count` steps and returns the number of its first.
  /// @throws c10::DistBackendError if an earlier collective failed: the window's contents are then undefined.
  int64_t begin_steps(int64_t count, const CollectiveCall& call);

  /// The memory through which rank `from` passes values to rank `to` in `step`. With `to` = `from` it holds the result
  /// that rank `from` has reduced.
  std::byte* part(int from, int to, int64_t step) const;

  /// Tells the other ranks that this one has finished `stage` of `step`, and that they may read what it wrote.
  void announce(Stage stage, int64_t step);

  /// Returns when every rank has finished `stage` of `step` (at once for steps before the first).
  /// @throws c10::DistBackendError when that takes longer than call.timeout (naming ranks that are silent or in another
  ///         collective), or another rank has given up.
  void wait_for_all(Stage stage, int64_t step, const CollectiveCall& call);

  /// Makes the window unusable on every rank, for good: this rank has left a collective unfinished.
  void give_up() noexcept;

 private:
  struct Unmap {
    int64_t bytes;
    void operator()(std::byte* memory) const noexcept;
  };
  using Memory = std::unique_ptr<std::byte, Unmap>;
  struct Counter;

  SharedWindow(Memory memory, int rank, int size);
  static Memory map(const std::string& name, int64_t bytes, int64_t byte_limit, bool create);
  Counter& counter(int rank, Stage stage) const;
  Counter& failures() const;

  Memory memory_;
  int rank_;
  int size_;
  int64_t part_bytes_;
  int64_t next_step_ = 0;
};

}  // namespace megatron_cpp::parallel
