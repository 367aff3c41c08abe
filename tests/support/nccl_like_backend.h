// A backend on the CPU that behaves like c10d's ProcessGroupNCCL, to find on the CPU what would fail on GPUs only.
#pragma once

#include "parallel/group.h"

namespace megatron_cpp::test_support {

/// A group of the same ranks whose CPU backend has the rules of ProcessGroupNCCL, and passes collectives on to the
/// backend of `group`:
///  - if asyncOp is false, the collective is done when the call returns, and the returned Work is null;
///  - otherwise the collective runs in Work::wait or in a later blocking collective of the group, and until then the
///    output contains garbage (but where the input lies in it), as on a stream that isn't waited for. Writing to the
///    input meanwhile spoils the result;
///  - one contiguous tensor per call, of matching sizes and dtypes: else c10::ValueError.
/// A Work that is never waited for fails the running test. Not collective.
parallel::GroupPtr like_nccl(const parallel::GroupPtr& group);

}  // namespace megatron_cpp::test_support
