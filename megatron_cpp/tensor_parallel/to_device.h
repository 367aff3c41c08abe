// Copies host tensors to a device without waiting.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

namespace megatron_cpp::internal {

/// `tensor` on `device`, without waiting for the device: a CPU tensor is copied to a GPU from pinned memory. A copy
/// from pageable memory makes the host wait, in every call. LibTorch reuses the pinned memory only after the copy.
/// `tensor` itself if it is on `device` already. A tensor that needs a gradient is copied without pinning.
at::Tensor to_device(const at::Tensor& tensor, const c10::Device& device);

}  // namespace megatron_cpp::internal
