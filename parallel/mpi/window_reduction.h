// Reductions through the memory that the ranks of one host share.
#pragma once

#include <ATen/core/Tensor.h>

#include <torch/csrc/distributed/c10d/Types.hpp>

#include "parallel/mpi/shared_window.h"

namespace megatron_cpp::parallel {

/// Reduces `input` of every rank in the order of the ranks; rank r keeps the r-th of t equal shares. Each rank reads
/// its input once and writes its share once; in between the values stay in cache, if it is large enough.
/// @param output  [n], contiguous, shares no memory with `input`.
/// @param input   [t * n], contiguous, of output's dtype.
/// Collective over the window's ranks. Throws c10::DistBackendError when a rank doesn't arrive; after any exception the
/// window is unusable.
void reduce_scatter_in_window(SharedWindow& window, const at::Tensor& output, const at::Tensor& input,
                              c10d::ReduceOp::RedOpType reduction, const CollectiveCall& call);

/// The same, and every rank gets all shares; n need not be divisible by t.
/// @param output  [n], contiguous; may be `input` itself.
/// @param input   [n], contiguous, of output's dtype.
void all_reduce_in_window(SharedWindow& window, const at::Tensor& output, const at::Tensor& input,
                          c10d::ReduceOp::RedOpType reduction, const CollectiveCall& call);

}  // namespace megatron_cpp::parallel
