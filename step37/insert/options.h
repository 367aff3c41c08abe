// How the image insert is sharded, and what it does with what doesn't fit.
#pragma once

#include <torch/arg.h>

#include <cstdint>

#include "step37/insert/plan.h"

namespace megatron_cpp::step37 {

/// How align_projector [H, C] lies on the ranks.
enum class ProjectorSharding {
  /// Rank r holds rows [r·H/t, (r+1)·H/t) and projects every feature row to its H/t columns. For features that every
  /// rank has.
  kColumn,
  /// Rank r holds columns [r·C/t, (r+1)·C/t) and makes a summand of every projected row out of its channels. For
  /// features that are produced by channel. Sums of summands are rounded: not the first choice in bfloat16.
  kRow,
  /// Every rank holds all and projects whole images: those it is assigned. For raw pictures, whose features are only
  /// where the tower ran.
  kReplicated,
  /// There is no projector: features are rows of the embedding already, C = H, made by a projector of your own. They
  /// travel as those of a replicated projector: each comes from one rank, and its gradient goes back to that rank
  /// alone. What computes features alike on every rank then needs GradientDomain::kReplicatedPartial.
  kNone,
};

/// How projected rows reach the rank that owns them.
enum class InsertExchange {
  /// Through the word embedding's one collective: nothing is sent on top.
  kFused,
  /// The plain way, and the baseline: whole projected rows on every rank, inserted into the finished embedding. With a
  /// vocabulary-parallel embedding.
  kAllGather,
};

/// Whether checked mode is on unless the options say otherwise: where this library was built without NDEBUG.
bool checked_by_default();

/// Sizes, sharding and exchange of the insert; the same on every rank.
struct ImageInsertEmbeddingOptions {
  /// A projector [hidden_size, encoder_output_dim].
  ImageInsertEmbeddingOptions(int64_t encoder_output_dim, int64_t hidden_size)
      : encoder_output_dim_(encoder_output_dim), hidden_size_(hidden_size) {}

  TORCH_ARG(int64_t, encoder_output_dim);   ///< C
  TORCH_ARG(int64_t, hidden_size);          ///< H
  TORCH_ARG(bool, projector_bias) = false;  ///< whether projected rows get one, [H]
  TORCH_ARG(ProjectorSharding, projector_sharding) = ProjectorSharding::kColumn;  ///< by where features come from
  TORCH_ARG(InsertExchange, exchange) = InsertExchange::kFused;                   ///< kAllGather for comparison
  TORCH_ARG(MismatchPolicy, on_mismatch) = MismatchPolicy::kError;  ///< of images and start tokens in number
  /// The projector's backward adds into its existing gradients and gives autograd none.
  TORCH_ARG(bool, accumulate_into_grad) = false;
  /// Ranks compare what must be equal (a hash of the ids, image rows and holders, dtypes, flags) and agree on errors
  /// before anything else is sent: a disagreement is an error on every rank that names rank and field, instead of
  /// something computed wrong or a hang. Costs some small collectives.
  TORCH_ARG(bool, checked) = checked_by_default();
};

}  // namespace megatron_cpp::step37
