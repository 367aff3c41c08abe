#include "parallel/mpi/rank_order_reduction.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

namespace megatron_cpp::parallel {
namespace {

using c10d::ReduceOp;

/// target = left ∘ right; target may be left or right.
void combine(at::Tensor& target, const at::Tensor& left, const at::Tensor& right, ReduceOp::RedOpType reduction) {
  switch (reduction) {
    case ReduceOp::PRODUCT:
      at::mul_out(target, left, right);
      return;
    case ReduceOp::MIN:
      at::minimum_out(target, left, right);
      return;
    case ReduceOp::MAX:
      at::maximum_out(target, left, right);
      return;
    default:
      if (target.scalar_type() == at::kBool) {
        at::logical_or_out(target, left, right);
      } else {
        at::add_out(target, left, right);
      }
  }
}

void reduce_in_own_dtype(at::Tensor target, at::ArrayRef<at::Tensor> parts, ReduceOp::RedOpType reduction) {
  if (parts.size() == 1) {
    target.copy_(parts[0]);
  } else {
    combine(target, parts[0], parts[1], reduction);
  }
  for (size_t rank = 2; rank < parts.size(); ++rank) combine(target, target, parts[rank], reduction);
  if (reduction == ReduceOp::AVG) target.div_(static_cast<int64_t>(parts.size()));
}

void reduce_in_float(at::Tensor target, at::ArrayRef<at::Tensor> parts, ReduceOp::RedOpType reduction) {
  auto sum = parts[0].to(at::kFloat);
  auto part = at::empty_like(sum);
  for (size_t rank = 1; rank < parts.size(); ++rank) {
    part.copy_(parts[rank]);
    combine(sum, sum, part, reduction);
  }
  if (reduction == ReduceOp::AVG) sum.div_(static_cast<int64_t>(parts.size()));
  target.copy_(sum);
}

}  // namespace

void check_reduction(const ReduceOp& reduction, at::ScalarType dtype, const char* operation, const std::string& where) {
  switch (reduction) {
    case ReduceOp::AVG:
      TORCH_CHECK_VALUE(at::isFloatingType(dtype), operation, ": there is no average in ", dtype, " (", where, ")");
      return;
    case ReduceOp::SUM:
    case ReduceOp::PRODUCT:
    case ReduceOp::MIN:
    case ReduceOp::MAX:
      return;
    default:
      TORCH_CHECK_VALUE(false, operation, ": reduction ", static_cast<int>(reduction),
                        " is not supported by the MPI backend (", where, ")");
  }
}

void reduce_in_rank_order(const at::Tensor& output, at::ArrayRef<at::Tensor> parts, ReduceOp::RedOpType reduction) {
  // LibTorch itself computes the sum or product of two numbers in float32 and rounds once; MIN and MAX never round.
  const bool is_rounded_once =
      reduction == ReduceOp::MIN || reduction == ReduceOp::MAX || (parts.size() <= 2 && reduction != ReduceOp::AVG);
  if (at::isReducedFloatingType(output.scalar_type()) && !is_rounded_once) {
    reduce_in_float(output, parts, reduction);
  } else {
    reduce_in_own_dtype(output, parts, reduction);
  }
}

}  // namespace megatron_cpp::parallel
