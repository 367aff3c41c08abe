// Whether a job can compute on GPUs.
#pragma once

#include <cstdint>
#include <span>
#include <string>

namespace parallel {

/// What keeps the ranks from computing on a GPU each; empty if nothing does. Not collective.
/// @param gpus   of each rank of the world the GPU that it would take, by gpu_identity(); 0 if it sees none.
/// @param share  whether ranks may take the same.
std::string gpu_obstacle(std::span<const uint64_t> gpus, bool share);

}  // namespace parallel
