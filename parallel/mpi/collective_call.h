// One collective of the MPI backend, as its messages name it and as waiting needs it.
#pragma once

#include <mpi.h>

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace megatron_cpp::parallel {

class RollCall;

struct CollectiveCall {
  const char* operation;
  int64_t elements;
  std::chrono::milliseconds timeout;  ///< how long one wait for the peers may last
  std::string_view where;             ///< "group tp, rank 0 of 2"
  MPI_Comm communicator;              ///< polled while waiting: a peer's MPI call may need this rank to go on
  int64_t number;                     ///< counts the group's collectives: the same on every rank of this one
  RollCall* roll_call;                ///< the group's
};

/// Throws the c10::DistBackendError of a collective that has waited too long.
/// @param reason  whose fault it is, as far as this rank knows: "rank 1 is silent".
[[noreturn]] void throw_timed_out(const CollectiveCall& call, const std::string& reason);

/// "rank 1 is silent", "ranks 1 and 3 are silent"; with their numbers in the world where those are others, since mpirun
/// goes by them. Not collective.
std::string silent_ranks(const std::vector<int>& ranks, MPI_Comm communicator);

}  // namespace megatron_cpp::parallel
