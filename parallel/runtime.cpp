#include "parallel/runtime.h"

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/util/Exception.h>
#include <mpi.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <thread>
#include <utility>

#include "parallel/agree.h"
#include "parallel/gpu_assignment.h"
#include "parallel/gpu_precision.h"
#include "parallel/hash.h"
#include "parallel/launcher.h"
#include "parallel/mpi_check.h"
#include "parallel/nccl_groups.h"

#if defined(__SANITIZE_ADDRESS__)
// MPI unloads its modules when it ends, before leaks are looked for: what leaked in them would have no name, and
// couldn't be told from leaks of ours (tests/support/leaks.supp).
extern "C" int dlclose(void* /*module*/) { return 0; }
#endif

namespace parallel {

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
  const auto host = world_->split_by_host();
  local_rank_ = host.rank();
  local_size_ = host.size();
  std::array<char, MPI_MAX_LIBRARY_VERSION_STRING> library{};
  int length = 0;
  MCPP_MPI_CHECK(MPI_Get_library_version(library.data(), &length));
  const auto obstacle = launcher_obstacle(environment, size_, library.data());
  if (obstacle.empty()) return;
  errors_.reset();
  world_.reset();
  if (owns_mpi_) MCPP_MPI_CHECK_LOG(MPI_Finalize());
  throw std::runtime_error(obstacle);
}

void Runtime::choose_device(const DeviceOptions& options) {
  // What a rank sees counts on all of them, and whoever was told something else must not go another way.
  struct Sight {
    uint64_t gpu = 0;
    uint64_t options = 0;
  };
  // Ranks that see one GPU each, as Slurm may arrange it, call all of them number 0: what they are tells them apart.
  const c10::DeviceIndex num_devices =
      has_nccl() && options.device != "cpu" ? at::detail::getCUDAHooks().deviceCount() : c10::DeviceIndex{0};
  const auto device = static_cast<c10::DeviceIndex>(num_devices == 0 ? 0 : local_rank_ % num_devices);
  const Sight own{.gpu = num_devices == 0 ? 0 : gpu_identity(device),
                  .options = stable_hash(c10::str(options.device, " ", options.share_devices, options.may_leave_gpus))};
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
  while (!groups_.empty()) {
    try {
      groups_.back()->shutdown();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "[rank %d] while shutting a group down: %s\n", rank_, error.what());
    }
    groups_.pop_back();
  }
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
  const uint64_t mine = stable_hash(message);
  std::vector<uint64_t> all(static_cast<size_t>(size_));
  MPI_Request request = MPI_REQUEST_NULL;
  // NOLINTNEXTLINE(mpi-type-mismatch): the check doesn't know that MPI_UINT64_T is a uint64_t
  if (MPI_Iallgather(&mine, 1, MPI_UINT64_T, all.data(), 1, MPI_UINT64_T, errors_->get(), &request) != MPI_SUCCESS) {
    return false;
  }
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(2);
  int done = 0;
  while (done == 0) {
    if (MPI_Test(&request, &done, MPI_STATUS_IGNORE) != MPI_SUCCESS) return false;
    if (done == 0 && std::chrono::steady_clock::now() > deadline) {
      new std::vector<uint64_t>(std::move(all));  // MPI may still write there; the job is about to end
      return false;
    }
    if (done == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  for (const uint64_t other : all) {
    if (other != mine) return false;
  }
  return true;
}

void Runtime::abort(const std::string& message) const {
  std::array<char, 256> host{};
  gethostname(host.data(), host.size() - 1);
  std::fprintf(stderr, "error: rank %d of %d on %s: %s\n", rank_, size_, host.data(), message.c_str());
  std::fflush(stderr);
  MPI_Abort(MPI_COMM_WORLD, 1);
  std::abort();
}

int Runtime::run(const std::function<int(Runtime&)>& body) {
  std::unique_ptr<Runtime> runtime;
  try {
    runtime = std::make_unique<Runtime>();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  std::string message;
  try {
    return body(*runtime);
  } catch (const std::exception& error) {
    message = error_text(error);
  } catch (...) {
    message = "an exception that is no std::exception";
  }
  std::fflush(stdout);
  if (!runtime->all_fail_alike(message)) runtime->abort(message);
  if (runtime->rank() == 0) std::fprintf(stderr, "error: %s\n", message.c_str());
  return 1;
}

}  // namespace parallel
