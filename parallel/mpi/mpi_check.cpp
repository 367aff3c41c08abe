#include "parallel/mpi/mpi_check.h"

#include <fmt/format.h>
#include <mpi.h>

#include <cstdio>
#include <string>

namespace megatron_cpp::parallel {
namespace {

std::string describe(int code, const char* call, const char* file, int line) {
  char reason[MPI_MAX_ERROR_STRING] = "unknown error";
  int length = 0;
  MPI_Error_string(code, reason, &length);
  int rank = -1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  return fmt::format("{} failed on rank {}: {} ({}:{})", call, rank, reason, file, line);
}

}  // namespace

MpiError::MpiError(int code, const char* call, const char* file, int line)
    : std::runtime_error(describe(code, call, file, line)) {}

namespace internal {

void check_mpi(int code, const char* call, const char* file, int line) {
  if (code != MPI_SUCCESS) throw MpiError(code, call, file, line);
}

void log_mpi(int code, const char* call, const char* file, int line) noexcept {
  if (code != MPI_SUCCESS) std::fputs((describe(code, call, file, line) + '\n').c_str(), stderr);
}

}  // namespace internal
}  // namespace megatron_cpp::parallel
