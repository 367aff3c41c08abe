// A backend on the CPU that answers as c10d's ProcessGroupNCCL does, for what no test without GPUs would see otherwise.
#pragma once

#include "parallel/group.h"

namespace megatron_cpp::test_support {

/// A group of the same ranks whose CPU backend refuses and returns what ProcessGroupNCCL refuses and returns, and
/// leaves the work to `group`'s:
///  - where asyncOp is false the collective is done when the call returns, and there is no Work: null;
///  - otherwise nothing has happened until Work::wait, or a later collective of the group, and the output holds
///    nonsense: as on a stream that isn't waited for. An input that is written to meanwhile spoils the result;
///  - one tensor a call, contiguous, of matching sizes and dtypes: else c10::ValueError.
/// A Work that nobody has waited for fails the running test. Not collective.
parallel::GroupPtr like_nccl(const parallel::GroupPtr& group);

}  // namespace megatron_cpp::test_support
