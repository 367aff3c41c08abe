#include "parallel/mpi/mpi_backend.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "parallel/finished_work.h"
#include "parallel/mpi/collective_call.h"
#include "parallel/mpi/mpi_check.h"
#include "parallel/mpi/rank_order_reduction.h"
#include "parallel/mpi/shared_window.h"
#include "parallel/mpi/window_reduction.h"

namespace megatron_cpp::parallel {
namespace {

using Milliseconds = std::chrono::milliseconds;

/// MPI only moves values of this width; it never computes with them.
MPI_Datatype transport_type(const at::Tensor& tensor) {
  switch (tensor.element_size()) {
    case 1:
      return MPI_UINT8_T;
    case 2:
      return MPI_UINT16_T;
    case 4:
      return MPI_UINT32_T;
    default:
      return MPI_UINT64_T;
  }
}

int to_count(int64_t elements, const CollectiveCall& call) {
  TORCH_CHECK_VALUE(elements <= std::numeric_limits<int>::max(), call.operation, ": ", elements,
                    " elements for one rank, or in all, exceed MPI's count of ", std::numeric_limits<int>::max(), " (",
                    call.where, ")");
  return static_cast<int>(elements);
}

void check_tensor(const at::Tensor& tensor, const char* operation, const std::string& where) {
  TORCH_CHECK_VALUE(tensor.defined() && tensor.is_cpu(), operation, ": the MPI backend takes tensors on the CPU, got ",
                    tensor.defined() ? tensor.device().str() : "an undefined one", " (", where, ")");
  switch (tensor.scalar_type()) {
    case at::kDouble:
    case at::kFloat:
    case at::kBFloat16:
    case at::kHalf:
    case at::kLong:
    case at::kInt:
    case at::kByte:
    case at::kBool:
      return;
    default:
      TORCH_CHECK_VALUE(false, operation, ": dtype ", tensor.scalar_type(), " is not supported by the MPI backend (",
                        where, ")");
  }
}

/// `tensor` itself if it is contiguous, otherwise a new tensor to fill and to copy back from.
at::Tensor contiguous_or_new(const at::Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : at::empty(tensor.sizes(), tensor.options());
}

void copy_back(const at::Tensor& target, const at::Tensor& values) {
  if (!target.is_same(values)) target.copy_(values);
}

/// Up to this many bytes an all-reduce gathers all inputs and sums them: one MPI collective instead of two.
constexpr int64_t kGatherBytes = 1 << 14;

/// From this many bytes of input on, a reduction uses the shared window: it takes 0.4 of the time of MPI messages if
/// each rank has a core (reduce-scatter and all-reduce, 2 ranks), and the same time if 4 ranks share 2 cores.
constexpr int64_t kWindowBytes = 1 << 14;

}  // namespace

/// What MPI reads and writes until a request is complete.
struct MpiBackend::InFlight {
  std::vector<at::Tensor> tensors;
  std::vector<int> counts;
};

MpiBackend::MpiBackend(MpiCommunicator communicator, const std::string& name, const MpiBackendOptions& options)
    : c10d::Backend(communicator.rank(), communicator.size()),
      communicator_(std::move(communicator)),
      name_(name),
      where_(fmt::format("group {}, rank {} of {}", name, rank_, size_)),
      options_(options) {
  internal::know_group(name_, world_rank(0, communicator_.get()));
}

MpiBackend::~MpiBackend() = default;

CollectiveCall MpiBackend::call(const char* operation, int64_t elements, Milliseconds requested_timeout,
                                internal::Sizes sizes) {
  const auto timeout = requested_timeout == c10d::kUnsetTimeout ? options_.timeout : requested_timeout;
  return {operation, elements, timeout, where_, communicator_.get(), {name_, operation, elements, sizes}};
}

void MpiBackend::finish(MPI_Request request, const CollectiveCall& call, InFlight in_flight) {
  PeerWait wait(call, /*spins=*/2000);
  do {
    int done = 0;
    MCPP_MPI_CHECK(MPI_Test(&request, &done, MPI_STATUS_IGNORE));
    if (done != 0) return;
  } while (wait.go_on());
  // Never freed, but reachable for leak checkers.
  static auto& kept = *new std::vector<InFlight>;
  kept.push_back(std::move(in_flight));
  throw_timed_out(call);
}

void MpiBackend::exchange(const at::Tensor& output, const std::vector<int64_t>& output_counts, const at::Tensor& input,
                          const std::vector<int64_t>& input_counts, const CollectiveCall& call) {
  const auto ranks = static_cast<size_t>(size_);
  InFlight in_flight{{output, input}, std::vector<int>(4 * ranks)};
  int* send_counts = in_flight.counts.data();
  int* send_begins = send_counts + ranks;
  int* receive_counts = send_begins + ranks;
  int* receive_begins = receive_counts + ranks;
  int64_t sent = 0;
  int64_t received = 0;
  for (size_t peer = 0; peer < ranks; ++peer) {
    send_counts[peer] = to_count(input_counts[peer], call);
    send_begins[peer] = to_count(sent, call);
    receive_counts[peer] = to_count(output_counts[peer], call);
    receive_begins[peer] = to_count(received, call);
    sent += input_counts[peer];
    received += output_counts[peer];
  }
  MPI_Request request = MPI_REQUEST_NULL;
  MCPP_MPI_CHECK(MPI_Ialltoallv(input.const_data_ptr(), send_counts, send_begins, transport_type(input),
                                output.mutable_data_ptr(), receive_counts, receive_begins, transport_type(output),
                                communicator_.get(), &request));
  finish(request, call, std::move(in_flight));
}

void MpiBackend::gather_to_all(const at::Tensor& output, const at::Tensor& input, const CollectiveCall& call) {
  const int count = to_count(input.numel(), call);
  const bool is_in_place = input.is_alias_of(output);  // then it lies where this rank's share belongs
  MPI_Request request = MPI_REQUEST_NULL;
  MCPP_MPI_CHECK(MPI_Iallgather(is_in_place ? MPI_IN_PLACE : input.const_data_ptr(), count, transport_type(input),
                                output.mutable_data_ptr(), count, transport_type(output), communicator_.get(),
                                &request));
  finish(request, call, {{output, input}, {}});
}

c10::intrusive_ptr<c10d::Work> MpiBackend::broadcast(std::vector<at::Tensor>& tensors,
                                                     const c10d::BroadcastOptions& options) {
  for (auto& tensor : tensors) {
    check_tensor(tensor, "broadcast", where_);
    const auto buffer = tensor.contiguous();
    const auto this_call = call("broadcast", buffer.numel(), options.timeout);
    MPI_Request request = MPI_REQUEST_NULL;
    MCPP_MPI_CHECK(MPI_Ibcast(buffer.mutable_data_ptr(), to_count(buffer.numel(), this_call), transport_type(buffer),
                              static_cast<int>(options.rootRank), communicator_.get(), &request));
    finish(request, this_call, {{buffer}, {}});
    copy_back(tensor, buffer);
  }
  return finished_work(tensors);
}

SharedWindow* MpiBackend::window_for(const at::Tensor& input, const CollectiveCall& call) {
  if (size_ == 1 || static_cast<int64_t>(input.nbytes()) < kWindowBytes) return nullptr;
  TORCH_CHECK_WITH(DistBackendError, window_state_ != WindowState::kBeingMade, call.operation, " of ", call.elements,
                   " elements cannot begin (", call.where, "): an earlier one of the group has failed");
  if (window_state_ == WindowState::kNotTried) {
    window_state_ = WindowState::kBeingMade;  // stays so if a rank doesn't arrive
    auto made = SharedWindow::make(rank_, size_, options_.shared_memory_limit, where_, [&](const at::Tensor& mine) {
      auto all = at::empty({size_}, mine.options());
      gather_to_all(all, mine, call);
      return all;
    });
    if (made) window_ = std::make_unique<SharedWindow>(std::move(*made));
    window_state_ = WindowState::kKnown;
  }
  return window_.get();
}

void MpiBackend::all_reduce_by_messages(const at::Tensor& output, const at::Tensor& input,
                                        c10d::ReduceOp::RedOpType reduction, const CollectiveCall& call) {
  const int64_t elements = input.numel();
  if (static_cast<int64_t>(input.nbytes()) <= kGatherBytes) {
    const auto parts = at::empty({size_, elements}, input.options());
    gather_to_all(parts, input, call);
    reduce_in_rank_order(output, parts.unbind(0), reduction);
    return;
  }
  // Reduce-scatter, ceil(elements / t) elements for each rank, then all-gather: sends (t-1)/t of the bytes twice.
  const int64_t share = (elements + size_ - 1) / size_;
  std::vector<int64_t> shares(static_cast<size_t>(size_));
  for (int peer = 0; peer < size_; ++peer) {
    shares[static_cast<size_t>(peer)] = std::clamp<int64_t>(elements - peer * share, 0, share);
  }
  const int64_t mine = shares[static_cast<size_t>(rank_)];
  const auto parts = at::empty({size_, mine}, input.options());
  exchange(parts, std::vector<int64_t>(shares.size(), mine), input, shares, call);
  const auto reduced = at::empty({share}, input.options());
  reduce_in_rank_order(reduced.narrow(0, 0, mine), parts.unbind(0), reduction);
  const auto gathered = at::empty({size_ * share}, input.options());
  gather_to_all(gathered, reduced, call);
  output.copy_(gathered.narrow(0, 0, elements));
}

c10::intrusive_ptr<c10d::Work> MpiBackend::allreduce(std::vector<at::Tensor>& tensors,
                                                     const c10d::AllreduceOptions& options) {
  for (auto& tensor : tensors) {
    check_tensor(tensor, "all_reduce", where_);
    check_reduction(options.reduceOp, tensor.scalar_type(), "all_reduce", where_);
    const auto values = tensor.contiguous().view({-1});
    const auto this_call = call("all_reduce", values.numel(), options.timeout);
    if (SharedWindow* window = window_for(values, this_call)) {
      all_reduce_in_window(*window, values, values, options.reduceOp, this_call);
    } else {
      all_reduce_by_messages(values, values, options.reduceOp, this_call);
    }
    if (!tensor.is_contiguous()) tensor.copy_(values.view(tensor.sizes()));
  }
  return finished_work(tensors);
}

c10::intrusive_ptr<c10d::Work> MpiBackend::allgather(std::vector<std::vector<at::Tensor>>& outputs,
                                                     std::vector<at::Tensor>& inputs,
                                                     const c10d::AllgatherOptions& options) {
  for (size_t i = 0; i < inputs.size(); ++i) {
    check_tensor(inputs[i], "all_gather", where_);
    TORCH_CHECK_VALUE(static_cast<int>(outputs[i].size()) == size_, "all_gather: ", outputs[i].size(),
                      " output tensors for ", where_);
    std::vector<int64_t> counts;
    counts.reserve(outputs[i].size());
    for (const auto& output : outputs[i]) {
      check_tensor(output, "all_gather", where_);
      TORCH_CHECK_VALUE(output.scalar_type() == inputs[i].scalar_type(), "all_gather: output ", output.scalar_type(),
                        " for input ", inputs[i].scalar_type(), " (", where_, ")");
      counts.push_back(output.numel());
    }
    TORCH_CHECK_VALUE(counts[static_cast<size_t>(rank_)] == inputs[i].numel(), "all_gather: this rank's output has ",
                      counts[static_cast<size_t>(rank_)], " elements, its input ", inputs[i].numel(), " (", where_,
                      ")");
    const auto input = inputs[i].contiguous().view({-1});
    const auto this_call = call("all_gather", input.numel(), options.timeout, internal::Sizes::kMayDiffer);
    InFlight in_flight{{}, std::vector<int>(2 * counts.size())};
    int* receive_counts = in_flight.counts.data();
    int* receive_begins = receive_counts + counts.size();
    int64_t total = 0;
    for (size_t peer = 0; peer < counts.size(); ++peer) {
      receive_counts[peer] = to_count(counts[peer], this_call);
      receive_begins[peer] = to_count(total, this_call);
      total += counts[peer];
    }
    const auto gathered = at::empty({total}, input.options());
    in_flight.tensors = {gathered, input};
    MPI_Request request = MPI_REQUEST_NULL;
    MCPP_MPI_CHECK(MPI_Iallgatherv(input.const_data_ptr(), to_count(input.numel(), this_call), transport_type(input),
                                   gathered.mutable_data_ptr(), receive_counts, receive_begins,
                                   transport_type(gathered), communicator_.get(), &request));
    finish(request, this_call, std::move(in_flight));
    int64_t begin = 0;
    for (auto& output : outputs[i]) {
      output.copy_(gathered.narrow(0, begin, output.numel()).view(output.sizes()));
      begin += output.numel();
    }
  }
  return finished_work(outputs.empty() ? std::vector<at::Tensor>{} : outputs.front());
}

c10::intrusive_ptr<c10d::Work> MpiBackend::_allgather_base(at::Tensor& output, at::Tensor& input,
                                                           const c10d::AllgatherOptions& options) {
  check_tensor(input, "all_gather", where_);
  check_tensor(output, "all_gather", where_);
  TORCH_CHECK_VALUE(output.numel() == size_ * input.numel() && output.scalar_type() == input.scalar_type(),
                    "all_gather: output ", output.sizes(), " ", output.scalar_type(), " does not hold ", size_,
                    " inputs ", input.sizes(), " ", input.scalar_type(), " (", where_, ")");
  const auto buffer = contiguous_or_new(output);
  TORCH_CHECK_VALUE(
      !input.is_alias_of(buffer) ||
          (input.is_contiguous() && input.storage_offset() == buffer.storage_offset() + rank_ * input.numel()),
      "all_gather: the input lies in the output, but not where this rank's share belongs (", where_, ")");
  gather_to_all(buffer, input.contiguous(), call("all_gather", input.numel(), options.timeout));
  copy_back(output, buffer);
  return finished_work({output});
}

c10::intrusive_ptr<c10d::Work> MpiBackend::_reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                                                const c10d::ReduceScatterOptions& options) {
  check_tensor(input, "reduce_scatter", where_);
  check_tensor(output, "reduce_scatter", where_);
  TORCH_CHECK_VALUE(input.numel() == size_ * output.numel() && output.scalar_type() == input.scalar_type(),
                    "reduce_scatter: input ", input.sizes(), " ", input.scalar_type(), " is not ", size_, " outputs ",
                    output.sizes(), " ", output.scalar_type(), " (", where_, ")");
  check_reduction(options.reduceOp, input.scalar_type(), "reduce_scatter", where_);
  const auto values = input.contiguous();
  // Not in the input's memory: a share is written while other shares of the input are still read.
  const bool is_apart = output.is_contiguous() && !output.is_alias_of(input);
  const auto buffer = is_apart ? output : at::empty(output.sizes(), output.options());
  const auto this_call = call("reduce_scatter", values.numel(), options.timeout);
  if (SharedWindow* window = window_for(values, this_call)) {
    reduce_scatter_in_window(*window, buffer, values, options.reduceOp, this_call);
  } else {
    const auto parts = at::empty({size_, output.numel()}, input.options());
    const std::vector<int64_t> counts(static_cast<size_t>(size_), output.numel());
    exchange(parts, counts, values, counts, this_call);
    reduce_in_rank_order(buffer.view({-1}), parts.unbind(0), options.reduceOp);
  }
  copy_back(output, buffer);
  return finished_work({output});
}

c10::intrusive_ptr<c10d::Work> MpiBackend::alltoall_base(at::Tensor& output, at::Tensor& input,
                                                         std::vector<int64_t>& output_split_sizes,
                                                         std::vector<int64_t>& input_split_sizes,
                                                         const c10d::AllToAllOptions& options) {
  check_tensor(input, "all_to_all", where_);
  check_tensor(output, "all_to_all", where_);
  TORCH_CHECK_VALUE(output.scalar_type() == input.scalar_type(), "all_to_all: output ", output.scalar_type(),
                    " for input ", input.scalar_type(), " (", where_, ")");
  auto element_counts = [&](const at::Tensor& tensor, const std::vector<int64_t>& splits, const char* which) {
    const int64_t rows = tensor.dim() == 0 ? 1 : tensor.size(0);
    if (splits.empty()) {
      TORCH_CHECK_VALUE(rows % size_ == 0, "all_to_all: ", rows, " ", which, " rows are not divisible by ", where_);
      return std::vector<int64_t>(static_cast<size_t>(size_), tensor.numel() / size_);
    }
    const int64_t sum = std::accumulate(splits.begin(), splits.end(), int64_t{0});
    TORCH_CHECK_VALUE(static_cast<int>(splits.size()) == size_ && sum == rows, "all_to_all: ", splits.size(), " ",
                      which, " splits of together ", sum, " rows for ", rows, " rows (", where_, ")");
    const int64_t row_elements = rows == 0 ? 0 : tensor.numel() / rows;
    auto counts = splits;
    for (auto& count : counts) count *= row_elements;
    return counts;
  };
  const auto output_counts = element_counts(output, output_split_sizes, "output");
  const auto input_counts = element_counts(input, input_split_sizes, "input");
  const auto buffer = contiguous_or_new(output);
  exchange(buffer, output_counts, input.contiguous(), input_counts,
           call("all_to_all", input.numel(), options.timeout, internal::Sizes::kMayDiffer));
  copy_back(output, buffer);
  return finished_work({output});
}

c10::intrusive_ptr<c10d::Work> MpiBackend::barrier(const c10d::BarrierOptions& options) {
  MPI_Request request = MPI_REQUEST_NULL;
  MCPP_MPI_CHECK(MPI_Ibarrier(communicator_.get(), &request));
  finish(request, call("barrier", 0, options.timeout), {});
  return finished_work({});
}

}  // namespace megatron_cpp::parallel
