// Describes one collective of the MPI backend, for error messages and for waiting.
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
  MPI_Comm communicator;              ///< polled while waiting: a peer's MPI call may need progress on this rank
  int64_t number;                     ///< number of the collective in its group: the same on every rank
  RollCall* roll_call;                ///< of the group
};

/// Throws the c10::DistBackendError of a collective that has waited too long.
/// @param reason  which ranks are at fault, as far as this rank knows: "rank 1 is silent".
[[noreturn]] void throw_timed_out(const CollectiveCall& call, const std::string& reason);

/// "rank 1 is silent", "ranks 1 and 3 are silent"; with their world ranks, which mpirun uses, where those differ. Not
/// collective.
std::string silent_ranks(const std::vector<int>& ranks, MPI_Comm communicator);

}  // namespace megatron_cpp::parallel
