// Measures how many full [S,B,H] buffers are alive at once.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>

#include <cstdint>
#include <memory>

namespace megatron_cpp::step37 {

/// Follows every tensor of shape [S, B, H] and one dtype that an operator returns, on the thread that created the watch
/// and on autograd threads of its backward passes, and keeps the largest number of bytes alive at once. Tensors are
/// identified by their storage, so views count once. Staging buffers of MPI or NCCL are no tensors and aren't seen. One
/// object at a time in a process; a second throws c10::Error.
class FullBufferWatch {
 public:
  FullBufferWatch(int64_t S, int64_t B, int64_t H, at::ScalarType dtype);
  ~FullBufferWatch();
  FullBufferWatch(const FullBufferWatch&) = delete;
  FullBufferWatch& operator=(const FullBufferWatch&) = delete;

  /// Doesn't count the storage of `tensor` (a gradient that comes from outside).
  void ignore(const at::Tensor& tensor);

  int64_t peak_bytes() const;

  struct State;

 private:
  std::shared_ptr<State> state_;
  at::CallbackHandle handle_;
};

}  // namespace megatron_cpp::step37
