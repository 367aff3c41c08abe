// Starts and ends MPI, chooses the device, and ends all ranks when one fails.
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

class StallWatch;
struct PeerProcess;

/// MPI_Init_thread(MPI_THREAD_MULTIPLE) and MPI_Finalize as an object. Create one first in main; everything that
/// communicates must live within its scope. Without mpirun there is one rank. Of several ranks each has a thread that
/// tells the others what the process is doing (activity.h) once a collective has waited too long.
class Runtime {
 public:
  /// Starts MPI, unless the program has started it already (then the program also finalizes it). The device is the CPU
  /// until choose_device is called.
  /// @throws std::runtime_error if MPI can't give MPI_THREAD_MULTIPLE, or sees one process although the launcher, which
  ///         belongs to another MPI, has started several.
  Runtime();
  ~Runtime();
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  int rank() const { return rank_; }  ///< in the world
  int size() const { return size_; }  ///< ranks of the world
  /// This rank's number among the ranks of its host.
  int local_rank() const { return local_rank_; }
  int local_size() const { return local_size_; }  ///< ranks of this host
  /// The chosen device: the CPU, or GPU number local_rank() modulo the number of visible GPUs.
  c10::Device device() const { return device_; }
  /// Whether ranks of the job compute on the same GPU.
  bool shares_gpus() const { return shares_gpus_; }
  /// The runtime's communicator of all ranks; groups are split from it.
  const MpiCommunicator& world() const { return *world_; }

  /// Chooses this rank's device; call it before making groups. Collective over all ranks, with the same options. Rank 0
  /// prints a warning if there is one. With GPUs it calls multiply_exactly_on_gpus(), for the whole process.
  /// @throws c10::ValueError, the same on every rank, if ranks pass different options; and as choose_device_of_all.
  void choose_device(const DeviceOptions& options);

  /// Shuts `group`'s backends down when the runtime ends, in the reverse order of these calls.
  void shut_down_at_exit(GroupPtr group);
  /// Shuts `group`'s backends down now; the runtime forgets it.
  void shut_down(const GroupPtr& group);

  /// Runs a program's body and returns its exit status. If every rank throws an exception with the same text, rank 0
  /// prints it and the status is its exit_status() on all ranks. Otherwise the ranks that throw print their exceptions,
  /// with rank and host, and end the job with MPI_Abort and this status, so that no peer waits for them forever.
  static int run(const std::function<int(Runtime&)>& body);

 private:
  /// True if every rank calls this with the same text. PeerPatience decides how long it waits for a rank that doesn't.
  bool all_fail_alike(const std::string& message) const;
  [[noreturn]] void abort(const std::string& message, int exit_status) const;

  bool owns_mpi_ = false;
  std::unique_ptr<MpiCommunicator> world_;
  std::unique_ptr<MpiCommunicator> errors_;  ///< separate, as messages in `world_` may be unmatched
  std::vector<PeerProcess> processes_;       ///< of each rank
  std::shared_ptr<StallWatch> stall_watch_;  ///< null with one rank
  int rank_ = 0;
  int size_ = 1;
  int local_rank_ = 0;
  int local_size_ = 1;
  c10::Device device_ = c10::Device(c10::kCPU);
  bool shares_gpus_ = false;
  std::vector<GroupPtr> groups_;
};

}  // namespace megatron_cpp::parallel
