#include "parallel/runtime.h"

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <mpi.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <optional>
#include <thread>
#include <utility>

#include "parallel/activity.h"
#include "parallel/errors.h"
#include "parallel/gpu.h"
#include "parallel/hash.h"
#include "parallel/host_name.h"
#include "parallel/mpi/launcher.h"
#include "parallel/mpi/mpi_check.h"
#include "parallel/mpi/peer_process.h"
#include "parallel/mpi/stall_watch.h"
#include "parallel/mpi/stopped_peer_watch.h"

#if defined(__SANITIZE_ADDRESS__)
// MPI_Finalize unloads MPI's modules before leaks are searched for. Leaks in them would then have no symbol names, and
// tests/support/leaks.supp couldn't suppress them.
extern "C" int dlclose(void* /*module*/) { return 0; }
#endif

namespace megatron_cpp::parallel {

Runtime::Runtime() {
  const auto environment = process_environment();  // MPI may add to it
  int initialized = 0;
  MPI_Initialized(&initialized);
  int provided = MPI_THREAD_SINGLE;
  if (initialized != 0) {
    MCPP_MPI_CHECK(MPI_Query_thread(&provided));
  } else {
    MCPP_MPI_CHECK(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &provided));
    owns_mpi_ = true;
  }
  if (provided < MPI_THREAD_MULTIPLE) throw std::runtime_error("this MPI does not provide MPI_THREAD_MULTIPLE");
  world_ = std::make_unique<MpiCommunicator>(MpiCommunicator::duplicate_world());
  errors_ = std::make_unique<MpiCommunicator>(MpiCommunicator::duplicate_world());
  rank_ = world_->rank();
  size_ = world_->size();
  processes_ = processes_of(*world_);
  const auto host = world_->split_by_host();
  local_rank_ = host.rank();
  local_size_ = host.size();
  std::array<char, MPI_MAX_LIBRARY_VERSION_STRING> library{};
  int length = 0;
  MCPP_MPI_CHECK(MPI_Get_library_version(library.data(), &length));
  const auto obstacle = launcher_obstacle(environment, size_, library.data());
  if (obstacle.empty()) {
    if (size_ > 1) stall_watch_ = StallWatch::of_process(*world_);
    return;
  }
  errors_.reset();
  world_.reset();
  if (owns_mpi_) MCPP_MPI_CHECK_LOG(MPI_Finalize());
  throw std::runtime_error(obstacle);
}

void Runtime::choose_device(const DeviceOptions& options) {
  // What each rank sees and was asked for: every rank decides from all of these, so that all decide alike.
  struct Sight {
    uint64_t gpu = 0;
    uint64_t options = 0;
  };
  // Slurm may show each rank only one GPU, which is number 0 on every rank: the identities tell these GPUs apart.
  const c10::DeviceIndex num_devices =
      has_nccl() && options.device != "cpu" ? at::detail::getCUDAHooks().deviceCount() : c10::DeviceIndex{0};
  const auto device = static_cast<c10::DeviceIndex>(num_devices == 0 ? 0 : local_rank_ % num_devices);
  const Sight own{.gpu = num_devices == 0 ? 0 : gpu_identity(device),
                  .options = stable_hash(
                      fmt::format("{} {:d}{:d}", options.device, options.share_devices, options.may_leave_gpus))};
  std::vector<Sight> all(static_cast<size_t>(size_));
  // NOLINTNEXTLINE(mpi-type-mismatch): the check doesn't know that MPI_UINT64_T is a uint64_t
  MCPP_MPI_CHECK(MPI_Allgather(&own, 2, MPI_UINT64_T, all.data(), 2, MPI_UINT64_T, world_->get()));
  std::vector<uint64_t> gpus;
  for (const auto& [gpu, their_options] : all) {
    TORCH_CHECK_VALUE(their_options == all.front().options, "ranks disagree on the device to compute on");
    gpus.push_back(gpu);
  }
  const auto choice = choose_device_of_all(options, gpus, has_nccl());
  device_ = choice.on_gpus ? c10::Device(c10::kCUDA, device) : c10::Device(c10::kCPU);
  shares_gpus_ = choice.shares_gpus;
  if (choice.on_gpus) multiply_exactly_on_gpus();
  if (rank_ == 0 && !choice.warning.empty()) {
    TORCH_WARN(choice.warning);
  }
}

Runtime::~Runtime() {
  std::optional<StoppedPeerWatch> watch;
  if (owns_mpi_ && size_ > 1) watch.emplace(processes_, rank_);
  while (!groups_.empty()) {
    try {
      groups_.back()->shutdown();
    } catch (const std::exception& error) {
      std::fputs(fmt::format("[rank {}] while shutting a group down: {}\n", rank_, error.what()).c_str(), stderr);
    }
    groups_.pop_back();
  }
  stall_watch_.reset();
  errors_.reset();
  world_.reset();
  if (owns_mpi_) MCPP_MPI_CHECK_LOG(MPI_Finalize());
}

void Runtime::shut_down_at_exit(GroupPtr group) { groups_.push_back(std::move(group)); }

void Runtime::shut_down(const GroupPtr& group) {
  group->shutdown();
  std::erase(groups_, group);
}

bool Runtime::all_fail_alike(const std::string& message) const {
  const Phase phase("waiting for the other ranks after an error");
  // One message per rank, so that missing ranks are known. Never freed: MPI may use these while the job aborts.
  struct Messages {
    uint64_t mine;
    std::vector<uint64_t> theirs;
    std::vector<MPI_Request> requests;
  };
  const auto size = static_cast<size_t>(size_);
  static auto& messages = *new Messages{0, {}, {}};
  messages = {stable_hash(message), std::vector<uint64_t>(size), std::vector<MPI_Request>(size, MPI_REQUEST_NULL)};
  std::vector<PeerPatience> patience;
  patience.reserve(size);
  const auto begin = PeerPatience::Clock::now();
  for (int rank = 0; rank < size_; ++rank) {
    const auto i = static_cast<size_t>(rank);
    patience.emplace_back(processes_[i], begin);
    MPI_Request sent = MPI_REQUEST_NULL;
    // NOLINTBEGIN(mpi-type-mismatch): the check doesn't know that MPI_UINT64_T is a uint64_t
    if (MPI_Irecv(&messages.theirs[i], 1, MPI_UINT64_T, rank, 0, errors_->get(), &messages.requests[i]) !=
            MPI_SUCCESS ||
        MPI_Isend(&messages.mine, 1, MPI_UINT64_T, rank, 0, errors_->get(), &sent) != MPI_SUCCESS ||
        MPI_Request_free(&sent) != MPI_SUCCESS) {
      return false;
    }
    // NOLINTEND(mpi-type-mismatch)
  }
  for (bool all_here = false; !all_here;) {
    all_here = true;
    const auto now = PeerPatience::Clock::now();
    for (size_t rank = 0; rank < size; ++rank) {
      int is_here = 0;
      if (MPI_Test(&messages.requests[rank], &is_here, MPI_STATUS_IGNORE) != MPI_SUCCESS) return false;
      if (is_here != 0) continue;
      all_here = false;
      if (patience[rank].is_over(now)) return false;
    }
    if (!all_here) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return std::all_of(messages.theirs.begin(), messages.theirs.end(),
                     [&](uint64_t theirs) { return theirs == messages.mine; });
}

void Runtime::abort(const std::string& message, int exit_status) const {
  std::fputs(fmt::format("error: rank {} of {} on {}: {}\n", rank_, size_, host_name(), message).c_str(), stderr);
  std::fflush(stderr);
  MPI_Abort(MPI_COMM_WORLD, exit_status);
  std::abort();
}

int Runtime::run(const std::function<int(Runtime&)>& body) {
  std::unique_ptr<Runtime> runtime;
  try {
    runtime = std::make_unique<Runtime>();
  } catch (const std::exception& error) {
    std::fputs(fmt::format("error: {}\n", error.what()).c_str(), stderr);
    return kErrorStatus;
  }
  std::string message;
  int status = kErrorStatus;
  try {
    return body(*runtime);
  } catch (const std::exception& error) {
    message = error_text(error);
    status = exit_status(error);
  } catch (...) {
    message = "an exception that is no std::exception";
  }
  std::fflush(stdout);
  if (!runtime->all_fail_alike(message)) runtime->abort(message, status);
  if (runtime->rank() == 0) std::fputs(fmt::format("error: {}\n", message).c_str(), stderr);
  return status;
}

}  // namespace megatron_cpp::parallel
