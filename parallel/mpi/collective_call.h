// One collective of the MPI backend: its description, and waiting for its peers.
#pragma once

#include <mpi.h>

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "parallel/activity.h"

namespace megatron_cpp::parallel {

struct CollectiveCall {
  const char* operation;
  int64_t elements;
  std::chrono::milliseconds timeout;  ///< how long one wait for the peers may last
  std::string_view where;             ///< "group tp, rank 0 of 2"
  MPI_Comm communicator;              ///< polled while waiting: a peer's MPI call may need progress on this rank
  internal::InCollective record;      ///< this thread is in it as long as this lives
};

/// Asks all ranks what they are doing, which prints the report (stall_watch.h), and throws the c10::DistBackendError of
/// a collective that has waited too long. It names the ranks of the communicator that are silent; or the first that is
/// in no or another collective, and what that one is doing; or says that all wait.
[[noreturn]] void throw_timed_out(const CollectiveCall& call);

/// "rank 1 is silent", "ranks 1 and 3 are silent"; with their world ranks, which mpirun uses, where those differ. Not
/// collective.
std::string silent_ranks(const std::vector<int>& ranks, MPI_Comm communicator);

/// The rank of the world. Not collective.
int world_rank(int rank, MPI_Comm communicator);

/// One wait for the peers of a collective.
class PeerWait {
 public:
  /// @param spins  number of polls without yielding the core, so that short waits stay short.
  PeerWait(const CollectiveCall& call, int64_t spins) : call_(call), spins_(spins) {}

  /// Call it between two polls. False once the wait is longer than the collective's timeout.
  bool go_on();
  /// Whether the spins are used up.
  bool is_long() const { return begin_.has_value(); }

 private:
  using Clock = std::chrono::steady_clock;
  const CollectiveCall& call_;
  int64_t spins_;
  std::optional<Clock::time_point> begin_;
};

}  // namespace megatron_cpp::parallel
