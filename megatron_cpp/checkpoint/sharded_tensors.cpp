#include <ATen/ATen.h>

#include <algorithm>
#include <map>
#include <set>
#include <string_view>
#include <utility>

#include "megatron_cpp/checkpoint/sharded_checkpoint.h"

namespace megatron_cpp {
namespace {

/// A part that this rank holds, and the ranks that hold the same.
struct HeldTensor {
  ShardedTensor tensor;
  std::string_view replicas;  ///< a group of parallel::kGroupKinds; empty: tensor.main_replica is known
};

/// A box of a rank's tensor, and its values, in the shape of the box.
struct LocalPart {
  Box box;
  at::Tensor values;
};

/// The part of a segment that the boxes of a rank's tensor hold; without elements if they hold none.
void append_segment(std::vector<HeldTensor>& result, const ParameterSegment& segment,
                    const std::vector<LocalPart>& parts, const at::TensorOptions& options, const TensorId& id,
                    std::string_view replicas, bool is_written) {
  bool is_empty = true;
  for (const auto& [box, values] : parts) {
    const auto held = intersection(box, {segment.local_begin, segment.box.length});
    if (!held) continue;
    is_empty = false;
    Box global = *held;
    for (size_t d = 0; d < global.begin.size(); ++d) {
      global.begin[d] += segment.box.begin[d] - segment.local_begin[d];
    }
    result.push_back(
        {{id, view_of(values, box, *held), segment.global_shape, {std::move(global)}, is_written}, replicas});
  }
  if (!is_empty) return;
  Box nothing = segment.box;
  nothing.length.front() = 0;
  const auto values = at::empty(nothing.length, options);
  result.push_back({{id, values, segment.global_shape, {std::move(nothing)}, is_written}, replicas});
}

/// `values` are those of the elements `range` of a tensor of this shape.
std::vector<LocalPart> local_parts(const at::Tensor& values, at::IntArrayRef shape, parallel::Range range) {
  std::vector<LocalPart> parts;
  int64_t first = 0;
  for (auto& box : boxes_of_range(Box::whole(shape.vec()), range)) {
    const int64_t numel = box.numel();
    auto part = values.narrow(0, first, numel).view(box.length);
    parts.push_back({std::move(box), std::move(part)});
    first += numel;
  }
  return parts;
}

/// Rows [rows.begin, rows.end) of a part of `num_rows` rows; a part without dimensions has one.
void append_rows(std::vector<ShardedTensor>& result, const ShardedTensor& whole, parallel::Range rows, int64_t num_rows,
                 bool is_written) {
  if (rows.length() == 0) return;
  auto tensor = whole;
  tensor.main_replica = is_written;
  if (rows.length() < num_rows) {
    tensor.local = whole.local.narrow(0, rows.begin, rows.length());
    tensor.part.box.begin.front() += rows.begin;
    tensor.part.box.length.front() = rows.length();
  }
  result.push_back(std::move(tensor));
}

/// Shares the writing out: the bytes that the ranks of a group hold alike, one tensor after the other, are cut into as
/// many equal ranges as there are ranks. A rank writes the rows that begin in its range.
std::vector<ShardedTensor> share_out(const std::vector<HeldTensor>& held, const parallel::ProcessGroups& groups) {
  std::map<std::string_view, int64_t> totals;
  for (const auto& [tensor, replicas] : held) totals[replicas] += static_cast<int64_t>(tensor.local.nbytes());
  std::map<std::string_view, int64_t> before;
  std::vector<ShardedTensor> result;
  for (const auto& [tensor, replicas] : held) {
    const auto bytes = static_cast<int64_t>(tensor.local.nbytes());
    if (replicas.empty() || bytes == 0) {
      result.push_back(tensor);
      continue;
    }
    const auto& group = groups.of(replicas);
    const int64_t total = totals[replicas];
    const int64_t first = std::exchange(before[replicas], before[replicas] + bytes);
    const int64_t num_rows = tensor.local.dim() == 0 ? 1 : tensor.local.size(0);
    const int64_t row_bytes = bytes / num_rows;
    // The first row that begins in the range of rank `rank`, or in one behind it.
    const auto first_row_of = [&](int64_t rank) {
      const int64_t cut = total / group->getSize() * rank + std::min(rank, total % group->getSize());
      return std::clamp<int64_t>((cut - first + row_bytes - 1) / row_bytes, 0, num_rows);
    };
    const int64_t begin = first_row_of(group->getRank());
    const int64_t end = first_row_of(group->getRank() + 1);
    append_rows(result, tensor, {0, begin}, num_rows, false);
    append_rows(result, tensor, {begin, end}, num_rows, true);
    append_rows(result, tensor, {end, num_rows}, num_rows, false);
  }
  return result;
}

/// Parameters that have no optimizer.
void append_parameters(std::vector<HeldTensor>& result, const std::vector<ParameterShard>& parameters,
                       const CheckpointName& published_name) {
  for (const auto& shard : parameters) {
    const auto values = shard.parameter.detach();
    for (const auto& segment : shard.segments) {
      append_segment(result, segment, {{Box::whole(values.sizes().vec()), values}}, values.options(),
                     {published_name(segment.name)}, shard.domain.replicated_over(), /*is_written=*/true);
    }
  }
}

}  // namespace

std::vector<ShardedTensor> sharded_tensors(const std::vector<ParameterShard>& parameters,
                                           const CheckpointName& published_name,
                                           const parallel::ProcessGroups& groups) {
  std::vector<HeldTensor> held;
  append_parameters(held, parameters, published_name);
  return share_out(held, groups);
}

std::vector<ShardedTensor> sharded_tensors(const std::vector<ParameterShard>& parameters, const AdamW& optimizer,
                                           const CheckpointName& published_name,
                                           const parallel::ProcessGroups& groups) {
  std::set<std::string> updated;
  for (const auto& slice : optimizer.slices()) updated.insert(slice.shard.name);
  std::vector<ParameterShard> others;
  for (const auto& shard : parameters) {
    if (!updated.contains(shard.name)) others.push_back(shard);
  }
  std::vector<HeldTensor> held;
  append_parameters(held, others, published_name);
  for (const auto& slice : optimizer.slices()) {
    const auto& shard = slice.shard;
    const auto replicas = shard.domain.replicated_over();
    // Divided over the group that gradients are summed over. If the parameter has more replicas, these are over tp, and
    // the first one writes: the others may have divided it in another way.
    const bool is_written = shard.domain.summed_over == replicas || groups.tp->getRank() == 0;
    for (const auto& [role, values] : {std::pair{TensorRole::kParameter, slice.main},
                                       {TensorRole::kExpAvg, slice.exp_avg},
                                       {TensorRole::kExpAvgSq, slice.exp_avg_sq}}) {
      const auto parts = local_parts(values, shard.parameter.sizes(), slice.elements);
      for (const auto& segment : shard.segments) {
        append_segment(held, segment, parts, values.options(), {published_name(segment.name), role},
                       slice.is_divided ? std::string_view() : replicas, is_written);
      }
    }
  }
  return share_out(held, groups);
}

}  // namespace megatron_cpp
