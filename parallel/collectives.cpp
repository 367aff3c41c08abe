#include "parallel/collectives.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <optional>
#include <string>
#include <utility>

#include "parallel/activity.h"
#include "parallel/c10d_calls.h"
#include "parallel/errors.h"
#include "parallel/named_range.h"
#include "parallel/shard.h"

namespace megatron_cpp::parallel {
namespace {

c10d::ReduceOp reduce_op(Reduction reduction) {
  switch (reduction) {
    case Reduction::kSum:
      return c10d::ReduceOp::SUM;
    case Reduction::kMax:
      return c10d::ReduceOp::MAX;
    case Reduction::kMin:
      return c10d::ReduceOp::MIN;
  }
  TORCH_INTERNAL_ASSERT(false);
}

using internal::Sizes;

/// Runs a collective, records it (activity.h) and names it in exceptions, except in those that backends make
/// themselves, which name it already.
/// @param tensor  undefined for a barrier.
/// @param number  of the collective in its group; nothing: it is the next one, and its number is written here.
template <class Call>
auto named(const char* operation, const at::Tensor& tensor, const GroupPtr& group, const Call& call, Sizes sizes,
           std::optional<int64_t>& number) {
  const internal::InCollective record(group->getGroupName(), operation, tensor.defined() ? tensor.numel() : 0, sizes,
                                      number);
  number = record.number();
  const NamedRange range([&] {
    return c10::str(operation, " over ", group->getGroupName(),
                    tensor.defined() ? c10::str(", ", tensor.numel(), " elements") : "");
  });
  try {
    return call();
  } catch (const c10::DistBackendError&) {
    throw;
  } catch (const c10::ValueError&) {
    throw;
  } catch (const std::exception& error) {
    const auto size = tensor.defined() ? c10::str(" of ", tensor.sizes(), " ", tensor.scalar_type()) : "";
    TORCH_CHECK_WITH(DistBackendError, false, operation, size, " (group ", group->getGroupName(), ", rank ",
                     group->getRank(), " of ", group->getSize(), ") failed: ", error_text(error));
  }
}

template <class Call>
auto named(const char* operation, const at::Tensor& tensor, const GroupPtr& group, const Call& call,
           Sizes sizes = Sizes::kEqual) {
  std::optional<int64_t> number;
  return named(operation, tensor, group, call, sizes, number);
}

/// Where asyncOp is false NCCL runs the collective on the current stream and returns no Work; MPI returns one.
void wait_for(const c10::intrusive_ptr<c10d::Work>& work) {
  if (work) work->wait();
}

/// Starts the collective that `call` issues; the result holds its Work until it is waited for.
template <class Call>
PendingTensor pending(const char* operation, at::Tensor output, at::Tensor input, GroupPtr group, const Call& call) {
  std::optional<int64_t> number;
  auto work = named(operation, input, group, call, Sizes::kEqual, number);
  // Held with the Work, since the input must outlive the collective on its stream.
  return {std::move(output),
          [operation, number, work = std::move(work), input = std::move(input), group = std::move(group)]() mutable {
            named(
                operation, input, group, [&] { wait_for(work); }, Sizes::kEqual, number);
          }};
}

PendingTensor finished(at::Tensor output) {
  return {std::move(output), [] {}};
}

void broadcast_in_place(const at::Tensor& tensor, int root, const GroupPtr& group) {
  c10d::BroadcastOptions options;
  options.rootRank = root;
  options.asyncOp = false;
  std::vector<at::Tensor> tensors{tensor};
  named("broadcast", tensor, group, [&] { wait_for(group->broadcast(tensors, options)); });
}

/// [t*R, ..., C] -> [R, ..., t*C]: blocks of rows become blocks of columns.
at::Tensor rows_to_columns(const at::Tensor& gathered, int t) {
  auto parts = gathered.chunk(t, 0);
  return at::cat(parts, -1);
}

at::Tensor columns_to_rows(const at::Tensor& input, int t) { return at::cat(input.chunk(t, -1), 0); }

void check_has_dimension(const at::Tensor& input, const char* operation) {
  TORCH_CHECK_VALUE(input.dim() > 0, operation, ": a tensor without dimensions has no rows");
}

void check_contiguous(const at::Tensor& tensor, const char* operation) {
  TORCH_CHECK_VALUE(tensor.is_contiguous(), operation, " in place needs a contiguous tensor, got strides ",
                    tensor.strides());
}

/// This rank's share of the rows of a contiguous tensor. A view.
at::Tensor own_rows(const at::Tensor& tensor, const GroupPtr& group, const char* operation) {
  check_contiguous(tensor, operation);
  check_has_dimension(tensor, operation);
  const int64_t rows =
      even_shard_size(tensor.size(0), group->getSize(), std::string(operation) + ": number of rows", "group");
  return tensor.detach().narrow(0, group->getRank() * rows, rows);
}

}  // namespace

PendingTensor::PendingTensor(at::Tensor tensor, std::function<void()> wait)
    : tensor_(std::move(tensor)), wait_(std::move(wait)) {}

at::Tensor PendingTensor::wait() {
  wait_();
  return std::move(tensor_);
}

at::Tensor all_reduce(const at::Tensor& input, const GroupPtr& group, Reduction reduction) {
  if (group->getSize() == 1) return input.detach();
  auto result = input.detach().clone(at::MemoryFormat::Contiguous);
  all_reduce_in_place(result, group, reduction);
  return result;
}

void all_reduce_in_place(at::Tensor& tensor, const GroupPtr& group, Reduction reduction) {
  if (group->getSize() == 1) return;
  check_contiguous(tensor, "all_reduce");
  c10d::AllreduceOptions options;
  options.reduceOp = reduce_op(reduction);
  options.asyncOp = false;
  std::vector<at::Tensor> tensors{tensor};
  named("all_reduce", tensor, group, [&] { wait_for(group->allreduce(tensors, options)); });
}

PendingTensor start_all_reduce_in_place(const at::Tensor& tensor, const GroupPtr& group) {
  if (group->getSize() == 1) return finished(tensor);
  check_contiguous(tensor, "all_reduce");
  std::vector<at::Tensor> tensors{tensor};
  return pending("all_reduce", tensor, tensor, group, [&] { return group->allreduce(tensors); });
}

PendingTensor start_all_gather(const at::Tensor& input, const GroupPtr& group) {
  if (group->getSize() == 1) return finished(input.detach());
  check_has_dimension(input, "all_gather");
  auto contiguous = input.detach().contiguous();
  auto shape = input.sizes().vec();
  shape[0] *= group->getSize();
  auto output = at::empty(shape, contiguous.options());
  return pending("all_gather", output, contiguous, group,
                 [&] { return all_gather_single(*group, output, contiguous); });
}

PendingTensor start_all_gather_in_place(const at::Tensor& tensor, const GroupPtr& group) {
  if (group->getSize() == 1) return finished(tensor);
  auto own = own_rows(tensor, group, "all_gather");
  auto output = tensor;
  return pending("all_gather", output, own, group, [&] { return all_gather_single(*group, output, own); });
}

at::Tensor all_gather(const at::Tensor& input, const GroupPtr& group) { return start_all_gather(input, group).wait(); }

bool overlaps_computation(const GroupPtr& group, c10::DeviceType device) {
  const auto name = group->getBackend(device)->getBackendName();
  return name != "mpi" && name != "staged";
}

namespace {

/// Backends move equal shares faster.
bool are_equal(const std::vector<int64_t>& rows) {
  return std::adjacent_find(rows.begin(), rows.end(), std::not_equal_to<>()) == rows.end();
}

}  // namespace

at::Tensor all_gather_uneven(const at::Tensor& input, const std::vector<int64_t>& rows, const GroupPtr& group) {
  if (group->getSize() == 1) return input.detach();
  check_has_dimension(input, "all_gather_uneven");
  const auto own = static_cast<size_t>(group->getRank());
  TORCH_CHECK_VALUE(rows.size() == static_cast<size_t>(group->getSize()) && input.size(0) == rows[own],
                    "all_gather_uneven: ", input.sizes(), " does not have this rank's rows of ", at::IntArrayRef(rows));
  if (are_equal(rows)) return all_gather(input, group);
  auto shape = input.sizes().vec();
  shape[0] = std::accumulate(rows.begin(), rows.end(), int64_t{0});
  const auto contiguous = input.detach().contiguous();
  auto output = at::empty(shape, contiguous.options());
  std::vector<std::vector<at::Tensor>> outputs{output.split_with_sizes(rows)};
  // ProcessGroupGloo gathers only shares of equal size: with it each rank broadcasts its rows.
  if (group->getBackend(contiguous.device().type())->getBackendName() == "gloo") {
    outputs.front()[own].copy_(contiguous);
    for (size_t rank = 0; rank < rows.size(); ++rank) {
      if (rows[rank] > 0) broadcast_in_place(outputs.front()[rank], static_cast<int>(rank), group);
    }
    return output;
  }
  std::vector<at::Tensor> inputs{contiguous};
  c10d::AllgatherOptions options;
  options.asyncOp = false;
  named(
      "all_gather", input, group, [&] { wait_for(group->allgather(outputs, inputs, options)); }, Sizes::kMayDiffer);
  return output;
}

at::Tensor all_gather_last_dim(const at::Tensor& input, const GroupPtr& group) {
  if (group->getSize() == 1) return input.detach();
  check_has_dimension(input, "all_gather_last_dim");
  if (input.dim() == 1) return all_gather(input, group);
  return rows_to_columns(all_gather(input, group), group->getSize());
}

PendingTensor start_reduce_scatter(const at::Tensor& input, const GroupPtr& group) {
  if (group->getSize() == 1) return finished(input.detach());
  check_has_dimension(input, "reduce_scatter");
  auto shape = input.sizes().vec();
  shape[0] = even_shard_size(shape[0], group->getSize(), "reduce_scatter: number of rows", "group");
  auto contiguous = input.detach().contiguous();
  auto output = at::empty(shape, contiguous.options());
  return pending("reduce_scatter", output, contiguous, group,
                 [&] { return reduce_scatter_single(*group, output, contiguous); });
}

PendingTensor start_reduce_scatter_in_place(const at::Tensor& tensor, const GroupPtr& group) {
  if (group->getSize() == 1) return finished(tensor);
  auto own = own_rows(tensor, group, "reduce_scatter");
  auto input = tensor;
  return pending("reduce_scatter", tensor, tensor, group, [&] { return reduce_scatter_single(*group, own, input); });
}

at::Tensor reduce_scatter(const at::Tensor& input, const GroupPtr& group) {
  return start_reduce_scatter(input, group).wait();
}

at::Tensor reduce_scatter_uneven(const at::Tensor& input, const std::vector<int64_t>& rows, const GroupPtr& group) {
  const int t = group->getSize();
  if (t == 1) return input.detach();
  check_has_dimension(input, "reduce_scatter_uneven");
  const auto total = std::accumulate(rows.begin(), rows.end(), int64_t{0});
  TORCH_CHECK_VALUE(rows.size() == static_cast<size_t>(t) && input.size(0) == total,
                    "reduce_scatter_uneven: ", input.sizes(), " is not made of the rows ", at::IntArrayRef(rows));
  if (are_equal(rows)) return reduce_scatter(input, group);
  const int64_t own = rows[static_cast<size_t>(group->getRank())];
  const auto summands = all_to_all(input, std::vector<int64_t>(static_cast<size_t>(t), own), rows, group);
  auto sum = summands.narrow(0, 0, own).clone();
  for (int64_t rank = 1; rank < t; ++rank) sum.add_(summands.narrow(0, rank * own, own));
  return sum;
}

at::Tensor reduce_scatter_last_dim(const at::Tensor& input, const GroupPtr& group) {
  if (group->getSize() == 1) return input.detach();
  check_has_dimension(input, "reduce_scatter_last_dim");
  even_shard_size(input.size(-1), group->getSize(), "reduce_scatter_last_dim: number of columns", "group");
  if (input.dim() == 1) return reduce_scatter(input, group);
  return reduce_scatter(columns_to_rows(input, group->getSize()), group);
}

at::Tensor all_to_all(const at::Tensor& input, const std::vector<int64_t>& output_splits,
                      const std::vector<int64_t>& input_splits, const GroupPtr& group) {
  if (group->getSize() == 1) return input.detach();
  check_has_dimension(input, "all_to_all");
  auto contiguous = input.detach().contiguous();
  auto shape = input.sizes().vec();
  if (!output_splits.empty()) shape[0] = std::accumulate(output_splits.begin(), output_splits.end(), int64_t{0});
  auto output = at::empty(shape, contiguous.options());
  auto receive = output_splits;
  auto send = input_splits;
  c10d::AllToAllOptions options;
  options.asyncOp = false;
  named(
      "all_to_all", input, group,
      [&] { wait_for(all_to_all_single(*group, output, contiguous, receive, send, options)); }, Sizes::kMayDiffer);
  return output;
}

at::Tensor broadcast(const at::Tensor& input, int root, const GroupPtr& group) {
  if (group->getSize() == 1) return input.detach();
  const auto result = input.detach().clone(at::MemoryFormat::Contiguous);
  broadcast_in_place(result, root, group);
  return result;
}

void barrier(const GroupPtr& group) {
  named("barrier", {}, group, [&] { wait_for(group->barrier()); });
}

}  // namespace megatron_cpp::parallel
