#include "parallel/mpi/mpi_communicator.h"

#include <utility>

#include "parallel/mpi/mpi_check.h"

namespace megatron_cpp::parallel {

MpiCommunicator::MpiCommunicator(MPI_Comm communicator) : communicator_(communicator) {
  // Errors come back as codes, which MCPP_MPI_CHECK turns into exceptions that name the call.
  MCPP_MPI_CHECK(MPI_Comm_set_errhandler(communicator_, MPI_ERRORS_RETURN));
}

MpiCommunicator MpiCommunicator::duplicate_world() {
  MPI_Comm result = MPI_COMM_NULL;
  MCPP_MPI_CHECK(MPI_Comm_dup(MPI_COMM_WORLD, &result));
  return MpiCommunicator(result);
}

MpiCommunicator MpiCommunicator::duplicate() const {
  MPI_Comm result = MPI_COMM_NULL;
  MCPP_MPI_CHECK(MPI_Comm_dup(communicator_, &result));
  return MpiCommunicator(result);
}

MpiCommunicator MpiCommunicator::split(int color) const {
  MPI_Comm result = MPI_COMM_NULL;
  MCPP_MPI_CHECK(MPI_Comm_split(communicator_, color, rank(), &result));
  return MpiCommunicator(result);
}

MpiCommunicator MpiCommunicator::split_by_host() const {
  MPI_Comm result = MPI_COMM_NULL;
  MCPP_MPI_CHECK(MPI_Comm_split_type(communicator_, MPI_COMM_TYPE_SHARED, rank(), MPI_INFO_NULL, &result));
  return MpiCommunicator(result);
}

MpiCommunicator::MpiCommunicator(MpiCommunicator&& other) noexcept
    : communicator_(std::exchange(other.communicator_, MPI_COMM_NULL)) {}

MpiCommunicator& MpiCommunicator::operator=(MpiCommunicator&& other) noexcept {
  std::swap(communicator_, other.communicator_);
  return *this;
}

MpiCommunicator::~MpiCommunicator() {
  if (communicator_ == MPI_COMM_NULL) return;
  int finalized = 0;
  MPI_Finalized(&finalized);
  if (finalized == 0) MCPP_MPI_CHECK_LOG(MPI_Comm_free(&communicator_));
}

int MpiCommunicator::rank() const {
  int rank = 0;
  MCPP_MPI_CHECK(MPI_Comm_rank(communicator_, &rank));
  return rank;
}

int MpiCommunicator::size() const {
  int size = 0;
  MCPP_MPI_CHECK(MPI_Comm_size(communicator_, &size));
  return size;
}

}  // namespace megatron_cpp::parallel
