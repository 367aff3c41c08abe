#include "parallel/gpu_assignment.h"

#include <map>

namespace parallel {

std::string gpu_obstacle(std::span<const uint64_t> gpus, bool share) {
  std::map<uint64_t, size_t> taken;
  for (size_t rank = 0; rank < gpus.size(); ++rank) {
    if (gpus[rank] == 0) return "rank " + std::to_string(rank) + " sees no GPU";
    const auto [first, is_free] = taken.emplace(gpus[rank], rank);
    if (is_free || share) continue;
    return "ranks " + std::to_string(first->second) + " and " + std::to_string(rank) +
           " would share a GPU: start at most one rank per GPU, or allow sharing";
  }
  return {};
}

}  // namespace parallel
