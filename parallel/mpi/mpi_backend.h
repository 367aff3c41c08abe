// A c10d::Backend over MPI, for tensors on the CPU.
#pragma once

#include <chrono>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <vector>

#include "parallel/activity.h"
#include "parallel/mpi/mpi_communicator.h"

namespace megatron_cpp::parallel {

class SharedWindow;
struct CollectiveCall;

/// Limits of a backend.
struct MpiBackendOptions {
  /// How long one collective may wait for its peers.
  std::chrono::milliseconds timeout;
  /// Most bytes of this host's shared memory that the group may use; docs/communication.md says how many it uses.
  int64_t shared_memory_limit = std::numeric_limits<int64_t>::max();
};

/// MPI collectives behind c10d's interface. One process group can carry it beside NCCL (ProcessGroup::setBackend).
///
/// Tensors: on the CPU, any strides (outputs that aren't contiguous are filled through a copy), float64, float32,
/// bfloat16, float16, int64, int32, uint8 or bool. MPI only moves bytes; this class sums, in the order of the ranks;
/// bfloat16 and float16 are accumulated in float32 and rounded once. So a sum has the same bits on every rank.
///
/// If all ranks are on one host, large reductions go through shared memory instead, with the same bits. The first of
/// them allocates it; if the host has too little, rank 0 reports that on stderr and MPI moves the bytes. All-gather and
/// all-to-all don't use it: Open MPI copies once, in 1.1 to 1.2 times a memcpy's time at 33.5 MB and 1.8 to 2.1 times
/// at 1 MB (2 ranks), while shared memory needs two copies.
///
/// Every call finishes before it returns: Open MPI makes no progress on a non-blocking collective while this thread
/// computes, so nothing could overlap. Calls start non-blocking and are polled, so that a peer that never arrives
/// becomes an error after `timeout`, not a hang.
///
/// Collective over the communicator's ranks, same operations in the same order. Throws c10::DistBackendError naming
/// operation, group, sizes and the ranks that haven't come on a timeout; c10::ValueError before anything is sent for a
/// tensor that isn't on the CPU, has another dtype, or whose size doesn't fit the group, and for a reduction that isn't
/// SUM, AVG (of floating-point numbers), PRODUCT, MIN or MAX. MPI's limit is 2^31 - 1 elements per rank, and in total
/// for all-to-all and uneven all-gather; beyond it the ranks concerned throw c10::ValueError.
class MpiBackend final : public c10d::Backend {
 public:
  /// Collective over the communicator's ranks.
  /// @param name     the group's name in messages ("tp").
  /// @param options  the same on every rank, except shared_memory_limit.
  MpiBackend(MpiCommunicator communicator, const std::string& name, const MpiBackendOptions& options);
  ~MpiBackend() override;

  /// "mpi".
  const std::string getBackendName() const override { return "mpi"; }
  /// For later calls; a timeout in the options of a call takes precedence.
  void setTimeout(std::chrono::milliseconds timeout) override { options_.timeout = timeout; }

  /// Fills each tensor with that of rank options.rootRank, one after the other.
  c10::intrusive_ptr<c10d::Work> broadcast(std::vector<at::Tensor>& tensors,
                                           const c10d::BroadcastOptions& options) override;
  /// Reduces each tensor in place, one after the other.
  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<at::Tensor>& tensors,
                                           const c10d::AllreduceOptions& options) override;
  /// Output tensors may differ in size between ranks (uneven gather).
  c10::intrusive_ptr<c10d::Work> allgather(std::vector<std::vector<at::Tensor>>& outputs,
                                           std::vector<at::Tensor>& inputs,
                                           const c10d::AllgatherOptions& options) override;
  /// Gathers `input` of every rank, in the order of the ranks, into `output`, which has t times its elements. It may be
  /// this rank's share of the output.
  c10::intrusive_ptr<c10d::Work> _allgather_base(at::Tensor& output, at::Tensor& input,
                                                 const c10d::AllgatherOptions& options) override;
  /// `input` has t times the elements of `output`: rank r gets the r-th of t equal shares, reduced. The output may lie
  /// in the input.
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
  /// Describes and records this group's next collective.
  CollectiveCall call(const char* operation, int64_t elements, std::chrono::milliseconds requested_timeout,
                      internal::Sizes sizes = internal::Sizes::kEqual);
  /// Polls `request` until it is complete; throws after the timeout, and then never frees `in_flight`, because MPI may
  /// still use it.
  void finish(MPI_Request request, const CollectiveCall& call, InFlight in_flight);
  /// Sends input_counts[r] elements to each rank r and receives output_counts[r]: MPI_Ialltoallv on contiguous tensors.
  void exchange(const at::Tensor& output, const std::vector<int64_t>& output_counts, const at::Tensor& input,
                const std::vector<int64_t>& input_counts, const CollectiveCall& call);
  /// Gathers `input` of every rank into `output` [t * numel]: MPI_Iallgather on contiguous tensors, in place if they
  /// share memory.
  void gather_to_all(const at::Tensor& output, const at::Tensor& input, const CollectiveCall& call);
  /// Reduces the elements of all ranks with MPI messages: contiguous 1-d tensors; `output` may be `input`.
  void all_reduce_by_messages(const at::Tensor& output, const at::Tensor& input, c10d::ReduceOp::RedOpType reduction,
                              const CollectiveCall& call);
  /// The window for reducing `input`, made at its first use; null if MPI messages are used. Ranks decide alike.
  SharedWindow* window_for(const at::Tensor& input, const CollectiveCall& call);

  MpiCommunicator communicator_;
  std::string name_;
  std::string where_;  ///< "group tp, rank 0 of 2"
  MpiBackendOptions options_;
  enum class WindowState { kNotTried, kBeingMade, kKnown };
  WindowState window_state_ = WindowState::kNotTried;
  std::unique_ptr<SharedWindow> window_;
};

}  // namespace megatron_cpp::parallel
