// Rehearsed collectives that take the time on a GPU that their bytes would take on a network.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <vector>

namespace megatron_cpp::parallel {

/// What a collective does besides filling its result.
struct PacedTransfer {
  int64_t copied_bytes = 0;  ///< from memory of the device to memory of the device
  double idle_seconds = 0;   ///< after that, on one thread of the device
};

/// Pure: a collective that sends `sent_bytes` at `gigabytes_per_second` moves as many bytes within the device, of which
/// filling its result is a part, and spends the rest of the time idle. What the device can't copy in that time takes
/// as long as it takes.
/// @param copied_gigabytes_per_second  what the device copies.
PacedTransfer paced_transfer(int64_t sent_bytes, int64_t filled_bytes, double gigabytes_per_second,
                             double copied_gigabytes_per_second);

/// Runs rehearsed collectives beside the current stream, as NCCL does.
class PacedStream {
 public:
  PacedStream() = default;
  PacedStream(const PacedStream&) = delete;
  PacedStream& operator=(const PacedStream&) = delete;
  virtual ~PacedStream() = default;

  /// Runs `fill` after what the current stream has been given so far, then as long as sending `sent_bytes` takes.
  /// @param fill     fills the result by operators.
  /// @param tensors  kept until the Work is gone.
  /// @return         a Work whose wait() makes the current stream of the thread that calls it wait.
  virtual c10::intrusive_ptr<c10d::Work> run(const std::function<void()>& fill, int64_t filled_bytes,
                                             int64_t sent_bytes, std::vector<at::Tensor> tensors) = 0;
};

/// A stream of `device`, whose copies are measured for it (some ten milliseconds, and 128 MiB that stay taken).
/// @throws c10::ValueError if the build has no CUDA.
std::shared_ptr<PacedStream> make_paced_stream(c10::Device device, double gigabytes_per_second);

/// The backend of make_rehearsal_group.
/// @param stream  where collectives run; null: on the current one, and they take no time but that of filling.
c10::intrusive_ptr<c10d::Backend> make_rehearsal_backend(int rank, int size, std::shared_ptr<PacedStream> stream);

}  // namespace megatron_cpp::parallel
