// The image features that a rank projects, and the embedding rows that they overwrite.
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

/// InsertedRow::holder where every rank computes a part of the row.
inline constexpr int64_t kEveryRank = -1;

/// An embedding row that an image overwrites, and the projected row that replaces it.
struct InsertedRow {
  int64_t row;            ///< of the embedding, s*B + b
  int64_t projected_row;  ///< row of the projector's output on `holder`
  int64_t holder;         ///< the rank that projects the whole row, or kEveryRank
};

/// Which features the projector needs on this rank.
struct FeatureRequest {
  ProjectorSharding sharding;
  int64_t channels;  ///< C
  /// Each rank projects the rows that it owns in the sequence instead of whole images. Needs a replicated projector,
  /// and features that every rank has and that need no gradient.
  bool by_owners;
  parallel::SequenceLayout layout;  ///< which rank owns which positions
  at::TensorOptions options;
  parallel::GroupPtr tp;
};

/// The features that a rank projects. All but `rows` is equal on every rank.
struct LocalFeatures {
  at::Tensor rows;                     ///< [n, C], or [n, C/t] in the row sharding; dtype and device as requested
  std::vector<InsertedRow> inserted;   ///< by batch row and position
  std::vector<int64_t> rows_of_rank;   ///< number of rows that each rank projects; empty if all project all
  bool were_gathered = false;          ///< bring_features sent `rows` from their holders to every rank
  std::vector<int64_t> first_row;      ///< per image: its first row in `rows` of its holder, or of every rank
  std::vector<int64_t> image_holders;  ///< per image; empty if every rank takes all images
};

/// Checks the features of all groups against the plan and takes this rank's: those of the images that it holds if a
/// group is `held`, or if the projector computes whole rows without by_owners; else all.
/// @throws c10::ValueError. Not collective.
LocalFeatures take_features(const std::vector<ImageForInsert>& images, const InsertPlan& plan,
                            const FeatureRequest& request);

/// Sends the features that take_features took to the ranks that project them, and fills in `inserted`.
/// Comm, backward only if features need a gradient. Replicated or no projector: none. Column: none if every rank took
/// all images, else 1 all-gather of rows padded to the largest holder, backward 1 reduce-scatter. Row: if every rank
/// took all images, backward 1 all-gather, or none if channels come sliced; else 1 all-to-all, backward the same.
/// Collective over request.tp.
void bring_features(LocalFeatures& features, const InsertPlan& plan, const FeatureRequest& request);

/// Whether features of some group need a gradient.
bool need_gradient(const std::vector<ImageForInsert>& images);

}  // namespace megatron_cpp::step37::internal
