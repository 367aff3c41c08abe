#include "parallel/mpi/launcher.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>

namespace megatron_cpp::parallel {
namespace {

std::optional<int> number(const Environment& environment, const char* name) {
  const auto found = environment.find(name);
  return found == environment.end() ? std::nullopt : whole_number(found->second);
}

/// "Open MPI v4.1.4": the name and version in the text of MPI_Get_library_version.
std::string short_name(const std::string& library) {
  std::string name;
  for (const char letter : library.substr(0, library.find_first_of(",\n"))) {
    const bool is_blank = letter == ' ' || letter == '\t';
    if (!is_blank) name += letter;
    if (is_blank && !name.empty() && name.back() != ' ') name += ' ';
  }
  while (!name.empty() && name.back() == ' ') name.pop_back();
  return name;
}

}  // namespace

std::optional<int> whole_number(std::string_view text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

Environment process_environment() {
  Environment environment;
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    const std::string_view text(*entry);
    const auto equals = text.find('=');
    if (equals == std::string_view::npos) continue;
    environment.emplace(text.substr(0, equals), text.substr(equals + 1));
  }
  return environment;
}

int launcher_rank(const Environment& environment) {
  // Open MPI and its relatives; PMIx; MPICH and Intel; MVAPICH; Slurm.
  for (const char* name : {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID"}) {
    if (const auto rank = number(environment, name)) return *rank;
  }
  return 0;
}

std::string launcher_obstacle(const Environment& environment, int mpi_size, const std::string& mpi_library) {
  if (mpi_size != 1) return {};
  const auto library = short_name(mpi_library);
  constexpr std::array kWorldSizes = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"};
  // A launcher that started one process inside a job of another launcher: the inner one counts.
  for (const char* name : kWorldSizes) {
    if (number(environment, name) == 1) return {};
  }
  // SLURM_NTASKS isn't used: it is also set in a shell inside an allocation.
  for (const char* name : {kWorldSizes[0], kWorldSizes[1], kWorldSizes[2], "MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS"}) {
    const auto size = number(environment, name);
    if (!size || *size <= 1) continue;
    const bool is_slurm = std::string_view(name).starts_with("SLURM");
    return fmt::format(
        "started as one of {0} processes ({1}={0}), but this program's MPI sees 1: start it with the mpirun of the MPI "
        "it was built with ({2}){3}",
        *size, name, library, is_slurm ? ", or with srun --mpi=pmix" : "");
  }
  // PMIx sets the rank of a process, but not the number of processes.
  const auto rank = launcher_rank(environment);
  if (rank > 0 && environment.count("PMIX_RANK") != 0 && environment.count("OMPI_COMM_WORLD_RANK") == 0) {
    return fmt::format(
        "started as process {0} of several (PMIX_RANK={0}), but this program's MPI sees 1: start it with the mpirun of "
        "the MPI it was built with ({1})",
        rank, library);
  }
  return {};
}

}  // namespace megatron_cpp::parallel
