#include "megatron_cpp/optimizer/flat_layout.h"

#include <algorithm>

namespace megatron_cpp {
namespace {

int64_t rounded_up(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }

}  // namespace

int64_t FlatLayout::padded_numel(int64_t numel) { return rounded_up(numel, kParameterMultiple); }

int64_t FlatLayout::slice_numel_of(int64_t numel, int64_t ranks) {
  return rounded_up((numel + ranks - 1) / ranks, kSliceMultiple);
}

FlatLayout::FlatLayout(const std::vector<int64_t>& numels, int ranks) : num_slices(ranks) {
  for (const int64_t elements : numels) {
    parameters.push_back({numel, numel + elements});
    numel += padded_numel(elements);
  }
  slice_numel = slice_numel_of(numel, ranks);
}

parallel::Range FlatLayout::elements_of(size_t parameter, int rank) const {
  const auto& place = parameters[parameter];
  const auto within = [&](int64_t index) { return std::clamp(index, place.begin, place.end) - place.begin; };
  return {within(slice(rank).begin), within(slice(rank).end)};
}

}  // namespace megatron_cpp
