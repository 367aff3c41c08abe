#include "parallel/mpi/collective_call.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <cstdlib>

#include "parallel/mpi/mpi_check.h"

namespace megatron_cpp::parallel {
namespace {

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

}  // namespace

void throw_timed_out(const CollectiveCall& call, const std::string& reason) {
  TORCH_CHECK_WITH(DistBackendError, false, call.operation, " of ", call.elements, " elements timed out after ",
                   call.timeout.count(), " ms (", call.where, "): ", reason);
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

}  // namespace megatron_cpp::parallel
