// Finds out which ranks are missing once a collective has timed out.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "parallel/mpi/collective_call.h"
#include "parallel/mpi/mpi_communicator.h"
#include "parallel/mpi/peer_process.h"

namespace megatron_cpp::parallel {

/// MPI doesn't tell a waiting rank whom it waits for. A rank whose collective has timed out therefore asks all others,
/// over a separate communicator. Ranks that wait answer with the collective they wait in; a rank that doesn't answer is
/// stopped, hung, or busy with something else. Nothing is sent as long as no collective times out.
class RollCall {
 public:
  /// Collective over the communicator's ranks.
  explicit RollCall(const MpiCommunicator& communicator);

  /// Answers ranks that have asked. A rank that waits in `call` calls this repeatedly.
  void answer(const CollectiveCall& call);

  /// Asks all ranks, and waits for each answer as long as PeerPatience allows.
  /// @return  "rank 1 is silent", or which rank waits in which other collective, or that all wait.
  std::string reason(const CollectiveCall& call);

 private:
  struct Message {
    int64_t number = -1;               ///< number of the collective that the sender waits in
    int64_t about = -1;                ///< in an answer: the number that was asked about
    int64_t elements = 0;              ///< elements of that collective
    std::array<char, 32> operation{};  ///< its name, ending in 0
  };

  static Message message(const CollectiveCall& call, int64_t about);
  void send(const Message& message, int rank, int tag);
  /// Receives a message with `tag` if one has arrived. Returns its sender, or -1.
  int receive(Message& message, int tag);

  MpiCommunicator communicator_;
  std::vector<PeerProcess> processes_;         ///< of each rank
  std::vector<std::optional<Message>> heard_;  ///< of each rank: its last message
};

/// One wait for the peers of a collective.
class PeerWait {
 public:
  /// @param spins  number of polls without yielding the core, so that short waits stay short.
  PeerWait(const CollectiveCall& call, int64_t spins) : call_(call), spins_(spins) {}

  /// Call it between two polls. Answers ranks that ask. False once the wait is longer than the collective's timeout.
  bool go_on();
  /// Whether the spins are used up.
  bool is_long() const { return begin_.has_value(); }

 private:
  using Clock = std::chrono::steady_clock;
  const CollectiveCall& call_;
  int64_t spins_;
  std::optional<Clock::time_point> begin_;
  Clock::time_point next_answer_;
};

}  // namespace megatron_cpp::parallel
