#include "parallel/gpu.h"

#include <ATen/Context.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <map>

namespace megatron_cpp::parallel {
namespace {

/// The first two ranks that would take the same GPU; -1 if each has its own GPU.
struct SharingRanks {
  int64_t first = -1;
  int64_t second = -1;
};

SharingRanks sharing_ranks(std::span<const uint64_t> gpus) {
  std::map<uint64_t, int64_t> taken;
  for (size_t rank = 0; rank < gpus.size(); ++rank) {
    if (gpus[rank] == 0) continue;
    const auto [earlier, is_free] = taken.emplace(gpus[rank], static_cast<int64_t>(rank));
    if (!is_free) return {earlier->second, static_cast<int64_t>(rank)};
  }
  return {};
}

}  // namespace

DeviceChoice choose_device_of_all(const DeviceOptions& options, std::span<const uint64_t> gpus, bool has_nccl) {
  const auto& device = options.device;
  TORCH_CHECK_VALUE(device == "auto" || device == "cpu" || device == "cuda", "device '", device,
                    "' is not one of auto, cpu, cuda");
  if (device == "cpu") return {};
  const bool is_asked_for = device == "cuda";
  TORCH_CHECK_VALUE(has_nccl || !is_asked_for, "device cuda was asked for, but this build has no NCCL");
  const auto blind = std::find(gpus.begin(), gpus.end(), uint64_t{0}) - gpus.begin();
  const bool all_see = blind == static_cast<std::ptrdiff_t>(gpus.size());
  const bool none_sees = std::all_of(gpus.begin(), gpus.end(), [](uint64_t gpu) { return gpu == 0; });
  if (none_sees && !is_asked_for) return {};

  const auto sharing = sharing_ranks(gpus);
  std::string obstacle;
  if (none_sees) {
    obstacle = "no rank sees a GPU (nvidia-smi and CUDA_VISIBLE_DEVICES tell)";
  } else if (!all_see) {
    obstacle = fmt::format(
        "rank {} sees no GPU while others do: give each rank one, or compute on the CPU (device=cpu)", blind);
  } else if (sharing.second >= 0 && !options.share_devices) {
    obstacle = fmt::format(
        "ranks {} and {} would share a GPU: start at most one rank per GPU, let ranks share GPUs (share_gpus=true), or "
        "compute on the CPU (device=cpu)",
        sharing.first, sharing.second);
  }
  if (obstacle.empty()) return {.on_gpus = true, .shares_gpus = sharing.second >= 0, .warning = {}};
  if (!is_asked_for && options.may_leave_gpus) {
    return {.on_gpus = false, .shares_gpus = false, .warning = "all ranks compute on the CPU: " + obstacle};
  }
  TORCH_CHECK_VALUE(false, is_asked_for ? "device cuda was asked for, but " : "", obstacle);
}

void multiply_exactly_on_gpus() {
  auto& context = at::globalContext();
  context.setAllowTF32CuDNN(false);
  context.setAllowTF32CuBLAS(false);  // off by default, but some containers switch it on by their environment
  context.setAllowFP16ReductionCuBLAS(false);
  context.setAllowBF16ReductionCuBLAS(false);
}

}  // namespace megatron_cpp::parallel
