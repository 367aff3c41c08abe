#include "step37/program/run_metrics.h"

#include <c10/core/CachingDeviceAllocator.h>
#include <sys/resource.h>

namespace megatron_cpp::step37 {
namespace {

double peak_memory_bytes(const c10::Device& device) {
  if (device.is_cpu()) {
    rusage usage{};
    return getrusage(RUSAGE_SELF, &usage) == 0 ? 1024.0 * static_cast<double>(usage.ru_maxrss) : 0.0;
  }
  const auto stats = c10::getDeviceAllocator(device.type())->getDeviceStats(device.index());
  const auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
  return static_cast<double>(stats.allocated_bytes[all].peak);
}

}  // namespace

std::vector<std::pair<std::string, int64_t>> data_counts(const StepPacks& step, const ConsumedData& consumed) {
  return {{"tokens", step.num_tokens},
          {"images", step.num_pictures},
          {"samples", step.num_samples},
          {"consumed_tokens", consumed.tokens},
          {"consumed_samples", consumed.samples}};
}

std::vector<std::pair<std::string, double>> data_values(const StepPacks& step, int num_replicas, double data_seconds) {
  const auto share = [](int64_t part, int64_t whole) {
    return whole == 0 ? 0.0 : static_cast<double>(part) / static_cast<double>(whole);
  };
  return {{"padding_share", share(step.num_positions - step.num_tokens, step.num_positions)},
          {"wait_share", share(num_replicas * step.largest_cost - step.cost, num_replicas * step.largest_cost)},
          {"data_seconds", data_seconds}};
}

std::vector<std::pair<std::string, double>> speed_values(int64_t flops, double seconds, int num_ranks, double peak,
                                                         const c10::Device& device) {
  const double of_rank = static_cast<double>(flops) / seconds / num_ranks;
  return {{"tflops_per_rank", of_rank / 1e12},
          {"peak_share", of_rank / peak},
          {"peak_memory_bytes", peak_memory_bytes(device)}};
}

}  // namespace megatron_cpp::step37
