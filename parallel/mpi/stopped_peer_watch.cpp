#include "parallel/mpi/stopped_peer_watch.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "parallel/errors.h"
#include "parallel/host_name.h"

namespace megatron_cpp::parallel {

StoppedPeerWatch::StoppedPeerWatch(std::vector<PeerProcess> processes, int own_rank)
    : processes_(std::move(processes)), own_rank_(own_rank), thread_([this] { run(); }) {}

StoppedPeerWatch::~StoppedPeerWatch() {
  {
    const std::scoped_lock lock(mutex_);
    ends_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void StoppedPeerWatch::run() {
  constexpr auto kPause = std::chrono::milliseconds(100);
  // Looks and no time: a whole job that is stopped and goes on has looked at nothing meanwhile.
  constexpr int kPatience = 50;
  constexpr int kPatienceForTheSpeaker = 20;
  std::vector<int> stopped(processes_.size());  // looks in a row
  std::unique_lock lock(mutex_);
  while (!changed_.wait_for(lock, kPause, [this] { return ends_; })) {
    int speaker = own_rank_;
    for (size_t rank = 0; rank < processes_.size(); ++rank) {
      const auto state = state_of(processes_[rank]);
      stopped[rank] = state == 'T' ? stopped[rank] + 1 : 0;  // 't' has a debugger
      const bool may_speak = state && stopped[rank] == 0 && *state != 'Z' && *state != 'X';
      if (may_speak && static_cast<int>(rank) < speaker) speaker = static_cast<int>(rank);
    }
    const auto longest = std::ranges::max_element(stopped);
    const int looks = *longest;
    if (looks < kPatience) continue;
    if (speaker != own_rank_ && looks < kPatience + kPatienceForTheSpeaker) continue;
    if (speaker == own_rank_) {
      std::fputs(
          fmt::format("error: rank {} of {} on {}: rank {} is stopped by a signal, and MPI can't end without it\n",
                      own_rank_, processes_.size(), host_name(), longest - stopped.begin())
              .c_str(),
          stderr);
      std::fflush(stderr);
    }
    std::_Exit(kErrorStatus);
  }
}

}  // namespace megatron_cpp::parallel
