#include "megatron_cpp/tensor_parallel/to_device.h"

namespace megatron_cpp::internal {

at::Tensor to_device(const at::Tensor& tensor, const c10::Device& device) {
  // Autograd has no way back through pin_memory.
  const bool pins = tensor.is_cpu() && device.is_cuda() && !tensor.requires_grad();
  return (pins ? tensor.pin_memory() : tensor).to(device, /*non_blocking=*/true);
}

}  // namespace megatron_cpp::internal
