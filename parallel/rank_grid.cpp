#include "parallel/rank_grid.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <map>

namespace megatron_cpp::parallel {
namespace {

struct Dimension {
  std::string_view name;
  int size;
  bool in_group = false;
};

/// The dimensions of a grid, the fastest first.
using Dimensions = std::array<Dimension, 4>;

Dimensions dense_grid(const RankGrid& grid) {
  return {{{"tp", grid.tp}, {"cp", grid.cp}, {"dp", grid.dp}, {"pp", grid.pp}}};
}

Dimensions expert_grid(const RankGrid& grid) {
  return {{{"etp", grid.expert_tp()}, {"ep", grid.ep}, {"edp", grid.edp()}, {"pp", grid.pp}}};
}

std::vector<std::string_view> split(std::string_view dims) {
  std::vector<std::string_view> names;
  for (size_t begin = 0; begin <= dims.size();) {
    const auto end = std::min(dims.find('-', begin), dims.size());
    names.push_back(dims.substr(begin, end - begin));
    begin = end + 1;
  }
  return names;
}

Dimension* find(Dimensions& grid, std::string_view name) {
  const auto found = std::find_if(grid.begin(), grid.end(), [&](const auto& dim) { return dim.name == name; });
  return found == grid.end() ? nullptr : &*found;
}

/// The grid that has the dimensions in `dims`, with these marked in_group.
Dimensions grid_with_group(const RankGrid& grid, std::string_view dims) {
  const auto names = split(dims);
  const auto is_of_experts = [](std::string_view name) { return name == "etp" || name == "ep" || name == "edp"; };
  auto result = std::any_of(names.begin(), names.end(), is_of_experts) ? expert_grid(grid) : dense_grid(grid);
  for (const auto name : names) {
    auto* dim = find(result, name);
    auto dense = dense_grid(grid);
    TORCH_CHECK_VALUE(dim != nullptr || find(dense, name) == nullptr, "'", dims,
                      "' mixes two grids: the dense one has tp, cp, dp, pp, that of the experts etp, ep, edp, pp");
    TORCH_CHECK_VALUE(dim != nullptr, "unknown parallel dimension '", name, "' in '", dims,
                      "': expected tp, cp, dp, pp, or etp, ep, edp, pp");
    dim->in_group = true;
  }
  return result;
}

/// The rank's coordinates outside the group, as one number: equal for ranks of the same group.
int outside_coordinates(int rank, const Dimensions& grid) {
  int key = 0;
  int stride = 1;
  for (const auto& dim : grid) {
    const int coordinate = rank % dim.size;
    rank /= dim.size;
    if (dim.in_group) continue;
    key += coordinate * stride;
    stride *= dim.size;
  }
  return key;
}

}  // namespace

int RankGrid::edp() const {
  const int experts = expert_tp() * ep;
  TORCH_CHECK_VALUE(experts >= 1 && tp * cp * dp % experts == 0, "expert-tensor-parallel ", expert_tp(),
                    " x expert-parallel ", ep, " does not divide tensor-parallel ", tp, " x context-parallel ", cp,
                    " x data-parallel ", dp);
  return tp * cp * dp / experts;
}

void RankGrid::validate(int world_size) const {
  const int smallest = std::min({tp, cp, dp, pp, ep, expert_tp()});
  TORCH_CHECK_VALUE(smallest >= 1 && this->world_size() == world_size, "tensor-parallel ", tp, " x context-parallel ",
                    cp, " x data-parallel ", dp, " x pipeline-parallel ", pp, " (expert-parallel ", ep,
                    ", expert-tensor-parallel ", expert_tp(), ") does not make the ", world_size,
                    " ranks that were started");
  edp();
}

std::vector<std::vector<int>> RankGrid::groups(std::string_view dims) const {
  const auto grid = grid_with_group(*this, dims);
  std::map<int, std::vector<int>> by_key;
  for (int rank = 0; rank < world_size(); ++rank) by_key[outside_coordinates(rank, grid)].push_back(rank);
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
  return outside_coordinates(rank, grid_with_group(*this, dims));
}

std::string RankGrid::text() const {
  return fmt::format("tp {}, cp {}, dp {}, pp {}, ep {}, etp {}", tp, cp, dp, pp, ep, expert_tp());
}

}  // namespace megatron_cpp::parallel
