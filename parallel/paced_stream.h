// Rehearsed collectives that take as long on a GPU as sending their bytes would take on a network.
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
  int64_t copied_bytes = 0;  ///< within the device's memory
  double idle_seconds = 0;   ///< spent after that by one thread of the device
};

/// Pure: a collective that sends `sent_bytes` at `gigabytes_per_second` moves as many bytes within the device, of which
/// filling its result is a part, and spends the rest of the time idle. Copying takes longer if the device is slower
/// than that.
/// @param copied_gigabytes_per_second  the device's copy rate.
PacedTransfer paced_transfer(int64_t sent_bytes, int64_t filled_bytes, double gigabytes_per_second,
                             double copied_gigabytes_per_second);

/// Runs rehearsed collectives beside the current stream, as NCCL does.
class PacedStream {
 public:
  PacedStream() = default;
  PacedStream(const PacedStream&) = delete;
  PacedStream& operator=(const PacedStream&) = delete;
  virtual ~PacedStream() = default;

  /// Runs `fill` after the work queued on the current stream so far, and takes as long as sending `sent_bytes` would.
  /// @param fill     fills the result with LibTorch operators.
  /// @param tensors  kept until the Work is gone.
  /// @return         a Work whose wait() makes the current stream of the thread that calls it wait.
  virtual c10::intrusive_ptr<c10d::Work> run(const std::function<void()>& fill, int64_t filled_bytes,
                                             int64_t sent_bytes, std::vector<at::Tensor> tensors) = 0;
};

/// A stream of `device`. Measures the device's copy rate (some ten milliseconds); its 128 MiB of buffers stay
/// allocated.
/// @throws c10::ValueError if the build has no CUDA.
std::shared_ptr<PacedStream> make_paced_stream(c10::Device device, double gigabytes_per_second);

/// The backend of make_rehearsal_group.
/// @param stream  where collectives run; null: on the current stream, with no time beyond filling the result.
c10::intrusive_ptr<c10d::Backend> make_rehearsal_backend(int rank, int size, std::shared_ptr<PacedStream> stream);

}  // namespace megatron_cpp::parallel
