// Tensors of the host on their way to a device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

namespace megatron_cpp::internal {

/// `tensor` on `device`, without waiting for the device: what lies on the CPU goes to a GPU from pinned memory. A copy
/// from pageable memory makes the host wait, in every call. The pinned memory is LibTorch's, which reuses it only after
/// the copy. `tensor` itself if it is on `device` already. A tensor that needs a gradient is copied as it lies.
at::Tensor to_device(const at::Tensor& tensor, const c10::Device& device);

}  // namespace megatron_cpp::internal
