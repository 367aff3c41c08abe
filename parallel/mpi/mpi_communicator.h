// Ownership of MPI communicators.
#pragma once

#include <mpi.h>

namespace megatron_cpp::parallel {

/// Owns a duplicated or split communicator, so that its messages never match those of other code. Move-only; freed on
/// destruction, unless MPI has been finalized before.
class MpiCommunicator {
 public:
  /// A duplicate of MPI_COMM_WORLD. Collective over all ranks.
  static MpiCommunicator duplicate_world();

  /// Another communicator of the same ranks. Collective over them.
  MpiCommunicator duplicate() const;

  /// The ranks of this communicator that pass the same `color`, ordered by their rank here. Collective over it.
  MpiCommunicator split(int color) const;

  /// The ranks that share this host's memory, ordered by their rank here. Collective over it.
  MpiCommunicator split_by_host() const;

  /// Takes over; `other` is empty afterwards.
  MpiCommunicator(MpiCommunicator&& other) noexcept;
  /// Swaps the communicators of both.
  MpiCommunicator& operator=(MpiCommunicator&& other) noexcept;
  MpiCommunicator(const MpiCommunicator&) = delete;
  MpiCommunicator& operator=(const MpiCommunicator&) = delete;
  ~MpiCommunicator();

  MPI_Comm get() const { return communicator_; }  ///< stays owned here
  int rank() const;                               ///< this rank's number in it; not collective
  int size() const;                               ///< number of its ranks; not collective

 private:
  explicit MpiCommunicator(MPI_Comm communicator);

  MPI_Comm communicator_ = MPI_COMM_NULL;
};

}  // namespace megatron_cpp::parallel
