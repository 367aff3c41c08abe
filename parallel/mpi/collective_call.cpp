#include "parallel/mpi/collective_call.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <sched.h>

#include <cstdlib>

#include "parallel/mpi/mpi_check.h"
#include "parallel/mpi/stall_watch.h"

namespace megatron_cpp::parallel {
namespace {

/// Whether a rank is in the same collective of a group as this one.
bool is_with(const internal::CollectiveRecord& own, const internal::CollectiveRecord& other) {
  const auto same = [](const auto& a, const auto& b) { return std::string_view(a.data()) == b.data(); };
  return other.number == own.number && same(other.group, own.group) && same(other.operation, own.operation) &&
         (other.elements == own.elements || own.sizes_may_differ);
}

/// "rank 1", with its rank in the world if that differs.
std::string rank_name(int rank, MPI_Comm communicator) {
  const int in_world = world_rank(rank, communicator);
  return in_world == rank ? fmt::format("rank {}", rank) : fmt::format("rank {} (of the world: {})", rank, in_world);
}

/// Why the collective has waited too long, as far as the ranks of its communicator tell.
std::string reason(const CollectiveCall& call) {
  const auto watch = StallWatch::existing();
  const auto all = watch ? watch->ask() : std::vector<RankActivity>{};
  if (all.empty()) return "the other ranks can't be asked";
  int own_rank = 0;
  int size = 0;
  MCPP_MPI_CHECK(MPI_Comm_rank(call.communicator, &own_rank));
  MCPP_MPI_CHECK(MPI_Comm_size(call.communicator, &size));
  const auto of = [&](int rank) -> const RankActivity& {
    return all[static_cast<size_t>(world_rank(rank, call.communicator))];
  };
  std::vector<int> silent;
  std::optional<int> elsewhere;
  const auto& own = of(own_rank).activity.current;
  for (int rank = 0; rank < size; ++rank) {
    if (!of(rank).has_answered) {
      silent.push_back(rank);
    } else if (!elsewhere && !is_with(own, of(rank).activity.current)) {
      elsewhere = rank;
    }
  }
  if (!silent.empty()) return silent_ranks(silent, call.communicator);
  if (!elsewhere) return "every rank waits in it, so the messages between them are lost or too slow";
  return fmt::format("{} isn't there: {}", rank_name(*elsewhere, call.communicator), to_text(of(*elsewhere).activity));
}

}  // namespace

int world_rank(int rank, MPI_Comm communicator) {
  MPI_Group group = MPI_GROUP_NULL;
  MPI_Group world = MPI_GROUP_NULL;
  int result = MPI_UNDEFINED;
  MCPP_MPI_CHECK(MPI_Comm_group(communicator, &group));
  MCPP_MPI_CHECK(MPI_Comm_group(MPI_COMM_WORLD, &world));
  MCPP_MPI_CHECK(MPI_Group_translate_ranks(group, 1, &rank, world, &result));
  MCPP_MPI_CHECK(MPI_Group_free(&group));
  MCPP_MPI_CHECK(MPI_Group_free(&world));
  return result;
}

void throw_timed_out(const CollectiveCall& call) {
  TORCH_CHECK_WITH(DistBackendError, false, call.operation, " of ", call.elements, " elements timed out after ",
                   call.timeout.count(), " ms (", call.where, "): ", reason(call));
  std::abort();  // never reached
}

std::string silent_ranks(const std::vector<int>& ranks, MPI_Comm communicator) {
  constexpr size_t kMostNamed = 8;
  std::string names;
  std::string world_names;
  bool differs = false;
  for (size_t i = 0; i < ranks.size() && i < kMostNamed; ++i) {
    const char* separator = i == 0 ? "" : i + 1 == ranks.size() ? " and " : ", ";
    const int in_world = world_rank(ranks[i], communicator);
    differs |= in_world != ranks[i];
    names += fmt::format("{}{}", separator, ranks[i]);
    world_names += fmt::format("{}{}", separator, in_world);
  }
  auto text = (ranks.size() == 1 ? "rank " : "ranks ") + names;
  if (ranks.size() > kMostNamed) text += fmt::format(" and {} more", ranks.size() - kMostNamed);
  if (differs) text += fmt::format(" (of the world: {})", world_names);
  return text + (ranks.size() == 1 ? " is silent" : " are silent");
}

bool PeerWait::go_on() {
  if (spins_ > 0) {
    --spins_;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    return true;
  }
  sched_yield();
  const auto now = Clock::now();
  if (!begin_) begin_ = now;
  return now - *begin_ <= call_.timeout;
}

}  // namespace megatron_cpp::parallel
