#include "step37/insert/image_insert_embedding.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "parallel/agree.h"
#include "parallel/named_range.h"
#include "step37/insert/agreement.h"
#include "step37/insert/delivery.h"
#include "step37/insert/features.h"

namespace megatron_cpp::step37 {

ImageInsertEmbeddingImpl::ImageInsertEmbeddingImpl(const LanguageModelEmbedding& language_embedding,
                                                   ImageInsertEmbeddingOptions options)
    : options_(std::move(options)), words_(language_embedding.ptr()) {
  TORCH_CHECK_VALUE(options_.hidden_size() == words_->hidden_size(), "hidden_size ", options_.hidden_size(),
                    " is not the language embedding's ", words_->hidden_size());
  internal::choose_delivery(options_.exchange(), words_->layout(), projected_part(options_.projector_sharding()));
  align_projector = register_module("align_projector", AlignProjector::make(options_, words_->tp()));
}

ImageInsertEmbeddingImpl::ImageInsertEmbeddingImpl(const LanguageModelEmbedding& language_embedding,
                                                   int64_t encoder_output_dim, int64_t hidden_size, bool projector_bias)
    : ImageInsertEmbeddingImpl(
          language_embedding,
          ImageInsertEmbeddingOptions(encoder_output_dim, hidden_size).projector_bias(projector_bias)) {}

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
  if (images.empty() && !options_.checked()) return words_->forward(input_ids, position_ids);
  InsertPlan plan;
  const auto make = [&] {
    const parallel::NamedRange range("image insert: plan");
    plan = make_plan(input_ids, images);
  };
  options_.checked() ? parallel::agree_on(make, words_->tp()) : make();
  return forward(input_ids, images, plan, position_ids);
}

at::Tensor ImageInsertEmbeddingImpl::forward(const at::Tensor& input_ids, const std::vector<ImageForInsert>& images,
                                             const InsertPlan& plan, const at::Tensor& position_ids) {
  const auto& tp = words_->tp();
  const auto& weight = align_projector->weight.defined() ? align_projector->weight : words_->word_embeddings->weight;
  std::optional<internal::FeatureRequest> request;
  internal::LocalFeatures features;
  const auto take = [&] {
    TORCH_CHECK_VALUE(input_ids.dim() == 2 && input_ids.size(0) == plan.B() && input_ids.size(1) == plan.S(),
                      "input_ids ", input_ids.sizes(), " do not fit a plan for [", plan.B(), ", ", plan.S(), "]");
    request.emplace(internal::FeatureRequest{.sharding = options_.projector_sharding(),
                                             .channels = options_.encoder_output_dim(),
                                             .by_owners = owners_project(images),
                                             .layout = words_->word_embeddings->sequence_layout(plan.S()),
                                             .options = weight.options().requires_grad(false),
                                             .tp = tp});
    features = internal::take_features(images, plan, *request);
  };
  options_.checked() ? parallel::agree_on(take, tp) : take();
  if (options_.checked()) {
    internal::check_agreement(input_ids, images, plan, features, *words_, *align_projector, options_);
  }
  if (images.empty()) return words_->forward(input_ids, position_ids);
  if (tp->getRank() == 0) {
    for (const auto& warning : plan.warnings()) TORCH_WARN(warning);
  }

  // Before bring_features: partial() refuses ids outside the vocabulary before anything is sent.
  const auto text = words_->partial(input_ids, at::tensor(at::ArrayRef<int64_t>(plan.embedding_rows()), at::kLong));
  internal::bring_features(features, plan, *request);
  align_projector->use_parameters();
  const auto projected = parallel::in_range("image insert: projection", [&] {
    return align_projector->forward(features.rows, features.were_gathered).to(text.scalar_type());
  });

  const auto part = projected_part(options_.projector_sharding());
  const auto deliver = request->by_owners ? internal::deliver_in_place
                                          : internal::choose_delivery(options_.exchange(), words_->layout(), part);
  const internal::DeliverySetting setting{words_->word_embeddings, input_ids, part, features};
  const auto delivered =
      parallel::in_range("image insert: exchange", [&] { return deliver(text, projected, setting); });
  return words_->finish(delivered, position_ids);
}

bool ImageInsertEmbeddingImpl::owners_project(const std::vector<ImageForInsert>& images) const {
  // Needs the whole projector on every rank, and saves something only if each rank has gradients of its own rows only.
  const bool can = options_.projector_sharding() == ProjectorSharding::kReplicated &&
                   options_.exchange() == InsertExchange::kFused && words_->sequence_parallel() &&
                   words_->tp()->getSize() > 1 && at::GradMode::is_enabled();
  const auto& bias = align_projector->bias;
  const bool only_projector_trains =
      can && (align_projector->weight.requires_grad() || (bias.defined() && bias.requires_grad())) &&
      !words_->word_embeddings->weight.requires_grad();
  const auto is_held = [](const ImageForInsert& group) { return group.held.has_value(); };
  return only_projector_trains && std::none_of(images.begin(), images.end(), is_held) &&
         !internal::need_gradient(images);
}

}  // namespace megatron_cpp::step37
