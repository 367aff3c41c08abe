// Ends the job if a rank is stopped when the others end MPI, which would wait for it for ever.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "parallel/mpi/peer_process.h"

namespace megatron_cpp::parallel {

/// While it exists, a thread looks at the other ranks of this host ten times a second. If one is stopped by a signal in
/// 50 looks in a row, the lowest rank that isn't says so on stderr, and this process ends at once with kErrorStatus,
/// for which mpirun ends the others. For the time in which groups are shut down and MPI is finalized: no timeout of a
/// collective holds there, and MPI has no call that would return. It sends nothing; a rank of another host can't be
/// seen.
class StoppedPeerWatch {
 public:
  /// Not collective.
  /// @param processes  of all ranks.
  StoppedPeerWatch(std::vector<PeerProcess> processes, int own_rank);
  /// Ends the thread.
  ~StoppedPeerWatch();
  StoppedPeerWatch(const StoppedPeerWatch&) = delete;
  StoppedPeerWatch& operator=(const StoppedPeerWatch&) = delete;

 private:
  void run();

  std::vector<PeerProcess> processes_;
  int own_rank_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool ends_ = false;  ///< under mutex_
  std::thread thread_;
};

}  // namespace megatron_cpp::parallel
