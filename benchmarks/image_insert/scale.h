// Costs of plans and volumes of exchanges for numbers of ranks that aren't available, computed in one process.
#pragma once

#include <nlohmann/json.hpp>
#include <vector>

namespace megatron_cpp::benchmark_image_insert {

/// Plans of up to 262144 positions and 1500 images: time to build one, time to find the runs of a rank, and how evenly
/// rows are spread over up to 64 ranks. One object per size. Not collective.
std::vector<nlohmann::ordered_json> rehearse_plans();

/// Bytes that each of up to 64 ranks sends in one forward and backward pass, by every way, and once per optimizer step
/// with up to 4096 data-parallel replicas. Runs the real layers over groups of which only one rank exists. Not
/// collective.
std::vector<nlohmann::ordered_json> rehearse_volumes();

}  // namespace megatron_cpp::benchmark_image_insert
