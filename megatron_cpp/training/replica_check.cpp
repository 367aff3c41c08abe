#include "megatron_cpp/training/replica_check.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <map>
#include <string>
#include <string_view>

#include "parallel/agree.h"
#include "parallel/collectives.h"

namespace megatron_cpp {
namespace {

/// Elements that are widened to 8 bytes each at a time.
constexpr int64_t kHashedAtATime = 1 << 20;

at::ScalarType integer_of_size(int64_t bytes) {
  switch (bytes) {
    case 1:
      return at::kByte;
    case 2:
      return at::kShort;
    case 4:
      return at::kInt;
    default:
      return at::kLong;
  }
}

/// The world ranks of this rank's group of a kind.
std::vector<int> world_ranks_of(std::string_view kind, const parallel::ProcessGroups& groups) {
  for (const auto& [name, dims, group] : parallel::kGroupKinds) {
    if (kind == name) return groups.grid.group_of(groups.world->getRank(), dims);
  }
  TORCH_INTERNAL_ASSERT(false);
}

}  // namespace

at::Tensor hash_of_bits(const at::Tensor& tensor) {
  const auto bits = tensor.detach().view({-1}).view(integer_of_size(tensor.element_size()));
  auto hash = at::zeros({}, bits.options().dtype(at::kLong));
  for (int64_t begin = 0; begin < bits.numel(); begin += kHashedAtATime) {
    const auto part = bits.narrow(0, begin, std::min(kHashedAtATime, bits.numel() - begin)).to(at::kLong);
    const auto factors = at::arange(2 * begin + 1, 2 * (begin + part.numel()), 2, part.options());
    hash += (part * factors).sum();
  }
  return hash;
}

void check_replicas(const std::vector<ParameterShard>& parameters, const parallel::ProcessGroups& groups,
                    const std::string& when) {
  std::vector<at::Tensor> hashes;
  std::map<std::string_view, std::vector<int64_t>> by_group;  // parameters that have copies in its ranks
  for (const auto& shard : parameters) {
    by_group[shard.domain.replicated_over()].push_back(static_cast<int64_t>(hashes.size()));
    hashes.push_back(hash_of_bits(shard.parameter));
  }
  const auto num_parameters = static_cast<int64_t>(hashes.size());
  const auto hash = at::stack(hashes).cpu();
  int64_t first = num_parameters;  // that differs on this rank's copies
  std::string message;
  for (const auto& [kind, members] : by_group) {
    const auto& group = groups.of(kind);
    if (group->getSize() == 1) continue;
    const auto own = hash.index_select(0, at::tensor(members, at::kLong));
    const auto all = parallel::all_gather(own.unsqueeze(0), group);  // [ranks, members]
    const auto differs = all.ne(all[0]);
    const auto columns = differs.any(0).nonzero();
    if (columns.numel() == 0) continue;
    const auto column = columns[0].item<int64_t>();
    const auto parameter = members[static_cast<size_t>(column)];
    if (parameter >= first) continue;
    first = parameter;
    const auto ranks = world_ranks_of(kind, groups);
    std::vector<int> others;
    for (size_t rank = 0; rank < ranks.size(); ++rank) {
      if (differs[static_cast<int64_t>(rank)][column].item<bool>()) others.push_back(ranks[rank]);
    }
    message = fmt::format(
        "{} parameter {} is not the same on all ranks that hold a copy of it: rank{} {} of the world {} other values "
        "than rank {}",
        when, parameters[static_cast<size_t>(parameter)].name, others.size() == 1 ? "" : "s", fmt::join(others, ", "),
        others.size() == 1 ? "has" : "have", ranks.front());
  }
  const auto first_of_all =
      parallel::all_reduce(at::full({1}, first, at::kLong), groups.world, parallel::Reduction::kMin).item<int64_t>();
  parallel::agree(first == num_parameters || first != first_of_all, message, groups.world);
}

}  // namespace megatron_cpp
