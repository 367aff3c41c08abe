// What a run's metrics say about a step beside its losses.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "step37/data/batch_loader.h"

namespace megatron_cpp::step37 {

/// What a run has trained on since its beginning.
struct ConsumedData {
  int64_t tokens = 0;  ///< padding left out
  int64_t samples = 0;
};

/// tokens, images and samples of the step, and consumed_tokens and consumed_samples after it.
std::vector<std::pair<std::string, int64_t>> data_counts(const StepPacks& step, const ConsumedData& consumed);

/// Of the step's data:
///   - padding_share: of the positions;
///   - wait_share: of the replicas' time that they would wait for the slowest one, if a floating-point operation took
///     all the same time. (From the operations of their packs and not from clocks: to read those of GPUs, a step would
///     have to wait for them once more.)
///   - data_seconds: that rank 0 has waited for the step's data.
std::vector<std::pair<std::string, double>> data_values(const StepPacks& step, int num_replicas, double data_seconds);

/// Of the step's speed:
///   - tflops_per_rank: 10^12 floating-point operations a second of a rank, on average: products and attention of
///     decoder and tower, where that runs (pack_flops), forward and backward; recomputation isn't counted;
///   - peak_share: of them in `peak`, what product_rate measured;
///   - peak_memory_bytes: the most that rank 0 has used since its start: on a GPU what LibTorch has allocated there, on
///     a CPU the process's resident memory.
/// @param flops  of all ranks
std::vector<std::pair<std::string, double>> speed_values(int64_t flops, double seconds, int num_ranks, double peak,
                                                         const c10::Device& device);

}  // namespace megatron_cpp::step37
