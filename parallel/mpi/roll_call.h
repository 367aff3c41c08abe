// Who isn't there, asked once a collective has waited too long.
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
/// over a communicator of its own; ranks that wait themselves answer with what they wait in, and who doesn't answer
/// isn't waiting: stopped, hung, or busy with something else. Nothing is sent as long as no collective times out.
class RollCall {
 public:
  /// Collective over the communicator's ranks.
  explicit RollCall(const MpiCommunicator& communicator);

  /// Answers ranks that have asked. A rank that waits in `call` calls this now and then.
  void answer(const CollectiveCall& call);

  /// Asks, and waits for the answers of those that may give one, as PeerPatience has it. A rank whose process is
  /// stopped or gone isn't waited for.
  /// @return  "rank 1 is silent", or what ranks are in that are in another collective than this one, or that all wait.
  std::string reason(const CollectiveCall& call);

 private:
  struct Message {
    int64_t number = -1;               ///< of the collective that the sender waits in
    int64_t about = -1;                ///< of an answer: the number that was asked about
    int64_t elements = 0;              ///< what the sender's collective is about
    std::array<char, 32> operation{};  ///< its name, ending in 0
  };

  static Message message(const CollectiveCall& call, int64_t about);
  void send(const Message& message, int rank, int tag);
  /// Takes what has arrived with `tag`, if anything has; the sender, or -1.
  int receive(Message& message, int tag);

  MpiCommunicator communicator_;
  std::vector<PeerProcess> processes_;         ///< of each rank
  std::vector<std::optional<Message>> heard_;  ///< of each rank: what it waits in
};

/// One wait for the peers of a collective.
class PeerWait {
 public:
  /// @param spins  how many looks come before a core is left to whoever has work: short waits stay short.
  PeerWait(const CollectiveCall& call, int64_t spins) : call_(call), spins_(spins) {}

  /// Comes between two looks for the peers, and answers who asks for this rank. False once the collective has waited
  /// longer than its timeout.
  bool go_on();
  /// Whether it is over with spinning.
  bool is_long() const { return begin_.has_value(); }

 private:
  using Clock = std::chrono::steady_clock;
  const CollectiveCall& call_;
  int64_t spins_;
  std::optional<Clock::time_point> begin_;
  Clock::time_point next_answer_;
};

}  // namespace megatron_cpp::parallel
