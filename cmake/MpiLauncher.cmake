# The launcher that CMake has found must be the one of the MPI that it has found: with another one's each rank believes that it is
# alone. With two MPIs on a machine FindMPI may take its parts from both.
execute_process(COMMAND ${MPIEXEC_EXECUTABLE} --version OUTPUT_VARIABLE launcher_version ERROR_VARIABLE launcher_version)
set(launcher_kind "")
if(launcher_version MATCHES "Open MPI")
  set(launcher_kind "Open MPI")
elseif(launcher_version MATCHES "HYDRA|Intel")
  set(launcher_kind MPICH)
endif()
set(mpi_kind "")
if(MPI_CXX_LIBRARY_VERSION_STRING MATCHES "Open MPI")
  set(mpi_kind "Open MPI")
elseif(MPI_CXX_LIBRARY_VERSION_STRING MATCHES "MPICH|Intel|MVAPICH")
  set(mpi_kind MPICH)
endif()
if(mpi_kind AND launcher_kind AND NOT mpi_kind STREQUAL launcher_kind)
  message(FATAL_ERROR "${MPI_CXX_COMPILER} is of ${mpi_kind}, but ${MPIEXEC_EXECUTABLE} starts programs of ${launcher_kind}: pass "
    "-DMPIEXEC_EXECUTABLE=/path/to/the/other/mpiexec, or -DMPI_CXX_COMPILER=/path/to/the/other/mpicxx")
endif()
