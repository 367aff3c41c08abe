// What the launcher of this process (mpirun, mpiexec, srun) says about it, before and beside MPI.
#pragma once

#include <map>
#include <string>

namespace megatron_cpp::parallel {

/// Names and values of environment variables.
using Environment = std::map<std::string, std::string>;

/// This process's own.
Environment process_environment();

/// This process's number among those that its launcher started; 0 if no launcher says one. Not collective, and usable
/// without MPI: for who speaks of what every process finds alike.
int launcher_rank(const Environment& environment);

/// Why processes that a launcher started together don't know of each other; empty if nothing speaks for that. An MPI
/// that another MPI's launcher starts sees one rank in each process: each would do the whole work, into the same files.
/// Pure.
/// @param environment  as it was before MPI_Init, which may add to it.
/// @param mpi_size     ranks that MPI sees.
/// @param mpi_library  what MPI_Get_library_version says.
std::string launcher_obstacle(const Environment& environment, int mpi_size, const std::string& mpi_library);

}  // namespace megatron_cpp::parallel
