// The image features that a rank hands to its projector, and where in them every image is.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "parallel/group.h"
#include "step37/image_for_insert.h"
#include "step37/insert_plan.h"

namespace step37::internal {

/// What a projector takes.
enum class ProjectorInput {
  kAllRows,        ///< every image's rows [n, C], on every rank
  kChannelsOfAll,  ///< this rank's channels of every image's rows, [n, C/t]
  kOwnImages,      ///< rows of the images this rank holds, [n_r, C]
};

struct LocalFeatures {
  /// As ProjectorInput says, one below the other, of the dtype and device asked for. At least one, perhaps of no row.
  std::vector<at::Tensor> rows;
  std::vector<int64_t> first_row;  ///< of each image of all groups: its first row in `rows`, or in those of its holder
  std::vector<int64_t> holder;     ///< of each image; empty if every rank's rows are of all images
  std::vector<int64_t> held_rows;  ///< of each rank, with `holder`
  /// The rows were on single ranks and have been brought to all: gradients are summed on their way back.
  bool gathered = false;
};

struct FeatureRequest {
  ProjectorInput input = ProjectorInput::kAllRows;
  int64_t channels = 0;  ///< C
  at::TensorOptions options;
  parallel::GroupPtr tp;
};

/// The feature rows of each image of a group, in order: as `rows` says, else from the sizes of the tensors alone.
/// @throws c10::ValueError for a group without features, for features that aren't [L, C] or [N, L, C], for `rows` that
///         aren't [N] int64 on the CPU. Not collective.
std::vector<int64_t> rows_of(const ImageForInsert& group);

/// Whether some of the group's features need a gradient.
bool need_gradient(const ImageForInsert& group);

/// Checks the features of all groups against the plan and takes those that are this rank's: all, or if some group's
/// features are on single ranks (`rows` is given), or the projector takes its own images, those of the images that it
/// holds. Not collective. Throws c10::ValueError.
LocalFeatures take_features(const std::vector<ImageForInsert>& images, const InsertPlan& plan,
                            const FeatureRequest& request);

/// Brings what take_features took to where the projector needs it.
/// Comm: none with kOwnImages, or with kAllRows where every rank has all. Rows of single ranks: kAllRows 1 all-gather
/// (of rows padded to the rank that holds most), backward 1 reduce-scatter; kChannelsOfAll 1 all-to-all, backward the
/// same. kChannelsOfAll where every rank has all channels: backward 1 all-gather; sliced already: none. Backward only
/// if features need a gradient. Collective over request.tp.
void complete_features(LocalFeatures& features, const FeatureRequest& request);

}  // namespace step37::internal
