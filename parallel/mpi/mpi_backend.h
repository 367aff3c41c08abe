// A c10d::Backend over MPI, for tensors on the CPU.
#pragma once

#include <chrono>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <vector>

#include "parallel/mpi/mpi_communicator.h"

namespace megatron_cpp::parallel {

class RollCall;
class SharedWindow;
struct CollectiveCall;

/// What a backend may wait for and take.
struct MpiBackendOptions {
  /// How long one collective may wait for its peers.
  std::chrono::milliseconds timeout;
  /// Most bytes of this host's shared memory that the group may take; docs/communication.md says what it takes.
  int64_t shared_memory_limit = std::numeric_limits<int64_t>::max();
};

/// MPI collectives behind c10d's interface. One process group can carry it beside NCCL (ProcessGroup::setBackend).
///
/// Tensors: on the CPU, any strides (outputs that aren't contiguous are filled through a copy), float64, float32,
/// bfloat16, float16, int64, int32, uint8 or bool. MPI only moves bytes; sums are made here, in the order of the ranks,
/// bfloat16 and float16 accumulated in float32 and rounded once. So a sum has the same bits on every rank.
///
/// Large reductions of ranks on one host go through memory that they share instead, with the same bits. It is made at
/// the first of them; if the host hasn't got it, rank 0 says so on stderr and MPI goes on moving the bytes. Where
/// nothing is summed there is nothing to gain: Open MPI gathers and exchanges with one copy, in 1.1 to 1.2 times a
/// memcpy's time at 33.5 MB and 1.8 to 2.1 times at 1 MB (2 ranks), and a window needs two.
///
/// Every call finishes before it returns: Open MPI makes no progress on a non-blocking collective while this thread
/// computes, so there is nothing to overlap with. Calls start non-blocking and are polled, so that a peer that never
/// arrives becomes an error after `timeout`, not a hang.
///
/// Collective over the communicator's ranks, same operations in the same order. Throws c10::DistBackendError naming
/// operation, group, sizes and the ranks that are silent on a timeout; c10::ValueError before anything is sent for a
/// tensor that isn't on the CPU, has another dtype, or whose size doesn't fit the group, and for a reduction that isn't
/// SUM, AVG (of floating-point numbers), PRODUCT, MIN or MAX. MPI counts to 2^31 - 1 elements for one rank, and in all
/// of an uneven exchange; what is more is a c10::ValueError on the ranks that it concerns.
class MpiBackend final : public c10d::Backend {
 public:
  /// Collective over the communicator's ranks.
  /// @param name     the group's name in messages ("tp").
  /// @param options  the same on every rank, but for shared_memory_limit.
  MpiBackend(MpiCommunicator communicator, const std::string& name, const MpiBackendOptions& options);
  ~MpiBackend() override;

  /// "mpi".
  const std::string getBackendName() const override { return "mpi"; }
  /// For the calls from now on; options of a single call that carry a timeout go before it.
  void setTimeout(std::chrono::milliseconds timeout) override { options_.timeout = timeout; }

  /// Tensors that are filled, one after the other, with those of rank options.rootRank.
  c10::intrusive_ptr<c10d::Work> broadcast(std::vector<at::Tensor>& tensors,
                                           const c10d::BroadcastOptions& options) override;
  /// Tensors that are reduced in place, one after the other.
  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<at::Tensor>& tensors,
                                           const c10d::AllreduceOptions& options) override;
  /// Output tensors may differ in size between ranks (uneven gather).
  c10::intrusive_ptr<c10d::Work> allgather(std::vector<std::vector<at::Tensor>>& outputs,
                                           std::vector<at::Tensor>& inputs,
                                           const c10d::AllgatherOptions& options) override;
  /// `input` of every rank, one after the other, into `output` of t times its elements.
  c10::intrusive_ptr<c10d::Work> _allgather_base(at::Tensor& output, at::Tensor& input,
                                                 const c10d::AllgatherOptions& options) override;
  /// `input` has t times the elements of `output`: rank r gets the r-th of t equal shares, reduced.
  c10::intrusive_ptr<c10d::Work> _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                                      const c10d::ReduceScatterOptions& options) override;
  /// Split sizes count rows of dimension 0; empty means equal splits.
  c10::intrusive_ptr<c10d::Work> alltoall_base(at::Tensor& output, at::Tensor& input,
                                               std::vector<int64_t>& output_split_sizes,
                                               std::vector<int64_t>& input_split_sizes,
                                               const c10d::AllToAllOptions& options) override;
  /// Returns when every rank of the group has called it, or throws after the timeout.
  c10::intrusive_ptr<c10d::Work> barrier(const c10d::BarrierOptions& options) override;
  /// Nothing to shut down: every call has finished before it returned.
  void shutdown() override {}

 private:
  struct InFlight;
  /// This group's next collective, for messages and deadlines.
  CollectiveCall call(const char* operation, int64_t elements, std::chrono::milliseconds requested_timeout);
  /// Polls `request` until it is complete; throws when the deadline passes, keeping `in_flight` for good, because MPI
  /// may still use it.
  void finish(MPI_Request request, const CollectiveCall& call, InFlight in_flight);
  /// Exchanges `counts` elements with every rank: MPI_Ialltoallv on contiguous tensors.
  void exchange(const at::Tensor& output, const std::vector<int64_t>& output_counts, const at::Tensor& input,
                const std::vector<int64_t>& input_counts, const CollectiveCall& call);
  /// Gathers `input` of every rank into `output` [t * numel]: MPI_Iallgather on contiguous tensors.
  void gather_to_all(const at::Tensor& output, const at::Tensor& input, const CollectiveCall& call);
  /// Sums (or whatever) the elements of all ranks, with MPI's messages: contiguous vectors; `output` may be `input`.
  void all_reduce_by_messages(const at::Tensor& output, const at::Tensor& input, c10d::ReduceOp::RedOpType reduction,
                              const CollectiveCall& call);
  /// The window for reducing `input`, made if need be; null where MPI's messages are the way. The same on every rank.
  SharedWindow* window_for(const at::Tensor& input, const CollectiveCall& call);

  MpiCommunicator communicator_;
  std::unique_ptr<RollCall> roll_call_;
  std::string where_;  ///< "group tp, rank 0 of 2"
  MpiBackendOptions options_;
  int64_t num_calls_ = 0;  ///< so far: the same on every rank
  enum class WindowState { kNotTried, kBeingMade, kKnown };
  WindowState window_state_ = WindowState::kNotTried;
  std::unique_ptr<SharedWindow> window_;
};

}  // namespace megatron_cpp::parallel
