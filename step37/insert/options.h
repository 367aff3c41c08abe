// Options of the image insert.
#pragma once

#include <torch/arg.h>

#include <cstdint>

#include "step37/insert/plan.h"

namespace megatron_cpp::step37 {

/// How align_projector [H, C] is split over the ranks.
enum class ProjectorSharding {
  /// Rank r holds rows [r·H/t, (r+1)·H/t) and projects every feature row to its H/t columns. For features that every
  /// rank has.
  kColumn,
  /// Rank r holds columns [r·C/t, (r+1)·C/t) and computes a partial sum of every projected row from its channels. For
  /// features whose channels are split over the ranks. Adding partial sums rounds: less exact in bfloat16.
  kRow,
  /// Every rank has the whole projector and projects the images that it holds. For raw pictures, whose features are
  /// only on the rank where the vision tower ran.
  kReplicated,
  /// There is no projector: features are embedding rows already (C = H), from a projector of your own. They are sent as
  /// with kReplicated: from the holder of their image, and their gradients return to that holder only. A module that
  /// computes all features on every rank then needs GradientDomain::kReplicatedPartial.
  kNone,
};

/// How projected rows reach the rank that owns them.
enum class InsertExchange {
  /// The word embedding's collective carries the projected rows too.
  kFused,
  /// The baseline: a second collective gives every rank all projected rows, which go into the finished embedding. Needs
  /// a vocabulary-parallel embedding.
  kAllGather,
};

/// The default of ImageInsertEmbeddingOptions::checked: true if this library was built without NDEBUG.
bool checked_by_default();

/// Sizes, sharding and exchange of the insert; the same on every rank.
struct ImageInsertEmbeddingOptions {
  /// A projector [hidden_size, encoder_output_dim].
  ImageInsertEmbeddingOptions(int64_t encoder_output_dim, int64_t hidden_size)
      : encoder_output_dim_(encoder_output_dim), hidden_size_(hidden_size) {}

  TORCH_ARG(int64_t, encoder_output_dim);   ///< C
  TORCH_ARG(int64_t, hidden_size);          ///< H
  TORCH_ARG(bool, projector_bias) = false;  ///< whether the projector has a bias [H]
  TORCH_ARG(ProjectorSharding, projector_sharding) = ProjectorSharding::kColumn;  ///< depends on where features are
  TORCH_ARG(InsertExchange, exchange) = InsertExchange::kFused;                   ///< kAllGather for comparison
  TORCH_ARG(MismatchPolicy, on_mismatch) = MismatchPolicy::kError;  ///< if images and start tokens differ in number
  /// Backward adds to the existing gradients of the projector's parameters and returns none to autograd.
  TORCH_ARG(bool, accumulate_into_grad) = false;
  /// Before anything else is sent, the ranks compare what must be equal (hashes of ids, row counts and holders; dtypes;
  /// flags) and share their errors. If ranks differ, every rank throws an error that names rank and field, instead of
  /// a wrong result or a hang. Costs a few small collectives.
  TORCH_ARG(bool, checked) = checked_by_default();
};

}  // namespace megatron_cpp::step37
