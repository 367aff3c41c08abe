// The collectives that bring word embeddings and projected image rows together to the ranks that own them.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "megatron_cpp/tensor_parallel/parallel_embedding.h"
#include "parallel/group.h"
#include "step37/insert_plan.h"

namespace step37::internal {

/// Which columns of which rows a rank's projector makes.
enum class ProjectedRows {
  kColumns,   ///< every image row, columns [r·H/t, (r+1)·H/t)
  kSummands,  ///< every image row, a summand of it
  kWhole,     ///< rows of this rank's images
};

/// What an exchange has to know; equal on every rank of the group but for the tensors given to it.
struct ExchangeLayout {
  parallel::GroupPtr tp;
  bool sequence_parallel = false;
  int64_t hidden_size = 0;
  megatron::PartialLayout partial = megatron::PartialLayout::kSummand;
  ProjectedRows projected = ProjectedRows::kColumns;
  /// Of each image its first row among those its maker projects, and its maker (for kWhole; else empty).
  std::vector<int64_t> first_projected_row;
  std::vector<int64_t> maker;
  /// ParallelEmbedding::finders, or empty where ids aren't on the host: then text rows' gradients go to every rank.
  std::vector<int64_t> finders;
};

/// `partial` and `projected` to what this rank owns of the embedding with images: [S, B, H], or [S/t, B, H] under
/// sequence parallelism.
/// @param partial    [S, B, W], ParallelEmbedding::partial with the plan's rows left out; is written to.
/// @param projected  [n_r, H/t or H], what this rank projected, of the dtype and device of `partial`.
/// One collective forward. Backward, under sequence parallelism (else none), one too, that carries only what is
/// trained: see docs/image-insert.md. What is trained is read off requires_grad, and must be equal on every rank.
/// Collective over layout.tp.
at::Tensor fused_exchange(const at::Tensor& partial, const at::Tensor& projected, const InsertPlan& plan,
                          const ExchangeLayout& layout);

/// Rows `projected_rows` (undefined: 0, 1, 2, ...) of `projected` into rows `rows` of `embeddings` [R, B, H], in place.
/// An overwritten row has no gradient in `embeddings`.
at::Tensor insert_rows(const at::Tensor& embeddings, const at::Tensor& projected, const at::Tensor& rows,
                       const at::Tensor& projected_rows);

}  // namespace step37::internal
