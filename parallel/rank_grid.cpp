#include "parallel/rank_grid.h"

#include <c10/util/Exception.h>

#include <array>
#include <map>

namespace parallel {
namespace {

constexpr std::array<std::string_view, 5> kDimensions = {"tp", "cp", "ep", "dp", "pp"};

std::array<int, 5> sizes(const RankGrid& grid) { return {grid.tp, grid.cp, grid.ep, grid.dp, grid.pp}; }

std::array<bool, 5> selected(std::string_view dims) {
  std::array<bool, 5> result{};
  std::string_view rest = dims;
  while (!rest.empty()) {
    const auto dash = rest.find('-');
    const auto name = rest.substr(0, dash);
    rest = dash == std::string_view::npos ? std::string_view{} : rest.substr(dash + 1);
    size_t dim = 0;
    while (dim < kDimensions.size() && kDimensions[dim] != name) ++dim;
    TORCH_CHECK_VALUE(dim < kDimensions.size(), "unknown parallel dimension '", name, "' in '", dims,
                      "': expected tp, cp, ep, dp or pp");
    result[dim] = true;
  }
  return result;
}

/// The rank's coordinates outside `in_group`, as one number: equal for ranks of the same group.
int outside_coordinates(int rank, const std::array<int, 5>& extent, const std::array<bool, 5>& in_group) {
  int key = 0;
  int stride = 1;
  for (size_t dim = 0; dim < extent.size(); ++dim) {
    const int coordinate = rank % extent[dim];
    rank /= extent[dim];
    if (in_group[dim]) continue;
    key += coordinate * stride;
    stride *= extent[dim];
  }
  return key;
}

}  // namespace

void RankGrid::validate(int world_size) const {
  bool positive = true;
  for (const int size : sizes(*this)) positive = positive && size >= 1;
  TORCH_CHECK_VALUE(positive && this->world_size() == world_size, "tensor-parallel ", tp, " x context-parallel ", cp,
                    " x expert-parallel ", ep, " x data-parallel ", dp, " x pipeline-parallel ", pp,
                    " does not make the ", world_size, " ranks that were started");
}

std::vector<std::vector<int>> RankGrid::groups(std::string_view dims) const {
  const auto in_group = selected(dims);
  const auto extent = sizes(*this);
  std::map<int, std::vector<int>> by_key;
  for (int rank = 0; rank < world_size(); ++rank) by_key[outside_coordinates(rank, extent, in_group)].push_back(rank);
  std::vector<std::vector<int>> result;
  result.reserve(by_key.size());
  for (auto& [key, ranks] : by_key) result.push_back(std::move(ranks));
  return result;
}

std::vector<int> RankGrid::group_of(int rank, std::string_view dims) const {
  return groups(dims)[static_cast<size_t>(group_index_of(rank, dims))];
}

int RankGrid::group_index_of(int rank, std::string_view dims) const {
  TORCH_CHECK_VALUE(rank >= 0 && rank < world_size(), "rank ", rank, " is not in a world of ", world_size());
  return outside_coordinates(rank, sizes(*this), selected(dims));
}

}  // namespace parallel
