// Turning MPI error codes into exceptions.
#pragma once

#include <stdexcept>
#include <string>

namespace megatron_cpp::parallel {

/// A failed MPI call: its text, MPI's reason, the rank, file and line.
class MpiError : public std::runtime_error {
 public:
  /// For a `call` at file:line that returned `code`.
  MpiError(int code, const char* call, const char* file, int line);
};

namespace internal {
void check_mpi(int code, const char* call, const char* file, int line);
void log_mpi(int code, const char* call, const char* file, int line) noexcept;
}  // namespace internal

}  // namespace megatron_cpp::parallel

/// Throws parallel::MpiError unless the call returns MPI_SUCCESS.
#define MCPP_MPI_CHECK(call) ::megatron_cpp::parallel::internal::check_mpi((call), #call, __FILE__, __LINE__)

/// For destructors: prints what MCPP_MPI_CHECK would throw, and goes on.
#define MCPP_MPI_CHECK_LOG(call) ::megatron_cpp::parallel::internal::log_mpi((call), #call, __FILE__, __LINE__)
