#include "step37/local_features.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <numeric>

#include "megatron_cpp/tensor_parallel/rows.h"
#include "megatron_cpp/tensor_parallel/to_device.h"
#include "parallel/mappings.h"
#include "parallel/shard.h"

namespace step37::internal {
namespace {

/// Images of a group by tensor: an entry of a feature list holds one image [L, C] or several [N, L, C].
std::vector<at::Tensor> list_entries(const ImageForInsert& group) {
  TORCH_CHECK_VALUE(group.image_features.has_value(), "the group of start token ", group.insert_start_token,
                    " has no image_features: the vision tower has to run first");
  return feature_tensors(*group.image_features);
}

std::vector<int64_t> to_vector(const at::Tensor& values, const char* what, int64_t token) {
  TORCH_CHECK_VALUE(values.dim() == 1 && values.scalar_type() == at::kLong && values.is_cpu(), what, " of start token ",
                    token, " must be [N] int64 on the CPU, got ", values.sizes(), " ", values.scalar_type());
  const auto contiguous = values.contiguous();
  const auto* data = contiguous.const_data_ptr<int64_t>();
  return {data, data + contiguous.numel()};
}

/// Who holds which image: as the groups say, else balanced by rows.
std::vector<int64_t> holders_of(const std::vector<ImageForInsert>& images, const InsertPlan& plan, int t) {
  const auto balanced = parallel::balanced_assignment(plan.image_rows(), t);
  std::vector<int64_t> holder(balanced.begin(), balanced.end());
  auto next = holder.begin();
  for (const auto& group : images) {
    const int64_t token = group.insert_start_token;
    const auto num_images = static_cast<int64_t>(rows_of(group).size());
    if (group.holders.defined()) {
      const auto given = to_vector(group.holders, "holders", token);
      TORCH_CHECK_VALUE(static_cast<int64_t>(given.size()) == num_images, given.size(), " holders for ", num_images,
                        " images of start token ", token);
      for (const int64_t rank : given) {
        TORCH_CHECK_VALUE(rank >= 0 && rank < t, "holder ", rank, " of an image of start token ", token,
                          " is no rank of a group of ", t);
      }
      std::copy(given.begin(), given.end(), next);
    }
    next += num_images;
  }
  return holder;
}

/// Walks through the groups' tensors, checks them, and collects the rows of the images that this rank takes.
class RowCollector {
 public:
  RowCollector(const InsertPlan& plan, const FeatureRequest& request, const std::vector<int64_t>& holder)
      : plan_(plan), request_(request), holder_(holder) {}

  void add(const ImageForInsert& group) {
    const auto num_images = static_cast<int64_t>(rows_of(group).size());
    std::vector<int64_t> given;  // the images that the group's tensors hold, in order
    for (const int64_t end = next_image_ + num_images; next_image_ < end; ++next_image_) {
      if (!group.rows.defined() || takes(next_image_)) given.push_back(next_image_);
    }
    const int64_t token = group.insert_start_token;
    size_t position = 0;
    for (const auto& entry : list_entries(group)) {
      check_width(entry, token);
      const auto stacked = entry.dim() == 2 ? entry.unsqueeze(0) : entry;
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

  /// Large tensors as they are: putting them together would copy every row. Small ones together, since each product
  /// reads the whole weight.
  std::vector<at::Tensor> rows() const {
    constexpr int64_t kLargeRows = 256;
    std::vector<at::Tensor> result;
    std::vector<at::Tensor> small;
    const auto put_together = [&] {
      if (!small.empty()) result.push_back(small.size() == 1 ? small.front() : at::cat(small));
      small.clear();
    };
    for (const auto& piece : pieces_) {
      const auto rows = megatron::internal::to_device(piece, request_.options.device())
                            .to(c10::typeMetaToScalarType(request_.options.dtype()));
      if (rows.size(0) < kLargeRows) {
        small.push_back(rows);
        continue;
      }
      put_together();
      result.push_back(rows);
    }
    put_together();
    if (result.empty()) result.push_back(at::empty({0, width_ < 0 ? request_.channels : width_}, request_.options));
    return result;
  }

 private:
  bool takes(int64_t image) const {
    return holder_.empty() || holder_[static_cast<size_t>(image)] == request_.tp->getRank();
  }
  /// All C channels, or where channels are split and every rank has all images, this rank's C/t.
  void check_width(const at::Tensor& entry, int64_t token) {
    const int64_t width = entry.size(-1);
    const bool sliced = request_.input == ProjectorInput::kChannelsOfAll && holder_.empty() &&
                        width * request_.tp->getSize() == request_.channels;
    TORCH_CHECK_VALUE(width == request_.channels || sliced, "image features of start token ", token, " have width ",
                      width, ", align_projector takes ", request_.channels);
    TORCH_CHECK_VALUE(width_ < 0 || width_ == width, "image features of start token ", token, " have width ", width,
                      ", others ", width_, ": either all are sliced by channel or none");
    width_ = width;
  }
  void add_images(const at::Tensor& stacked, const std::vector<int64_t>& taken) {
    // Where this rank takes none of the images, an empty piece keeps what made the tensor (the tower) in the graph:
    // it gets zero gradients, and the rank takes part in the backward pass of those that hold some.
    if (taken.empty() && !stacked.requires_grad()) return;
    // One operation a tensor: a select per image would make each image's gradient a tensor as large as the group's.
    const bool all = static_cast<int64_t>(taken.size()) == stacked.size(0);
    const auto images =
        all ? stacked : stacked.index_select(0, megatron::internal::index_tensors({taken}, stacked.device())[0]);
    pieces_.push_back(images.reshape({images.size(0) * images.size(1), images.size(2)}));
  }

  const InsertPlan& plan_;
  const FeatureRequest& request_;
  const std::vector<int64_t>& holder_;
  int64_t next_image_ = 0;
  int64_t width_ = -1;
  std::vector<at::Tensor> pieces_;
};

/// [n_r, C] of each rank -> [n, C/t]: rows by holder, this rank's channels.
at::Tensor channels_of_all(const at::Tensor& rows, const std::vector<int64_t>& held_rows,
                           const parallel::GroupPtr& tp) {
  const int64_t t = tp->getSize();
  const int64_t width = rows.size(1) / t;
  const auto by_rank = rows.reshape({rows.size(0), t, width}).transpose(0, 1).reshape({t * rows.size(0), width});
  return parallel::differentiable_all_to_all(by_rank, held_rows,
                                             std::vector<int64_t>(static_cast<size_t>(t), rows.size(0)), tp);
}

at::Tensor in_one(const std::vector<at::Tensor>& rows) { return rows.size() == 1 ? rows.front() : at::cat(rows); }

/// Brings rows that single ranks hold to where the projector needs them, and renumbers the images' rows accordingly.
void bring_to_all(LocalFeatures& features, const FeatureRequest& request) {
  const auto most = *std::max_element(features.held_rows.begin(), features.held_rows.end());
  std::vector<int64_t> rank_begin;  // of each rank's rows among all
  const auto own = in_one(features.rows);
  if (request.input == ProjectorInput::kAllRows) {
    const auto padded = at::constant_pad_nd(own, {0, 0, 0, most - own.size(0)});
    features.rows = {parallel::gather_from_sequence_parallel_region(padded, request.tp)};
    for (int64_t rank = 0; rank < request.tp->getSize(); ++rank) rank_begin.push_back(rank * most);
  } else {
    features.rows = {channels_of_all(own, features.held_rows, request.tp)};
    rank_begin.resize(features.held_rows.size());
    std::exclusive_scan(features.held_rows.begin(), features.held_rows.end(), rank_begin.begin(), int64_t{0});
  }
  for (size_t image = 0; image < features.first_row.size(); ++image) {
    features.first_row[image] += rank_begin[static_cast<size_t>(features.holder[image])];
  }
  features.holder.clear();
  features.held_rows.clear();
  features.gathered = true;
}

}  // namespace

std::vector<int64_t> rows_of(const ImageForInsert& group) {
  if (group.rows.defined()) return to_vector(group.rows, "rows", group.insert_start_token);
  std::vector<int64_t> rows;
  for (const auto& entry : list_entries(group)) {
    const int64_t num_images = entry.dim() == 2 ? 1 : entry.size(0);
    rows.insert(rows.end(), static_cast<size_t>(num_images), entry.size(-2));
  }
  return rows;
}

bool need_gradient(const ImageForInsert& group) {
  const auto entries = list_entries(group);
  return std::any_of(entries.begin(), entries.end(), [](const at::Tensor& entry) { return entry.requires_grad(); });
}

LocalFeatures take_features(const std::vector<ImageForInsert>& images, const InsertPlan& plan,
                            const FeatureRequest& request) {
  int64_t num_images = 0;
  for (const auto& group : images) num_images += static_cast<int64_t>(rows_of(group).size());
  TORCH_CHECK_VALUE(num_images == plan.num_images(), num_images, " images for a plan of ", plan.num_images());
  const bool on_single_ranks =
      std::any_of(images.begin(), images.end(), [](const ImageForInsert& group) { return group.rows.defined(); });
  const bool own_images = request.input == ProjectorInput::kOwnImages;

  LocalFeatures features;
  if (own_images || on_single_ranks) {
    features.holder = holders_of(images, plan, request.tp->getSize());
    features.held_rows.assign(static_cast<size_t>(request.tp->getSize()), 0);
    for (size_t image = 0; image < features.holder.size(); ++image) {
      auto& held = features.held_rows[static_cast<size_t>(features.holder[image])];
      features.first_row.push_back(held);
      held += plan.image_rows()[image];
    }
  } else {
    features.first_row.assign(plan.image_begins().begin(), plan.image_begins().end() - 1);
  }
  RowCollector collector(plan, request, features.holder);
  for (const auto& group : images) collector.add(group);
  features.rows = collector.rows();
  return features;
}

void complete_features(LocalFeatures& features, const FeatureRequest& request) {
  if (request.input == ProjectorInput::kOwnImages) return;
  if (!features.holder.empty()) {
    bring_to_all(features, request);
  } else if (request.input == ProjectorInput::kChannelsOfAll && features.rows.front().size(1) == request.channels) {
    features.rows = {parallel::scatter_to_tensor_model_parallel_region(in_one(features.rows), request.tp)};
  }
}

}  // namespace step37::internal
