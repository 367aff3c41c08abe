// What plans cost and exchanges send at sizes that no machine at hand has.
#pragma once

#include <nlohmann/json.hpp>
#include <vector>

namespace megatron_cpp::benchmark_image_insert {

/// Plans of up to 262144 positions and 1500 images: time to build one, to give a rank its runs, and how evenly rows are
/// spread over up to 64 ranks. One object a size. Not collective.
std::vector<nlohmann::ordered_json> rehearse_plans();

/// Bytes that the ranks of up to 64 send for one forward and backward pass by every way, and once per optimizer step
/// with up to 4096 data-parallel replicas: the layers' own code over groups of which only one rank exists. Not
/// collective.
std::vector<nlohmann::ordered_json> rehearse_volumes();

}  // namespace megatron_cpp::benchmark_image_insert
