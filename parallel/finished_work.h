// The Work of a collective that has finished when the backend's call returns.
#pragma once

#include <ATen/core/Tensor.h>

#include <torch/csrc/distributed/c10d/Work.hpp>
#include <vector>

namespace megatron_cpp::parallel {

/// A Work that is complete, with these results.
c10::intrusive_ptr<c10d::Work> finished_work(std::vector<at::Tensor> outputs);

}  // namespace megatron_cpp::parallel
