#include "step37/image_insert_embedding.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>

#include "megatron_cpp/tensor_parallel/linear_function.h"
#include "parallel/mappings.h"
#include "parallel/shard.h"

namespace step37 {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor to_tensor(const std::vector<int64_t>& values) {
  return at::from_blob(const_cast<int64_t*>(values.data()), {static_cast<int64_t>(values.size())}, at::kLong).clone();
}

/// Rows `feature_rows` of `projected` [n, W] into rows `rows`, columns [column_begin, column_begin + W), of `partial`
/// [S, B, H], which is changed in place.
struct InsertRows : torch::autograd::Function<InsertRows> {
  static at::Tensor forward(AutogradContext* context, at::Tensor partial, const at::Tensor& projected,
                            const at::Tensor& rows, const at::Tensor& feature_rows, int64_t column_begin) {
    context->save_for_backward({rows, feature_rows});
    context->saved_data["column_begin"] = column_begin;
    context->saved_data["projected_shape"] = projected.sizes().vec();
    context->mark_dirty({partial});
    partial.view({-1, partial.size(-1)})
        .narrow(1, column_begin, projected.size(1))
        .index_copy_(0, rows, projected.index_select(0, feature_rows));
    return partial;
  }
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), "double backward through the image insert");
    const auto saved = context->get_saved_variables();
    const auto& gradient = gradients[0];
    at::Tensor projected_gradient;
    if (context->needs_input_grad(1)) {
      const auto shape = context->saved_data["projected_shape"].toIntVector();
      const auto own_columns = gradient.reshape({-1, gradient.size(-1)})
                                   .narrow(1, context->saved_data["column_begin"].toInt(), shape[1])
                                   .index_select(0, saved[0]);
      // Rows that were cut or overwritten get zero.
      projected_gradient = at::zeros(shape, own_columns.options()).index_copy_(0, saved[1], own_columns);
    }
    // The look-up behind `partial` ignores the gradient of rows it left out, and these are they.
    return {gradient, projected_gradient, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

/// Images of a group by tensor: an entry of a feature list holds one image [L, C] or several [N, L, C].
std::vector<at::Tensor> list_entries(const FeatureList& features) {
  if (const auto* tensor = std::get_if<at::Tensor>(&features)) return {*tensor};
  return std::get<std::vector<at::Tensor>>(features);
}

void check_feature_rank(const at::Tensor& entry) {
  TORCH_CHECK_VALUE(entry.defined() && (entry.dim() == 2 || entry.dim() == 3),
                    "image features must be [L, C] or [N, L, C], got ",
                    entry.defined() ? c10::str(entry.sizes()) : "an undefined tensor");
}

const FeatureList& features_of(const ImageForInsert& group) {
  TORCH_CHECK_VALUE(group.image_features.has_value(), "the group of start token ", group.insert_start_token,
                    " has no image_features: the vision tower has to run first");
  return *group.image_features;
}

std::vector<int64_t> to_vector(const at::Tensor& values, const char* what, int64_t token) {
  TORCH_CHECK_VALUE(values.dim() == 1 && values.scalar_type() == at::kLong && values.is_cpu(), what, " of start token ",
                    token, " must be [N] int64 on the CPU, got ", values.sizes(), " ", values.scalar_type());
  const auto contiguous = values.contiguous();
  const auto* data = contiguous.const_data_ptr<int64_t>();
  return {data, data + contiguous.numel()};
}

std::vector<int64_t> rows_of(const ImageForInsert& group) {
  if (group.rows.defined()) return to_vector(group.rows, "rows", group.insert_start_token);
  std::vector<int64_t> rows;
  // From the sizes alone: feature_blocks would make a view of every image.
  for (const auto& entry : list_entries(features_of(group))) {
    check_feature_rank(entry);
    const int64_t num_images = entry.dim() == 2 ? 1 : entry.size(0);
    rows.insert(rows.end(), static_cast<size_t>(num_images), entry.size(-2));
  }
  return rows;
}

}  // namespace

/// This rank's feature rows, and where the rows of every image are.
struct ImageInsertEmbeddingImpl::LocalFeatures {
  at::Tensor rows;                   ///< [n_r, C], the projector's dtype and device
  std::vector<int64_t> holder;       ///< of each image; empty if every rank has all
  std::vector<int64_t> local_begin;  ///< first row of each image among its holder's
  int64_t most_rows = 0;             ///< of a rank

  /// Decides who holds which image: as the groups say, else balanced by rows.
  void assign(const std::vector<ImageForInsert>& images, const InsertPlan& plan, int t);

  bool has(int64_t image, int64_t rank) const { return holder.empty() || holder[static_cast<size_t>(image)] == rank; }

  /// Of the images that rank `rank` holds: where their rows are, and their numbers among its own.
  RowIndices indices_held_by(int64_t rank, const std::vector<InsertRun>& runs, const InsertPlan& plan) const {
    std::vector<InsertRun> own;
    for (auto run : runs) {
      const auto image = static_cast<size_t>(run.image);
      if (holder[image] != rank) continue;
      run.feature_row += local_begin[image] - plan.image_begins()[image];
      own.push_back(run);
    }
    return row_indices(own, plan.B());
  }
};

ImageInsertEmbeddingImpl::ImageInsertEmbeddingImpl(megatron::LanguageModelEmbedding language_embedding,
                                                   ImageInsertEmbeddingOptions options)
    : options_(std::move(options)), language_embedding_(language_embedding.ptr()) {
  const int64_t C = options_.encoder_output_dim();
  const int64_t H = options_.hidden_size();
  TORCH_CHECK_VALUE(H == language_embedding_->hidden_size(), "hidden_size ", H, " is not the language embedding's ",
                    language_embedding_->hidden_size());
  if (options_.projector_sharding() == ProjectorSharding::kColumn) {
    parallel::even_shard_size(H, language_embedding_->tp()->getSize(), "hidden size");
    // Kaiming normal, fan_in, gain sqrt(2): std = sqrt(2 / C).
    column_projector_ = megatron::ColumnParallelLinear(megatron::ColumnParallelLinearOptions(C, H)
                                                           .bias(options_.projector_bias())
                                                           .init_std(std::sqrt(2.0 / static_cast<double>(C)))
                                                           .accumulate_into_grad(options_.accumulate_into_grad()),
                                                       language_embedding_->tp());
    align_projector = register_module("align_projector", column_projector_);
  } else {
    replicated_projector_ = torch::nn::Linear(torch::nn::LinearOptions(C, H).bias(options_.projector_bias()));
    align_projector = register_module("align_projector", replicated_projector_);
  }
}

ImageInsertEmbeddingImpl::ImageInsertEmbeddingImpl(megatron::LanguageModelEmbedding language_embedding,
                                                   int64_t encoder_output_dim, int64_t hidden_size, bool projector_bias)
    : ImageInsertEmbeddingImpl(
          std::move(language_embedding),
          ImageInsertEmbeddingOptions(encoder_output_dim, hidden_size).projector_bias(projector_bias)) {}

std::vector<at::Tensor> ImageInsertEmbeddingImpl::normalize_feature_list(const FeatureList& features) {
  return feature_blocks(features);
}

at::Tensor ImageInsertEmbeddingImpl::projector_weight() const {
  return column_projector_ ? column_projector_->weight : replicated_projector_->weight;
}

InsertPlan ImageInsertEmbeddingImpl::make_plan(const at::Tensor& input_ids,
                                               const std::vector<ImageForInsert>& images) const {
  TORCH_CHECK_VALUE(input_ids.dim() == 2 && input_ids.scalar_type() == at::kLong,
                    "input_ids must be [B, S] int64, got ", input_ids.sizes(), " ", input_ids.scalar_type());
  std::vector<InsertGroup> groups;
  groups.reserve(images.size());
  for (const auto& group : images) groups.push_back({group.insert_start_token, rows_of(group)});
  const auto ids = input_ids.cpu().contiguous();
  return InsertPlan::build({ids.const_data_ptr<int64_t>(), static_cast<size_t>(ids.numel())}, ids.size(0), ids.size(1),
                           groups, options_.on_mismatch());
}

void ImageInsertEmbeddingImpl::LocalFeatures::assign(const std::vector<ImageForInsert>& images, const InsertPlan& plan,
                                                     int t) {
  const auto balanced = parallel::balanced_assignment(plan.image_rows(), t);
  holder.assign(balanced.begin(), balanced.end());
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
  std::vector<int64_t> rows_per_rank(static_cast<size_t>(t), 0);
  for (size_t image = 0; image < holder.size(); ++image) {
    auto& rank_rows = rows_per_rank[static_cast<size_t>(holder[image])];
    local_begin.push_back(rank_rows);
    rank_rows += plan.image_rows()[image];
  }
  most_rows = *std::max_element(rows_per_rank.begin(), rows_per_rank.end());
}

void ImageInsertEmbeddingImpl::append_own_features(const ImageForInsert& group, const std::vector<int64_t>& given,
                                                   const InsertPlan& plan, const LocalFeatures& local,
                                                   std::vector<at::Tensor>& pieces) const {
  const int64_t token = group.insert_start_token;
  size_t next = 0;
  for (const auto& entry : list_entries(features_of(group))) {
    check_feature_rank(entry);
    TORCH_CHECK_VALUE(entry.size(-1) == options_.encoder_output_dim(), "image features of start token ", token,
                      " have width ", entry.size(-1), ", align_projector takes ", options_.encoder_output_dim());
    const auto stacked = entry.dim() == 2 ? entry.unsqueeze(0) : entry;
    std::vector<int64_t> own;  // entries of `stacked` that this rank projects
    for (int64_t i = 0; i < stacked.size(0); ++i, ++next) {
      TORCH_CHECK_VALUE(next < given.size(), "more images than the ", given.size(), " of start token ", token,
                        " that this rank holds");
      const auto image = static_cast<size_t>(given[next]);
      TORCH_CHECK_VALUE(stacked.size(1) == plan.image_rows()[image], "image ", image, " has ", stacked.size(1),
                        " feature rows, the plan says ", plan.image_rows()[image]);
      if (local.has(given[next], language_embedding_->tp()->getRank())) own.push_back(i);
    }
    // Where this rank holds none of the images, an empty piece keeps what made the tensor (the tower) in the graph:
    // it gets zero gradients, and the rank takes part in the backward pass of those that hold some.
    if (own.empty() && !entry.requires_grad()) continue;
    // One operation a tensor: a select per image would make each image's gradient a tensor as large as the group's.
    const bool all = static_cast<int64_t>(own.size()) == stacked.size(0);
    const auto taken = all ? stacked : stacked.index_select(0, to_tensor(own).to(stacked.device()));
    pieces.push_back(taken.reshape({-1, taken.size(-1)}));
  }
  TORCH_CHECK_VALUE(next == given.size(), next, " images of start token ", token, " where this rank holds ",
                    given.size());
}

ImageInsertEmbeddingImpl::LocalFeatures ImageInsertEmbeddingImpl::local_features(
    const std::vector<ImageForInsert>& images, const InsertPlan& plan) const {
  const auto& tp = language_embedding_->tp();
  const bool replicated = options_.projector_sharding() == ProjectorSharding::kReplicated;
  int64_t num_images = 0;
  for (const auto& group : images) {
    num_images += static_cast<int64_t>(rows_of(group).size());
    TORCH_CHECK_VALUE(replicated || !group.rows.defined(), "the group of start token ", group.insert_start_token,
                      " holds this rank's images only (rows is given): a column-sharded projector needs all of them on "
                      "every rank");
  }
  TORCH_CHECK_VALUE(num_images == plan.num_images(), num_images, " images for a plan of ", plan.num_images());

  LocalFeatures local;
  if (replicated) local.assign(images, plan, tp->getSize());
  std::vector<at::Tensor> pieces;
  int64_t image = 0;  // over all groups
  for (const auto& group : images) {
    const int64_t group_end = image + static_cast<int64_t>(rows_of(group).size());
    std::vector<int64_t> given;  // the images that the group's tensors hold, in order
    for (; image < group_end; ++image) {
      if (!group.rows.defined() || local.has(image, tp->getRank())) given.push_back(image);
    }
    append_own_features(group, given, plan, local, pieces);
  }
  const auto weight = projector_weight();
  local.rows = pieces.empty()
                   ? at::empty({0, options_.encoder_output_dim()}, weight.options().requires_grad(false))
                   : (pieces.size() == 1 ? pieces.front() : at::cat(pieces)).to(weight.device(), weight.scalar_type());
  return local;
}

at::Tensor ImageInsertEmbeddingImpl::project(const at::Tensor& features) const {
  if (column_projector_) {
    // forward is not const in LibTorch's modules, and holders share their module.
    auto projector = column_projector_;
    return projector->forward(features);
  }
  return megatron::internal::linear_with_communication(
      features, replicated_projector_->weight, replicated_projector_->bias, megatron::internal::LinearInput::kOwn,
      options_.accumulate_into_grad(), language_embedding_->tp());
}

at::Tensor ImageInsertEmbeddingImpl::forward(const at::Tensor& input_ids, const std::vector<ImageForInsert>& images,
                                             const at::Tensor& position_ids) {
  if (images.empty()) return language_embedding_->forward(input_ids, position_ids);
  return forward(input_ids, images, make_plan(input_ids, images), position_ids);
}

at::Tensor ImageInsertEmbeddingImpl::forward(const at::Tensor& input_ids, const std::vector<ImageForInsert>& images,
                                             const InsertPlan& plan, const at::Tensor& position_ids) {
  TORCH_CHECK_VALUE(input_ids.dim() == 2 && input_ids.size(0) == plan.B() && input_ids.size(1) == plan.S(),
                    "input_ids ", input_ids.sizes(), " do not fit a plan for [", plan.B(), ", ", plan.S(), "]");
  if (language_embedding_->sequence_parallel()) {
    parallel::even_shard_size(plan.S(), language_embedding_->tp()->getSize(), "sequence length");
  }
  if (language_embedding_->tp()->getRank() == 0) {
    for (const auto& warning : plan.warnings()) TORCH_WARN(warning);
  }
  const auto local = local_features(images, plan);
  if (options_.exchange() == InsertExchange::kAllGather) return all_gathered(input_ids, local, plan, position_ids);
  return language_embedding_->finish(fused(input_ids, local, plan), position_ids);
}

at::Tensor ImageInsertEmbeddingImpl::fused(const at::Tensor& input_ids, const LocalFeatures& local,
                                           const InsertPlan& plan) {
  const auto& tp = language_embedding_->tp();
  const auto all = row_indices(plan.runs(), plan.B());
  const auto partial = language_embedding_->partial(input_ids, to_tensor(all.embedding_rows));
  const bool column = options_.projector_sharding() == ProjectorSharding::kColumn;
  const auto own = column ? all : local.indices_held_by(tp->getRank(), plan.runs(), plan);
  const auto projected = project(local.rows).to(partial.scalar_type());
  const int64_t column_begin = column ? projected.size(1) * tp->getRank() : 0;
  const auto device = partial.device();
  const auto written =
      InsertRows::apply(partial, projected, to_tensor(own.embedding_rows).to(device, /*non_blocking=*/true),
                        to_tensor(own.feature_rows).to(device, /*non_blocking=*/true), column_begin);
  return language_embedding_->reduce(written);
}

at::Tensor ImageInsertEmbeddingImpl::gather_projected(const at::Tensor& projected, const LocalFeatures& local) const {
  const auto& tp = language_embedding_->tp();
  const bool partial_use = language_embedding_->sequence_parallel();  // each rank inserts into its own rows
  if (column_projector_) {
    return partial_use ? parallel::all_gather_last_dim_from_tensor_parallel_region(projected, tp)
                       : parallel::gather_from_tensor_model_parallel_region(projected, tp);
  }
  const auto padded = at::constant_pad_nd(projected, {0, 0, 0, local.most_rows - projected.size(0)});
  return partial_use ? parallel::gather_from_sequence_parallel_region(padded, tp)
                     : parallel::gather_from_sequence_parallel_region_to_replicated_use(padded, tp);
}

at::Tensor ImageInsertEmbeddingImpl::all_gathered(const at::Tensor& input_ids, const LocalFeatures& local,
                                                  const InsertPlan& plan, const at::Tensor& position_ids) {
  const auto& tp = language_embedding_->tp();
  const auto text = language_embedding_->forward(input_ids, position_ids);
  const auto gathered = gather_projected(project(local.rows), local).to(text.scalar_type());
  parallel::Range own_rows{0, plan.S()};
  if (language_embedding_->sequence_parallel()) {
    own_rows = parallel::even_shard(plan.S(), tp->getSize(), tp->getRank(), "sequence length");
  }
  auto runs = plan.owned_by(own_rows.begin, own_rows.end);
  for (auto& run : runs) {
    run.position -= own_rows.begin;
    if (column_projector_) continue;
    // Row `local_begin` of the holder's block of `most_rows` rows.
    const auto image = static_cast<size_t>(run.image);
    run.feature_row += local.holder[image] * local.most_rows + local.local_begin[image] - plan.image_begins()[image];
  }
  const auto indices = row_indices(runs, plan.B());
  const auto device = text.device();
  // Without rows of its own a rank still goes this way: the gather's backward needs every rank.
  return text.view({-1, text.size(-1)})
      .index_copy(0, to_tensor(indices.embedding_rows).to(device),
                  gathered.index_select(0, to_tensor(indices.feature_rows).to(device)))
      .view(text.sizes());
}

at::Tensor ImageInsertEmbeddingImpl::insert_features(const at::Tensor& input_embeddings,
                                                     const FeatureList& image_features, const at::Tensor& input_ids,
                                                     int64_t flag) {
  TORCH_CHECK_VALUE(input_embeddings.dim() == 3 && input_ids.dim() == 2 && input_ids.scalar_type() == at::kLong &&
                        input_embeddings.size(0) == input_ids.size(1) && input_embeddings.size(1) == input_ids.size(0),
                    "insert_features: embeddings ", input_embeddings.sizes(), " are not the [S, B, H] of input_ids ",
                    input_ids.sizes());
  InsertGroup group{flag, {}};
  const auto blocks = feature_blocks(image_features);
  for (const auto& block : blocks) group.rows.push_back(block.size(0));
  const auto ids = input_ids.cpu().contiguous();
  const auto plan = InsertPlan::build({ids.const_data_ptr<int64_t>(), static_cast<size_t>(ids.numel())}, ids.size(0),
                                      ids.size(1), {&group, 1}, MismatchPolicy::kTruncate);
  for (const auto& warning : plan.warnings()) TORCH_WARN(warning);
  if (plan.runs().empty()) return input_embeddings;
  const auto indices = row_indices(plan.runs(), plan.B());
  const auto device = input_embeddings.device();
  const auto features = at::cat(blocks).to(input_embeddings.device(), input_embeddings.scalar_type());
  return input_embeddings.reshape({-1, input_embeddings.size(-1)})
      .index_copy(0, to_tensor(indices.embedding_rows).to(device),
                  features.index_select(0, to_tensor(indices.feature_rows).to(device)))
      .view(input_embeddings.sizes());
}

std::vector<megatron::ParameterShard> ImageInsertEmbeddingImpl::own_parameters() const {
  if (column_projector_) return {};  // speaks for itself
  const auto rule = language_embedding_->tp()->getSize() > 1 ? megatron::GradientRule::kReplicatedPartial
                                                             : megatron::GradientRule::kReplicated;
  const double std = std::sqrt(2.0 / static_cast<double>(options_.encoder_output_dim()));
  std::vector<megatron::ParameterShard> parameters{megatron::replicated_parameter(
      "align_projector.weight", replicated_projector_->weight, rule, megatron::InitialValue::normal(std), true)};
  if (options_.projector_bias()) {
    parameters.push_back(megatron::replicated_parameter("align_projector.bias", replicated_projector_->bias, rule,
                                                        megatron::InitialValue::constant(0.0), false));
  }
  return parameters;
}

}  // namespace step37
