#include "parallel/mappings.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <utility>

#include "parallel/collectives.h"
#include "parallel/shard.h"

namespace megatron_cpp::parallel {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor own_rows(const at::Tensor& input, const GroupPtr& group) {
  const auto range = even_shard(input.size(0), group->getSize(), group->getRank(), "number of rows");
  return input.narrow(0, range.begin, range.length());
}

at::Tensor own_columns(const at::Tensor& input, const GroupPtr& group) {
  const auto range = even_shard(input.size(-1), group->getSize(), group->getRank(), "number of columns");
  return input.narrow(-1, range.begin, range.length()).contiguous();
}

at::Tensor identity(const at::Tensor& input, const GroupPtr& /*group*/) { return input; }

at::Tensor sum(const at::Tensor& input, const GroupPtr& group) { return all_reduce(input, group); }

at::Tensor sequence_to_hidden(const at::Tensor& input, const GroupPtr& group) {
  const int t = group->getSize();
  even_shard_size(input.size(-1), t, "hidden size");
  // Block q of the sent rows holds the columns of rank q, for this rank's S/t positions.
  return all_to_all(at::cat(input.chunk(t, -1), 0), {}, {}, group);
}

at::Tensor hidden_to_sequence(const at::Tensor& input, const GroupPtr& group) {
  const int t = group->getSize();
  even_shard_size(input.size(0), t, "sequence length");
  return at::cat(all_to_all(input, {}, {}, group).chunk(t, 0), -1);
}

/// Gives `edge`, at most one row, to the rank that stands `step` places from this one, in a ring.
at::Tensor pass_on(const at::Tensor& edge, int step, const GroupPtr& group) {
  const int t = group->getSize();
  std::vector<int64_t> send(static_cast<size_t>(t), 0);
  auto receive = send;
  send[static_cast<size_t>((group->getRank() + step + t) % t)] = edge.size(0);
  receive[static_cast<size_t>((group->getRank() - step + t) % t)] = edge.size(0);
  return all_to_all(edge, receive, send, group);
}

at::Tensor next_rows(const at::Tensor& input, const GroupPtr& group) {
  const int64_t edge = std::min<int64_t>(input.size(0), 1);
  const auto kept = input.narrow(0, edge, input.size(0) - edge);
  return at::cat({kept, pass_on(input.narrow(0, 0, edge), -1, group)});
}

at::Tensor previous_rows(const at::Tensor& input, const GroupPtr& group) {
  const int64_t kept = std::max<int64_t>(input.size(0) - 1, 0);
  const auto edge = input.narrow(0, kept, input.size(0) - kept);
  return at::cat({pass_on(edge, 1, group), input.narrow(0, 0, kept)});
}

using Operation = at::Tensor (*)(const at::Tensor&, const GroupPtr&);

/// A mapping is a pair of collectives: one forward, one backward.
template <Operation kForward, Operation kBackward>
struct Mapping : torch::autograd::Function<Mapping<kForward, kBackward>> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& input, const GroupPtr& group) {
    context->saved_data["group"] = group;
    return kForward(input, group);
  }
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), "double backward through a parallel mapping");
    const auto group = context->saved_data["group"].toCustomClass<c10d::ProcessGroup>();
    return {kBackward(gradients[0], group), at::Tensor()};
  }
};

template <Operation kForward, Operation kBackward>
at::Tensor map(const at::Tensor& input, const GroupPtr& group) {
  if (group->getSize() == 1) return input;
  return Mapping<kForward, kBackward>::apply(input, group);
}

struct AllToAll : torch::autograd::Function<AllToAll> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& input,
                            const std::vector<int64_t>& output_splits, const std::vector<int64_t>& input_splits,
                            const GroupPtr& group) {
    context->saved_data["group"] = group;
    context->saved_data["output_splits"] = output_splits;
    context->saved_data["input_splits"] = input_splits;
    return parallel::all_to_all(input, output_splits, input_splits, group);
  }
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), "double backward through all_to_all");
    const auto group = context->saved_data["group"].toCustomClass<c10d::ProcessGroup>();
    const auto output_splits = context->saved_data["output_splits"].toIntVector();
    const auto input_splits = context->saved_data["input_splits"].toIntVector();
    return {parallel::all_to_all(gradients[0], input_splits, output_splits, group), at::Tensor(), at::Tensor(),
            at::Tensor()};
  }
};

using UnevenOperation = at::Tensor (*)(const at::Tensor&, const std::vector<int64_t>&, const GroupPtr&);

/// The same with the number of rows of each rank.
template <UnevenOperation kForward, UnevenOperation kBackward>
struct UnevenMapping : torch::autograd::Function<UnevenMapping<kForward, kBackward>> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& input, const std::vector<int64_t>& rows,
                            const GroupPtr& group) {
    context->saved_data["group"] = group;
    context->saved_data["rows"] = rows;
    return kForward(input, rows, group);
  }
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), "double backward through a parallel mapping");
    const auto group = context->saved_data["group"].toCustomClass<c10d::ProcessGroup>();
    return {kBackward(gradients[0], context->saved_data["rows"].toIntVector(), group), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor copy_to_tensor_model_parallel_region(const at::Tensor& input, const GroupPtr& tp) {
  return map<identity, sum>(input, tp);
}

at::Tensor reduce_from_tensor_model_parallel_region(const at::Tensor& input, const GroupPtr& tp) {
  return map<sum, identity>(input, tp);
}

at::Tensor reduce_from_tensor_model_parallel_region_to_partial_use(const at::Tensor& input, const GroupPtr& tp) {
  return map<sum, sum>(input, tp);
}

at::Tensor scatter_to_tensor_model_parallel_region(const at::Tensor& input, const GroupPtr& tp) {
  return map<own_columns, all_gather_last_dim>(input, tp);
}

at::Tensor gather_from_tensor_model_parallel_region(const at::Tensor& input, const GroupPtr& tp) {
  return map<all_gather_last_dim, own_columns>(input, tp);
}

at::Tensor all_gather_last_dim_from_tensor_parallel_region(const at::Tensor& input, const GroupPtr& tp) {
  return map<all_gather_last_dim, reduce_scatter_last_dim>(input, tp);
}

at::Tensor reduce_scatter_last_dim_to_tensor_parallel_region(const at::Tensor& input, const GroupPtr& tp) {
  return map<reduce_scatter_last_dim, all_gather_last_dim>(input, tp);
}

at::Tensor scatter_to_sequence_parallel_region(const at::Tensor& input, const GroupPtr& tp) {
  return map<own_rows, all_gather>(input, tp);
}

at::Tensor gather_from_sequence_parallel_region(const at::Tensor& input, const GroupPtr& tp) {
  return map<all_gather, reduce_scatter>(input, tp);
}

at::Tensor gather_from_sequence_parallel_region_to_replicated_use(const at::Tensor& input, const GroupPtr& tp) {
  return map<all_gather, own_rows>(input, tp);
}

at::Tensor reduce_scatter_to_sequence_parallel_region(const at::Tensor& input, const GroupPtr& tp) {
  return map<reduce_scatter, all_gather>(input, tp);
}

at::Tensor gather_uneven_from_sequence_parallel_region(const at::Tensor& input, const std::vector<int64_t>& rows,
                                                       const GroupPtr& group) {
  if (group->getSize() == 1) return input;
  return UnevenMapping<all_gather_uneven, reduce_scatter_uneven>::apply(input, rows, group);
}

at::Tensor reduce_scatter_uneven_to_sequence_parallel_region(const at::Tensor& input, const std::vector<int64_t>& rows,
                                                             const GroupPtr& group) {
  if (group->getSize() == 1) return input;
  return UnevenMapping<reduce_scatter_uneven, all_gather_uneven>::apply(input, rows, group);
}

at::Tensor differentiable_all_to_all(const at::Tensor& input, const std::vector<int64_t>& output_splits,
                                     const std::vector<int64_t>& input_splits, const GroupPtr& tp) {
  if (tp->getSize() == 1) return input;
  return AllToAll::apply(input, output_splits, input_splits, tp);
}

at::Tensor roll_sequence_parallel_region(const at::Tensor& input, const GroupPtr& tp) {
  return Mapping<next_rows, previous_rows>::apply(input, tp);
}

at::Tensor all_to_all_sequence_to_hidden_parallel(const at::Tensor& input, const GroupPtr& tp) {
  return map<sequence_to_hidden, hidden_to_sequence>(input, tp);
}

at::Tensor all_to_all_hidden_to_sequence_parallel(const at::Tensor& input, const GroupPtr& tp) {
  return map<hidden_to_sequence, sequence_to_hidden>(input, tp);
}

}  // namespace megatron_cpp::parallel
