// The life of a process among its ranks: MPI, device, orderly end.
#pragma once

#include <c10/core/Device.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "parallel/gpu.h"
#include "parallel/group.h"
#include "parallel/mpi/mpi_communicator.h"

namespace megatron_cpp::parallel {

struct PeerProcess;

/// MPI_Init_thread(MPI_THREAD_MULTIPLE) and MPI_Finalize as an object. Make one, first thing in main; everything that
/// communicates lives inside its scope. Works with and without mpirun (then there is one rank).
class Runtime {
 public:
  /// Starts MPI, unless the program has started it already (then the program also finalizes it). The device is the CPU
  /// until choose_device is called.
  /// @throws std::runtime_error if MPI can't give MPI_THREAD_MULTIPLE, or sees one process where the launcher, another
  ///         MPI's, has started several.
  Runtime();
  ~Runtime();
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  int rank() const { return rank_; }  ///< in the world
  int size() const { return size_; }  ///< ranks of the world
  /// This rank's number among those of its host, and how many they are.
  int local_rank() const { return local_rank_; }
  int local_size() const { return local_size_; }  ///< ranks of this host
  /// The CPU, or, as chosen, GPU number local_rank() modulo the visible ones.
  c10::Device device() const { return device_; }
  /// Whether ranks of the job compute on the same GPU.
  bool shares_gpus() const { return shares_gpus_; }
  /// A communicator of the runtime, over all ranks; groups are split from it.
  const MpiCommunicator& world() const { return *world_; }

  /// Chooses this rank's device; before any group is made. Collective over all ranks, with the same options. What there
  /// is to warn of rank 0 says. With a GPU comes multiply_exactly_on_gpus(), for the whole process.
  /// @throws c10::ValueError, the same on every rank, if ranks pass different options, or GPUs that are wanted can't be
  ///         had: a rank sees none, or two would share one unasked.
  void choose_device(const DeviceOptions& options);

  /// Shuts `group`'s backends down when the runtime ends, in the reverse order of these calls.
  void shut_down_at_exit(GroupPtr group);
  /// Shuts `group`'s backends down now; the runtime forgets it.
  void shut_down(const GroupPtr& group);

  /// Runs a program's body and turns what leaves it into an exit status. An exception on every rank with the same text
  /// is printed once, by rank 0, and the status is 1 everywhere. An exception on some ranks is printed by them, with
  /// rank and host, and ends the job with MPI_Abort, so that no peer waits for them forever.
  static int run(const std::function<int(Runtime&)>& body);

 private:
  /// True if every rank gets here with an error of the same text. A rank that does something else, or nothing any more,
  /// isn't waited for, as PeerPatience has it.
  bool all_fail_alike(const std::string& message) const;
  [[noreturn]] void abort(const std::string& message) const;

  bool owns_mpi_ = false;
  std::unique_ptr<MpiCommunicator> world_;
  std::unique_ptr<MpiCommunicator> errors_;  ///< apart from `world_`: its messages must match when others' don't
  std::vector<PeerProcess> processes_;       ///< of each rank
  int rank_ = 0;
  int size_ = 1;
  int local_rank_ = 0;
  int local_size_ = 1;
  c10::Device device_ = c10::Device(c10::kCPU);
  bool shares_gpus_ = false;
  std::vector<GroupPtr> groups_;
};

}  // namespace megatron_cpp::parallel
