// Asks every rank what it is doing once a collective has waited too long, and prints the answers.
//
// A rank that is stuck can't speak for itself, so a thread of each process does. It speaks over an MPI communicator of
// its own: MPI reaches every rank already, whatever the network between the hosts and the backend of the groups, and it
// has no port or file that could be taken or left behind. The thread looks for messages 20 times a second, which takes
// some microseconds each time: a thread that waits in MPI_Recv would burn a core. So it answers while another thread of
// the process computes, works on the host, or waits in a collective of MPI or NCCL; a process that is stopped doesn't
// answer, and its state tells why (peer_process.h).
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "parallel/activity.h"
#include "parallel/mpi/mpi_communicator.h"

namespace megatron_cpp::parallel {

/// What a rank has answered.
struct RankActivity {
  bool has_answered = false;
  std::array<char, 8> state{};    ///< of the process that hasn't: "stopped", "gone", or "" if that isn't known
  internal::Activity activity{};  ///< if it has
};

/// The report: one line for each rank of the world, and one for each collective that ranks of a group have entered in
/// the same place with another operation or size. Pure.
std::string stall_report(const std::vector<RankActivity>& ranks);

/// The thread of this process. One object serves all runtimes of a process.
///
/// The lowest rank that runs collects the answers and prints the report on stderr, whoever asks, so that the job prints
/// it once; further ones within 30 seconds aren't printed.
class StallWatch {
 public:
  /// The process's object, made if there is none. Collective over `world`, which has all ranks of the job.
  static std::shared_ptr<StallWatch> of_process(const MpiCommunicator& world);
  /// The process's object, or null.
  static std::shared_ptr<StallWatch> existing();

  explicit StallWatch(const MpiCommunicator& world);  ///< use of_process()
  ~StallWatch();                                      ///< ends the thread; collective over the ranks
  StallWatch(const StallWatch&) = delete;
  StallWatch& operator=(const StallWatch&) = delete;

  /// What each rank of the world is doing; has the report printed. Waits for each answer as long as PeerPatience
  /// allows; tenths of a second if all processes run. Not collective: a rank whose collective has timed out calls it.
  std::vector<RankActivity> ask();

  /// From now on the report is also printed when there is a step (set_step) and no collective has begun or ended for
  /// `timeout` and two seconds, in which a collective that has waited that long speaks itself: all ranks may wait for a
  /// file, and over NCCL nobody sees where the host waits. It ends nothing. Not collective.
  void watch(std::chrono::milliseconds timeout);

 private:
  class Thread;
  std::unique_ptr<Thread> thread_;
};

}  // namespace megatron_cpp::parallel
