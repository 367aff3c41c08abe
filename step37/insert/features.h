// The image features that a rank hands to its projector, and where their rows belong.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "parallel/group.h"
#include "parallel/sequence_layout.h"
#include "step37/insert/image_for_insert.h"
#include "step37/insert/options.h"
#include "step37/insert/plan.h"

namespace megatron_cpp::step37::internal {

/// Stands for a rank where every rank makes a part of a row.
inline constexpr int64_t kEveryRank = -1;

/// A row of the embedding that an image overwrites, and where it comes from.
struct InsertedRow {
  int64_t row;            ///< of the embedding, s*B + b
  int64_t projected_row;  ///< among the rows that its holder projects
  int64_t holder;         ///< the rank that makes the whole row, or kEveryRank
};

/// Which features a projector takes.
struct FeatureRequest {
  ProjectorSharding sharding;
  int64_t channels;  ///< C
  /// Each rank takes the rows that it owns in the sequence, instead of whole images. For whole rows
  /// of features that every rank has and that need no gradient.
  bool by_owners;
  parallel::SequenceLayout layout;  ///< who owns which positions
  at::TensorOptions options;
  parallel::GroupPtr tp;
};

/// What a rank projects. The numbers are equal on every rank.
struct LocalFeatures {
  at::Tensor rows;                    ///< [n, C], or [n, C/t] of the row sharding; dtype and device as asked for
  std::vector<InsertedRow> inserted;  ///< by batch row and position
  std::vector<int64_t> rows_of_rank;  ///< how many rows each rank projects, where rows have holders; else empty
  bool were_gathered = false;         ///< the rows were on single ranks, and their gradients are summed on the way back
  std::vector<int64_t> first_row;     ///< of each image: its first row in `rows`, or in those of its holder
  std::vector<int64_t> image_holders;  ///< of each image; empty if every rank has all
};

/// Checks the features of all groups against the plan and takes those that are this rank's: all, or if some group's
/// images are held by single ranks, or the projector makes whole rows, those of the images that it holds.
/// @throws c10::ValueError. Not collective.
LocalFeatures take_features(const std::vector<ImageForInsert>& images, const InsertPlan& plan,
                            const FeatureRequest& request);

/// Brings what take_features took to where the projector needs it, and says which row ends where.
/// Comm: none of whole rows (replicated, none), or in the column sharding where every rank has all. Rows of single
/// ranks: column 1 all-gather (of rows padded to the rank that holds most), backward 1 reduce-scatter; row 1
/// all-to-all, backward the same. Row where every rank has all channels: backward 1 all-gather; sliced already: none.
/// Backward only if features need a gradient. Collective over request.tp.
void bring_features(LocalFeatures& features, const InsertPlan& plan, const FeatureRequest& request);

/// Whether features of some group need a gradient.
bool need_gradient(const std::vector<ImageForInsert>& images);

}  // namespace megatron_cpp::step37::internal
