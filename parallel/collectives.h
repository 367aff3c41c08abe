// Collectives on tensors, out of place and without gradient (mappings.h has the differentiable ones).
//
// All are collective over `group`: every rank calls them with the same shapes and dtype, in the same order. Inputs are
// made contiguous; a group of one rank sends nothing and returns its input (detached). They pass on the backend's
// c10::DistBackendError (a peer doesn't arrive in time) and c10::ValueError; any other exception of a backend becomes a
// c10::DistBackendError that names operation, shape, group and rank.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceType.h>

#include <functional>
#include <vector>

#include "parallel/group.h"

namespace megatron_cpp::parallel {

/// How all_reduce combines the ranks' values, element by element.
enum class Reduction { kSum, kMax, kMin };

/// The result of a collective that may still be running: on NCCL it overlaps with work issued after it.
class PendingTensor {
 public:
  /// `tensor` is complete once `wait` has returned.
  PendingTensor(at::Tensor tensor, std::function<void()> wait);
  /// The result; work issued after this call sees it complete. Call it once.
  at::Tensor wait();

 private:
  at::Tensor tensor_;
  std::function<void()> wait_;
};

/// Sum (or maximum, minimum) of `input` over the ranks, same shape. Sends 2(t-1)/t of the tensor.
at::Tensor all_reduce(const at::Tensor& input, const GroupPtr& group, Reduction reduction = Reduction::kSum);

/// all_reduce into `tensor` itself, which must be contiguous: for buffers too large to hold twice.
void all_reduce_in_place(at::Tensor& tensor, const GroupPtr& group, Reduction reduction = Reduction::kSum);

/// Starts an all_reduce_in_place (sum).
PendingTensor start_all_reduce_in_place(const at::Tensor& tensor, const GroupPtr& group);

/// [R, ...] of each rank -> [t*R, ...], in the order of the ranks. Sends (t-1)/t of the result.
at::Tensor all_gather(const at::Tensor& input, const GroupPtr& group);

/// [rows[r], ...] of each rank r -> [sum of rows, ...], in the order of the ranks; ranks may have none. Sends this
/// rank's rows to each of the others.
/// @param rows  one number per rank, the same list on every rank.
at::Tensor all_gather_uneven(const at::Tensor& input, const std::vector<int64_t>& rows, const GroupPtr& group);

/// Starts an all_gather.
PendingTensor start_all_gather(const at::Tensor& input, const GroupPtr& group);

/// Starts an all_gather of each rank's rows [r*R/t, (r+1)*R/t) of `tensor`, [R, ...] and contiguous, into `tensor`
/// itself.
PendingTensor start_all_gather_in_place(const at::Tensor& tensor, const GroupPtr& group);

/// Whether a collective on tensors of this device that was started goes on while the calling thread computes: over NCCL
/// and Gloo. The others have finished when the call that starts them returns. Not collective.
bool overlaps_computation(const GroupPtr& group, c10::DeviceType device);

/// [..., C] of each rank -> [..., t*C]. Sends (t-1)/t of the result.
at::Tensor all_gather_last_dim(const at::Tensor& input, const GroupPtr& group);

/// [R, ...], R divisible by t -> this rank's R/t rows of the sum. Sends (t-1)/t of the input.
/// @throws c10::ValueError if R % t != 0.
at::Tensor reduce_scatter(const at::Tensor& input, const GroupPtr& group);

/// [sum of rows, ...] -> this rank's rows[r] of the sum over the ranks, added in the order of the ranks. Equal rows: a
/// reduce_scatter. Otherwise an all_to_all: backends scatter only equal shares.
/// @param rows  one number per rank, the same list on every rank; ranks may have none.
at::Tensor reduce_scatter_uneven(const at::Tensor& input, const std::vector<int64_t>& rows, const GroupPtr& group);

/// Starts a reduce_scatter.
PendingTensor start_reduce_scatter(const at::Tensor& input, const GroupPtr& group);

/// Starts a reduce_scatter that leaves this rank's rows of the sum in its rows [r*R/t, (r+1)*R/t) of `tensor` itself,
/// which must be contiguous: for buffers too large to hold twice. The result is `tensor`; its other rows are undefined.
PendingTensor start_reduce_scatter_in_place(const at::Tensor& tensor, const GroupPtr& group);

/// [..., C], C divisible by t -> this rank's C/t columns of the sum. Sends (t-1)/t of the input.
/// @throws c10::ValueError if C % t != 0.
at::Tensor reduce_scatter_last_dim(const at::Tensor& input, const GroupPtr& group);

/// Sends input_splits[q] rows to each rank q, in order, and receives output_splits[q] from it; empty splits mean equal
/// splits. Sends all but this rank's own rows.
at::Tensor all_to_all(const at::Tensor& input, const std::vector<int64_t>& output_splits,
                      const std::vector<int64_t>& input_splits, const GroupPtr& group);

/// The tensor of rank `root`; on the others `input` gives shape and dtype. Sends (t-1)/t of the tensor.
at::Tensor broadcast(const at::Tensor& input, int root, const GroupPtr& group);

/// Returns when every rank of the group has called it.
void barrier(const GroupPtr& group);

}  // namespace megatron_cpp::parallel
