# Checks that the launcher belongs to the MPI library that CMake has found: with two MPIs on a machine FindMPI may mix them,
# and under the wrong launcher each rank thinks that it is the only one.
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
