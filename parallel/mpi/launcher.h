// What the environment says about the launcher of this process (mpirun, mpiexec, srun), without MPI.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>

namespace megatron_cpp::parallel {

/// Names and values of environment variables.
using Environment = std::map<std::string, std::string>;

/// The number that all of `text` spells, as in "12"; nothing for other text and for numbers that no int holds. Pure.
std::optional<int> whole_number(std::string_view text);

/// The variables of this process.
Environment process_environment();

/// The rank that the launcher gave this process; 0 if it gave none. Not collective, and usable without MPI, so that
/// only one process prints an error that every process finds.
int launcher_rank(const Environment& environment);

/// An error text if the launcher has started several processes but MPI sees one rank in each, because the launcher
/// belongs to another MPI; otherwise empty. Each process would do the whole work and write the same files. Pure.
/// @param environment  as it was before MPI_Init, which may add to it.
/// @param mpi_size     ranks that MPI sees.
/// @param mpi_library  what MPI_Get_library_version says.
std::string launcher_obstacle(const Environment& environment, int mpi_size, const std::string& mpi_library);

}  // namespace megatron_cpp::parallel
