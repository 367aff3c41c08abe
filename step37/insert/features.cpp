#include "step37/insert/features.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <numeric>

#include "megatron_cpp/tensor_parallel/rows.h"
#include "megatron_cpp/tensor_parallel/to_device.h"
#include "parallel/mappings.h"
#include "parallel/shard.h"
#include "step37/insert/projection.h"

namespace megatron_cpp::step37::internal {
namespace {

/// The rank that holds each image: as the groups say, else balanced by rows.
std::vector<int64_t> holders_of(const std::vector<ImageForInsert>& images, const InsertPlan& plan, int t) {
  const auto balanced = parallel::balanced_assignment(plan.image_rows(), t);
  std::vector<int64_t> holders(balanced.begin(), balanced.end());
  auto next = holders.begin();
  for (const auto& group : images) {
    const auto num_images = static_cast<int64_t>(rows_of(group).size());
    if (group.held && group.held->holders.defined()) {
      const auto given = to_vector(group.held->holders, "holders", group);
      TORCH_CHECK_VALUE(static_cast<int64_t>(given.size()) == num_images, given.size(), " holders for ", num_images,
                        " images of start token ", group.insert_start_token);
      for (const int64_t rank : given) {
        TORCH_CHECK_VALUE(rank >= 0 && rank < t, "holder ", rank, " of an image of start token ",
                          group.insert_start_token, " is no rank of a group of ", t);
      }
      std::copy(given.begin(), given.end(), next);
    }
    next += num_images;
  }
  return holders;
}

/// Walks through the groups' tensors, checks them, and collects the rows of the images that this rank takes.
class RowCollector {
 public:
  RowCollector(const InsertPlan& plan, const FeatureRequest& request, const std::vector<int64_t>& holders)
      : plan_(plan), request_(request), holders_(holders) {}

  void add(const ImageForInsert& group) {
    const auto num_images = static_cast<int64_t>(rows_of(group).size());
    std::vector<int64_t> given;  // the images that the group's tensors hold, in order
    for (const int64_t end = next_image_ + num_images; next_image_ < end; ++next_image_) {
      if (!group.held || takes(next_image_)) given.push_back(next_image_);
    }
    const int64_t token = group.insert_start_token;
    size_t position = 0;
    for (const auto& tensor : feature_tensors(group)) {
      check_width(tensor, token);
      const auto stacked = tensor.dim() == 2 ? tensor.unsqueeze(0) : tensor;
      std::vector<int64_t> taken;
      for (int64_t i = 0; i < stacked.size(0); ++i, ++position) {
        TORCH_CHECK_VALUE(position < given.size(), "more images than the ", given.size(), " of start token ", token,
                          " that this rank holds");
        const auto image = static_cast<size_t>(given[position]);
        TORCH_CHECK_VALUE(stacked.size(1) == plan_.image_rows()[image], "image ", image, " has ", stacked.size(1),
                          " feature rows, the plan says ", plan_.image_rows()[image]);
        if (takes(given[position])) taken.push_back(i);
      }
      add_images(stacked, taken);
    }
    TORCH_CHECK_VALUE(position == given.size(), position, " images of start token ", token, " where this rank holds ",
                      given.size());
  }

  at::Tensor rows() const {
    if (pieces_.empty()) return at::empty({0, width_ < 0 ? request_.channels : width_}, request_.options);
    return pieces_.size() == 1 ? pieces_.front() : at::cat(pieces_);
  }

 private:
  bool takes(int64_t image) const {
    return holders_.empty() || holders_[static_cast<size_t>(image)] == request_.tp->getRank();
  }
  /// Features have all C channels, or, in the row sharding if every rank has all images, this rank's C/t.
  void check_width(const at::Tensor& tensor, int64_t token) {
    const int64_t width = tensor.size(-1);
    const bool is_sliced = request_.sharding == ProjectorSharding::kRow && holders_.empty() &&
                           width * request_.tp->getSize() == request_.channels;
    TORCH_CHECK_VALUE(width == request_.channels || is_sliced, "image features of start token ", token, " have width ",
                      width, ", align_projector takes ", request_.channels);
    TORCH_CHECK_VALUE(width_ < 0 || width_ == width, "image features of start token ", token, " have width ", width,
                      ", others ", width_, ": either all are sliced by channel or none");
    width_ = width;
  }
  void add_images(const at::Tensor& stacked, const std::vector<int64_t>& taken) {
    // If this rank takes none of the images, an empty piece keeps the vision tower in the graph: its parameters get
    // zero gradients, and this rank takes part in the collectives of its backward pass.
    if (taken.empty() && !stacked.requires_grad()) return;
    // One operation per tensor: the backward pass of a select per image would allocate the whole tensor per image.
    const bool all = static_cast<int64_t>(taken.size()) == stacked.size(0);
    const auto images =
        all ? stacked : stacked.index_select(0, megatron_cpp::internal::index_tensors({taken}, stacked.device())[0]);
    const auto rows = images.reshape({images.size(0) * images.size(1), images.size(2)});
    pieces_.push_back(megatron_cpp::internal::to_device(rows, request_.options.device())
                          .to(c10::typeMetaToScalarType(request_.options.dtype())));
  }

  const InsertPlan& plan_;
  const FeatureRequest& request_;
  const std::vector<int64_t>& holders_;
  int64_t next_image_ = 0;
  int64_t width_ = -1;
  std::vector<at::Tensor> pieces_;
};

/// Sends [n_r, C] on each holder to [n, C/t] on every rank: all rows, in the order of holders, with its channels.
at::Tensor channels_of_all(const at::Tensor& rows, const std::vector<int64_t>& rows_of_rank,
                           const parallel::GroupPtr& tp) {
  const int64_t t = tp->getSize();
  const int64_t width = rows.size(1) / t;
  const auto by_rank = rows.reshape({rows.size(0), t, width}).transpose(0, 1).reshape({t * rows.size(0), width});
  return parallel::differentiable_all_to_all(by_rank, rows_of_rank,
                                             std::vector<int64_t>(static_cast<size_t>(t), rows.size(0)), tp);
}

/// Sends the rows of each holder to every rank (in the row sharding, its channels of them), and updates first_row.
void bring_to_all(LocalFeatures& features, const FeatureRequest& request) {
  std::vector<int64_t> rank_begin(features.rows_of_rank.size());  // index of each holder's first row among all
  if (request.sharding == ProjectorSharding::kColumn) {
    const auto most = *std::max_element(features.rows_of_rank.begin(), features.rows_of_rank.end());
    const auto padded = at::constant_pad_nd(features.rows, {0, 0, 0, most - features.rows.size(0)});
    features.rows = parallel::gather_from_sequence_parallel_region(padded, request.tp);
    for (size_t rank = 0; rank < rank_begin.size(); ++rank) rank_begin[rank] = static_cast<int64_t>(rank) * most;
  } else {
    features.rows = channels_of_all(features.rows, features.rows_of_rank, request.tp);
    std::exclusive_scan(features.rows_of_rank.begin(), features.rows_of_rank.end(), rank_begin.begin(), int64_t{0});
  }
  for (size_t image = 0; image < features.first_row.size(); ++image) {
    features.first_row[image] += rank_begin[static_cast<size_t>(features.image_holders[image])];
  }
  features.image_holders.clear();
  features.rows_of_rank.clear();
  features.were_gathered = true;
}

/// The embedding rows that images overwrite, in the order of the plan's runs.
std::vector<InsertedRow> inserted_rows(const LocalFeatures& features, const InsertPlan& plan) {
  std::vector<InsertedRow> rows;
  rows.reserve(plan.embedding_rows().size());
  for (const auto& run : plan.runs()) {
    const auto image = static_cast<size_t>(run.image);
    const int64_t first = run.feature_row - plan.image_begins()[image] + features.first_row[image];
    const int64_t holder = features.image_holders.empty() ? kEveryRank : features.image_holders[image];
    for (int64_t i = 0; i < run.length; ++i) {
      rows.push_back({(run.position + i) * plan.B() + run.batch, first + i, holder});
    }
  }
  return rows;
}

/// Makes the owner of each inserted row its holder, and keeps only the feature rows for rows that this rank owns.
void keep_owned(LocalFeatures& features, const InsertPlan& plan, const FeatureRequest& request) {
  const auto& tp = request.tp;
  features.rows_of_rank.assign(static_cast<size_t>(tp->getSize()), 0);
  std::vector<int64_t> own;
  for (auto& inserted : features.inserted) {
    inserted.holder = request.layout.place_of(inserted.row / plan.B()).rank;
    if (inserted.holder == tp->getRank()) own.push_back(inserted.projected_row);
    inserted.projected_row = features.rows_of_rank[static_cast<size_t>(inserted.holder)]++;
  }
  // Features from a user may have any strides.
  const auto rows = megatron_cpp::internal::as_rows(features.rows);
  features.rows =
      megatron_cpp::internal::gather_rows(rows, megatron_cpp::internal::index_tensors({own}, rows.device())[0]);
}

}  // namespace

LocalFeatures take_features(const std::vector<ImageForInsert>& images, const InsertPlan& plan,
                            const FeatureRequest& request) {
  int64_t num_images = 0;
  for (const auto& group : images) num_images += static_cast<int64_t>(rows_of(group).size());
  TORCH_CHECK_VALUE(num_images == plan.num_images(), num_images, " images for a plan of ", plan.num_images());
  const bool on_single_ranks =
      std::any_of(images.begin(), images.end(), [](const ImageForInsert& group) { return group.held.has_value(); });
  const bool takes_own_images = projected_part(request.sharding) == Part::kWhole && !request.by_owners;

  LocalFeatures features;
  if (takes_own_images || on_single_ranks) {
    features.image_holders = holders_of(images, plan, request.tp->getSize());
    features.rows_of_rank.assign(static_cast<size_t>(request.tp->getSize()), 0);
    for (size_t image = 0; image < features.image_holders.size(); ++image) {
      auto& held = features.rows_of_rank[static_cast<size_t>(features.image_holders[image])];
      features.first_row.push_back(held);
      held += plan.image_rows()[image];
    }
  } else {
    features.first_row.assign(plan.image_begins().begin(), plan.image_begins().end() - 1);
  }
  RowCollector collector(plan, request, features.image_holders);
  for (const auto& group : images) collector.add(group);
  features.rows = collector.rows();
  return features;
}

void bring_features(LocalFeatures& features, const InsertPlan& plan, const FeatureRequest& request) {
  if (projected_part(request.sharding) != Part::kWhole) {
    const bool has_all_channels = features.rows.size(1) == request.channels;
    if (!features.image_holders.empty()) {
      bring_to_all(features, request);
    } else if (request.sharding == ProjectorSharding::kRow && has_all_channels) {
      features.rows = parallel::scatter_to_tensor_model_parallel_region(features.rows, request.tp);
    }
  }
  features.inserted = inserted_rows(features, plan);
  if (request.by_owners) keep_owned(features, plan, request);
}

bool need_gradient(const std::vector<ImageForInsert>& images) {
  for (const auto& group : images) {
    for (const auto& tensor : feature_tensors(group)) {
      if (tensor.requires_grad()) return true;
    }
  }
  return false;
}

}  // namespace megatron_cpp::step37::internal
