// Watching how many full [S,B,H] buffers are alive.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>

#include <cstdint>
#include <memory>

namespace megatron_cpp::step37 {

/// While it lives, follows every tensor of shape [S, B, H] and one dtype that an operator returns, on the thread that
/// made it or on one that runs a backward pass for that, and keeps the largest number of bytes that were alive at once.
/// Tensors are told apart by their storage, so views count once. What MPI or NCCL stage inside a collective is not a
/// tensor and isn't seen. One at a time in a process; a second throws c10::Error.
class FullBufferWatch {
 public:
  FullBufferWatch(int64_t S, int64_t B, int64_t H, at::ScalarType dtype);
  ~FullBufferWatch();
  FullBufferWatch(const FullBufferWatch&) = delete;
  FullBufferWatch& operator=(const FullBufferWatch&) = delete;

  /// Leaves `tensor`'s storage out (a gradient that comes from outside).
  void ignore(const at::Tensor& tensor);

  int64_t peak_bytes() const;

  struct State;

 private:
  std::shared_ptr<State> state_;
  at::CallbackHandle handle_;
};

}  // namespace megatron_cpp::step37
