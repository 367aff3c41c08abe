// A group whose collectives go wrong, for tests that must notice it.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

#include "parallel/group.h"
#include "parallel/recording_backend.h"

namespace megatron_cpp::test_support {

/// What is wrong, on this rank. Both get the collective's kind and a tensor to change in place.
struct CollectiveFault {
  /// A copy of what this rank gives to the collective.
  std::function<void(parallel::CollectiveKind, at::Tensor&)> sent = {};
  /// What it receives, and what it had given.
  std::function<void(parallel::CollectiveKind, at::Tensor&, const at::Tensor&)> received = {};
};

/// A group of the same ranks with this fault: all-reduces, all-gathers and reduce-scatters of single tensors, and
/// all-to-alls. Only for tensors on the CPU.
parallel::GroupPtr with_fault(const parallel::GroupPtr& group, CollectiveFault fault);

}  // namespace megatron_cpp::test_support
