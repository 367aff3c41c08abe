#include "step37/image_insert_embedding.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "megatron_cpp/tensor_parallel/linear_function.h"
#include "megatron_cpp/tensor_parallel/rows.h"
#include "parallel/agree.h"
#include "parallel/hash.h"
#include "parallel/mappings.h"
#include "parallel/shard.h"
#include "step37/fused_exchange.h"
#include "step37/local_features.h"

namespace step37 {
namespace {

using internal::LocalFeatures;
using internal::ProjectedRows;
using internal::ProjectorInput;
using megatron::PartialLayout;

/// For messages of checked mode: equal values have equal hashes.
int64_t hash_of(std::span<const int64_t> values) {
  return static_cast<int64_t>(parallel::stable_hash(std::as_bytes(values)));
}

int64_t hash_of(const at::Tensor& values) {
  if (!values.defined()) return 0;
  const auto contiguous = values.to(at::kLong).contiguous();
  return hash_of({contiguous.const_data_ptr<int64_t>(), static_cast<size_t>(contiguous.numel())});
}

bool any_needs_gradient(const std::vector<at::Tensor>& tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& tensor) { return tensor.requires_grad(); });
}

ProjectorInput input_of(ProjectorSharding sharding) {
  switch (sharding) {
    case ProjectorSharding::kColumn:
      return ProjectorInput::kAllRows;
    case ProjectorSharding::kRow:
      return ProjectorInput::kChannelsOfAll;
    case ProjectorSharding::kReplicated:
      return ProjectorInput::kOwnImages;
  }
  TORCH_INTERNAL_ASSERT(false);
}

ProjectedRows output_of(ProjectorSharding sharding) {
  switch (sharding) {
    case ProjectorSharding::kColumn:
      return ProjectedRows::kColumns;
    case ProjectorSharding::kRow:
      return ProjectedRows::kSummands;
    case ProjectorSharding::kReplicated:
      return ProjectedRows::kWhole;
  }
  TORCH_INTERNAL_ASSERT(false);
}

/// Feature rows renumbered to where they are in what was projected.
std::vector<InsertRun> renumbered(std::vector<InsertRun> runs, const std::vector<int64_t>& first_row,
                                  const InsertPlan& plan) {
  for (auto& run : runs) {
    const auto image = static_cast<size_t>(run.image);
    run.feature_row += first_row[image] - plan.image_begins()[image];
  }
  return runs;
}

}  // namespace

ImageInsertEmbeddingImpl::ImageInsertEmbeddingImpl(const megatron::LanguageModelEmbedding& language_embedding,
                                                   ImageInsertEmbeddingOptions options)
    : options_(std::move(options)), language_embedding_(language_embedding.ptr()) {
  const int64_t C = options_.encoder_output_dim();
  const int64_t H = options_.hidden_size();
  const auto sharding = options_.projector_sharding();
  const auto& tp = language_embedding_->tp();
  TORCH_CHECK_VALUE(H == language_embedding_->hidden_size(), "hidden_size ", H, " is not the language embedding's ",
                    language_embedding_->hidden_size());
  if (language_embedding_->layout() == PartialLayout::kColumns) {
    TORCH_CHECK_VALUE(sharding != ProjectorSharding::kRow,
                      "a hidden-parallel embedding takes a column-sharded or a replicated projector: the summands of a "
                      "row-sharded one would need a sum of their own");
    TORCH_CHECK_VALUE(options_.exchange() == InsertExchange::kFused,
                      "a hidden-parallel embedding goes with the fused exchange only");
  }
  const double init_std = std::sqrt(2.0 / static_cast<double>(C));  // Kaiming normal, fan_in, gain sqrt(2)
  switch (sharding) {
    case ProjectorSharding::kColumn:
      parallel::even_shard_size(H, tp->getSize(), "hidden size");
      column_projector_ = megatron::ColumnParallelLinear(megatron::ColumnParallelLinearOptions(C, H)
                                                             .bias(options_.projector_bias())
                                                             .init_std(init_std)
                                                             .accumulate_into_grad(options_.accumulate_into_grad()),
                                                         tp);
      align_projector = register_module("align_projector", column_projector_);
      break;
    case ProjectorSharding::kRow:
      parallel::even_shard_size(C, tp->getSize(), "encoder_output_dim");
      row_projector_ = megatron::RowParallelLinear(megatron::RowParallelLinearOptions(C, H)
                                                       .bias(options_.projector_bias())
                                                       .reduce_output(false)
                                                       .init_std(init_std)
                                                       .accumulate_into_grad(options_.accumulate_into_grad()),
                                                   tp);
      align_projector = register_module("align_projector", row_projector_);
      break;
    case ProjectorSharding::kReplicated:
      replicated_projector_ = torch::nn::Linear(torch::nn::LinearOptions(C, H).bias(options_.projector_bias()));
      align_projector = register_module("align_projector", replicated_projector_);
      break;
  }
}

ImageInsertEmbeddingImpl::ImageInsertEmbeddingImpl(const megatron::LanguageModelEmbedding& language_embedding,
                                                   int64_t encoder_output_dim, int64_t hidden_size, bool projector_bias)
    : ImageInsertEmbeddingImpl(
          language_embedding,
          ImageInsertEmbeddingOptions(encoder_output_dim, hidden_size).projector_bias(projector_bias)) {}

std::vector<at::Tensor> ImageInsertEmbeddingImpl::normalize_feature_list(const FeatureList& features) {
  return feature_blocks(features);
}

ImageInsertEmbeddingImpl::Projector ImageInsertEmbeddingImpl::projector() const {
  if (column_projector_) return {column_projector_->weight, column_projector_->bias};
  if (row_projector_) return {row_projector_->weight, row_projector_->bias};
  return {replicated_projector_->weight, replicated_projector_->bias};
}

InsertPlan ImageInsertEmbeddingImpl::make_plan(const at::Tensor& input_ids,
                                               const std::vector<ImageForInsert>& images) const {
  TORCH_CHECK_VALUE(input_ids.dim() == 2 && input_ids.scalar_type() == at::kLong,
                    "input_ids must be [B, S] int64, got ", input_ids.sizes(), " ", input_ids.scalar_type());
  std::vector<InsertGroup> groups;
  groups.reserve(images.size());
  for (const auto& group : images) groups.push_back({group.insert_start_token, internal::rows_of(group)});
  const auto ids = input_ids.cpu().contiguous();
  return InsertPlan::build({ids.const_data_ptr<int64_t>(), static_cast<size_t>(ids.numel())}, ids.size(0), ids.size(1),
                           groups, options_.on_mismatch());
}

at::Tensor ImageInsertEmbeddingImpl::forward(const at::Tensor& input_ids, const std::vector<ImageForInsert>& images,
                                             const at::Tensor& position_ids) {
  if (!options_.checked()) {
    if (images.empty()) return language_embedding_->forward(input_ids, position_ids);
    return insert(input_ids, images, make_plan(input_ids, images), position_ids);
  }
  InsertPlan plan;
  parallel::agree_on([&] { plan = make_plan(input_ids, images); }, language_embedding_->tp());
  return insert(input_ids, images, plan, position_ids);
}

at::Tensor ImageInsertEmbeddingImpl::forward(const at::Tensor& input_ids, const std::vector<ImageForInsert>& images,
                                             const InsertPlan& plan, const at::Tensor& position_ids) {
  return insert(input_ids, images, plan, position_ids);
}

at::Tensor ImageInsertEmbeddingImpl::insert(const at::Tensor& input_ids, const std::vector<ImageForInsert>& images,
                                            const InsertPlan& plan, const at::Tensor& position_ids) {
  const auto& tp = language_embedding_->tp();
  const auto weight = projector().weight;
  internal::FeatureRequest request{input_of(options_.projector_sharding()), options_.encoder_output_dim(),
                                   at::TensorOptions(weight.device()).dtype(weight.scalar_type()), tp};
  bool by_owners = false;
  LocalFeatures features;
  const auto take = [&] {
    by_owners = owners_project(images);
    if (by_owners) request.input = ProjectorInput::kAllRows;
    TORCH_CHECK_VALUE(input_ids.dim() == 2 && input_ids.size(0) == plan.B() && input_ids.size(1) == plan.S(),
                      "input_ids ", input_ids.sizes(), " do not fit a plan for [", plan.B(), ", ", plan.S(), "]");
    if (language_embedding_->sequence_parallel()) {
      parallel::even_shard_size(plan.S(), tp->getSize(), "sequence length");
    }
    features = internal::take_features(images, plan, request);
  };
  if (options_.checked()) {
    parallel::agree_on(take, tp);
    check_agreement(input_ids, images, plan, features);
  } else {
    take();
  }
  if (images.empty()) return language_embedding_->forward(input_ids, position_ids);
  if (tp->getRank() == 0) {
    for (const auto& warning : plan.warnings()) TORCH_WARN(warning);
  }
  const auto project_all = [&] {
    internal::complete_features(features, request);
    return project(features.rows, features.gathered);
  };
  if (options_.exchange() == InsertExchange::kAllGather) {
    // The text first: it refuses ids before anything is sent.
    const auto text = language_embedding_->forward(input_ids, position_ids);
    return all_gathered(text, project_all(), features, plan);
  }
  const auto overwritten = row_indices(plan.runs(), plan.B()).embedding_rows;
  const auto partial =
      language_embedding_->partial(input_ids, at::tensor(at::ArrayRef<int64_t>(overwritten), at::kLong));
  const auto embeddings = by_owners ? projected_by_owners(partial, features, plan)
                                    : fused(input_ids, partial, project_all(), features, plan);
  return language_embedding_->finish(embeddings, position_ids);
}

void ImageInsertEmbeddingImpl::check_agreement(const at::Tensor& input_ids, const std::vector<ImageForInsert>& images,
                                               const InsertPlan& plan, const LocalFeatures& features) const {
  const auto& words = language_embedding_->word_embeddings->weight;
  std::vector<int64_t> tokens;
  std::vector<int64_t> rows;
  std::vector<int64_t> holders;
  for (const auto& group : images) {
    tokens.push_back(group.insert_start_token);
    for (const int64_t image_rows : internal::rows_of(group)) rows.push_back(image_rows);
    holders.push_back(group.rows.defined() ? 1 : 0);
    holders.push_back(hash_of(group.holders));
  }
  std::vector<int64_t> runs;  // a plan made ahead may be of other ids
  for (const auto& run : plan.runs()) {
    runs.insert(runs.end(), {run.image, run.feature_row, run.batch, run.position, run.length});
  }
  const auto& [weight, bias] = projector();
  // What is compared is what decides which collectives run and with which sizes, and which rows end where.
  parallel::check_equal({{"batch size", input_ids.size(0)},
                         {"sequence length", input_ids.size(1)},
                         {"the hash of input_ids", hash_of(input_ids.cpu())},
                         {"the number of image groups", static_cast<int64_t>(images.size())},
                         {"the hash of start tokens", hash_of(tokens)},
                         {"the hash of the images' row numbers", hash_of(rows)},
                         {"the hash of the images' holders", hash_of(holders)},
                         {"the dtype of the word embedding", static_cast<int64_t>(words.scalar_type())},
                         {"the hash of the plan", hash_of(runs)},
                         {"the width of image features", features.rows.front().size(-1)},
                         {"the dtype of align_projector", static_cast<int64_t>(weight.scalar_type())},
                         {"hidden_size", options_.hidden_size()},
                         {"encoder_output_dim", options_.encoder_output_dim()},
                         {"the projector's sharding", static_cast<int64_t>(options_.projector_sharding())},
                         {"the projector's bias", options_.projector_bias() ? 1 : 0},
                         {"the embedding's layout", static_cast<int64_t>(language_embedding_->layout())},
                         {"the exchange", static_cast<int64_t>(options_.exchange())},
                         {"sequence_parallel", language_embedding_->sequence_parallel() ? 1 : 0},
                         {"gradient mode", at::GradMode::is_enabled() ? 1 : 0},
                         {"whether the word embedding is trained", words.requires_grad() ? 1 : 0},
                         {"whether align_projector is trained", weight.requires_grad() ? 1 : 0},
                         {"whether align_projector's bias is trained", bias.defined() && bias.requires_grad() ? 1 : 0},
                         {"whether features are trained", any_needs_gradient(features.rows) ? 1 : 0}},
                        language_embedding_->tp());
}

bool ImageInsertEmbeddingImpl::owners_project(const std::vector<ImageForInsert>& images) const {
  // Every rank needs the whole projector and all features, and each must have gradients of its own rows only.
  if (options_.projector_sharding() != ProjectorSharding::kReplicated ||
      options_.exchange() != InsertExchange::kFused || !language_embedding_->sequence_parallel() ||
      language_embedding_->tp()->getSize() == 1 || !at::GradMode::is_enabled()) {
    return false;
  }
  const auto& [weight, bias] = projector();
  const bool projector_trains = weight.requires_grad() || (bias.defined() && bias.requires_grad());
  if (!projector_trains || language_embedding_->word_embeddings->weight.requires_grad()) return false;
  return std::none_of(images.begin(), images.end(), [](const ImageForInsert& group) {
    return group.rows.defined() || internal::need_gradient(group);
  });
}

at::Tensor ImageInsertEmbeddingImpl::project(const std::vector<at::Tensor>& features, bool gathered) const {
  if (row_projector_) {
    // forward is not const in LibTorch's modules, and holders share their module.
    auto projector = row_projector_;
    return projector->summand_of_rows(features);
  }
  // Every rank's columns give a part of the gradient of the features that all have; what was gathered sums it itself.
  const auto input = column_projector_ && !gathered ? megatron::internal::LinearInput::kReplicated
                                                    : megatron::internal::LinearInput::kOwn;
  const auto& [weight, bias] = projector();
  return megatron::internal::linear_of_rows(features, weight, bias, input, options_.accumulate_into_grad(),
                                            language_embedding_->tp());
}

at::Tensor ImageInsertEmbeddingImpl::fused(const at::Tensor& input_ids, const at::Tensor& partial,
                                           const at::Tensor& projected, const LocalFeatures& features,
                                           const InsertPlan& plan) const {
  const bool only_text_trains = partial.requires_grad() && !projected.requires_grad();
  return internal::fused_exchange(
      partial, projected.to(partial.scalar_type()), plan,
      {.tp = language_embedding_->tp(),
       .sequence_parallel = language_embedding_->sequence_parallel(),
       .hidden_size = options_.hidden_size(),
       .partial = language_embedding_->layout(),
       .projected = output_of(options_.projector_sharding()),
       .first_projected_row = features.first_row,
       .maker = features.holder,
       .finders = only_text_trains && input_ids.is_cpu() ? language_embedding_->word_embeddings->finders(input_ids)
                                                         : std::vector<int64_t>{}});
}

std::vector<InsertRun> ImageInsertEmbeddingImpl::own_runs(const InsertPlan& plan) const {
  if (!language_embedding_->sequence_parallel()) return plan.runs();
  const auto& tp = language_embedding_->tp();
  const auto own = parallel::even_shard(plan.S(), tp->getSize(), tp->getRank(), "sequence length");
  auto runs = plan.owned_by(own.begin, own.end);
  for (auto& run : runs) run.position -= own.begin;
  return runs;
}

at::Tensor ImageInsertEmbeddingImpl::projected_by_owners(const at::Tensor& partial, const LocalFeatures& features,
                                                         const InsertPlan& plan) const {
  const auto text = language_embedding_->reduce(partial);
  const auto own = row_indices(own_runs(plan), plan.B());
  const auto indices = megatron::internal::index_tensors({own.embedding_rows, own.feature_rows}, text.device());
  // What a user gives may have any strides.
  const auto rows =
      megatron::internal::as_rows(features.rows.size() == 1 ? features.rows.front() : at::cat(features.rows));
  const auto projected = project({megatron::internal::gather_rows(rows, indices[1])}, /*gathered=*/false);
  return internal::insert_rows(text, projected.to(text.scalar_type()), indices[0], {});
}

at::Tensor ImageInsertEmbeddingImpl::gather_projected(const at::Tensor& projected,
                                                      const LocalFeatures& features) const {
  const auto& tp = language_embedding_->tp();
  const bool partial_use = language_embedding_->sequence_parallel();  // each rank inserts into its own rows
  switch (options_.projector_sharding()) {
    case ProjectorSharding::kColumn:
      return partial_use ? parallel::all_gather_last_dim_from_tensor_parallel_region(projected, tp)
                         : parallel::gather_from_tensor_model_parallel_region(projected, tp);
    case ProjectorSharding::kRow:
      return partial_use ? parallel::reduce_from_tensor_model_parallel_region_to_partial_use(projected, tp)
                         : parallel::reduce_from_tensor_model_parallel_region(projected, tp);
    case ProjectorSharding::kReplicated: {
      const auto most = *std::max_element(features.held_rows.begin(), features.held_rows.end());
      const auto padded = at::constant_pad_nd(projected, {0, 0, 0, most - projected.size(0)});
      return partial_use ? parallel::gather_from_sequence_parallel_region(padded, tp)
                         : parallel::gather_from_sequence_parallel_region_to_replicated_use(padded, tp);
    }
  }
  TORCH_INTERNAL_ASSERT(false);
}

at::Tensor ImageInsertEmbeddingImpl::all_gathered(const at::Tensor& text, const at::Tensor& projected,
                                                  const LocalFeatures& features, const InsertPlan& plan) const {
  const auto gathered = gather_projected(projected, features).to(text.scalar_type());
  auto runs = renumbered(own_runs(plan), features.first_row, plan);
  if (!features.holder.empty()) {
    const auto most = *std::max_element(features.held_rows.begin(), features.held_rows.end());
    for (auto& run : runs) run.feature_row += features.holder[static_cast<size_t>(run.image)] * most;
  }
  const auto own = row_indices(runs, plan.B());
  const auto indices = megatron::internal::index_tensors({own.embedding_rows, own.feature_rows}, text.device());
  // Without rows of its own a rank still goes this way: the gather's backward needs every rank.
  return internal::insert_rows(text, gathered, indices[0], indices[1]);
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
  const auto rows =
      megatron::internal::index_tensors({indices.embedding_rows, indices.feature_rows}, input_embeddings.device());
  const auto features = at::cat(blocks).to(input_embeddings.device(), input_embeddings.scalar_type());
  return input_embeddings.reshape({-1, input_embeddings.size(-1)})
      .index_copy(0, rows[0], features.index_select(0, rows[1]))
      .view(input_embeddings.sizes());
}

std::vector<megatron::ParameterShard> ImageInsertEmbeddingImpl::own_parameters() const {
  if (!replicated_projector_) return {};  // the parallel layers speak for themselves
  const auto domain = language_embedding_->tp()->getSize() > 1 ? megatron::GradientDomain::kReplicatedPartial
                                                               : megatron::GradientDomain::kReplicated;
  const double std = std::sqrt(2.0 / static_cast<double>(options_.encoder_output_dim()));
  std::vector<megatron::ParameterShard> parameters{megatron::replicated_parameter(
      "align_projector.weight", replicated_projector_->weight, domain, megatron::InitialValue::normal(std), true)};
  if (options_.projector_bias()) {
    parameters.push_back(megatron::replicated_parameter("align_projector.bias", replicated_projector_->bias, domain,
                                                        megatron::InitialValue::constant(0.0), false));
  }
  return parameters;
}

}  // namespace step37
