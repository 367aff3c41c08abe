#include "step37/step37_model.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <utility>

#include "megatron_cpp/data/packed_batch.h"
#include "megatron_cpp/tensor_parallel/rows.h"
#include "megatron_cpp/tensor_parallel/to_device.h"
#include "megatron_cpp/transformer/multi_token_prediction.h"
#include "parallel/mappings.h"
#include "parallel/named_range.h"
#include "parallel/shard.h"

namespace megatron_cpp::step37 {
namespace {

void freeze(torch::nn::Module& module) {
  for (auto& parameter : module.parameters()) parameter.set_requires_grad(false);
}

VisionTower make_tower(const Step37Config& config, const parallel::GroupPtr& tp) {
  if (config.mm_encoder_tp_mode == MmEncoderTpMode::kWeights) {
    return VisionTower(config.vision, tp, config.recompute_tower);
  }
  // Each rank runs the tower only on the pictures that it holds.
  return VisionTower(config.vision,
                     tp->getSize() > 1 ? GradientDomain::kReplicatedPartial : GradientDomain::kReplicated,
                     config.recompute_tower);
}

/// Whether the tower has yet to run on pictures that every rank was given.
bool is_to_be_shared_out(const ImageForInsert& group) {
  return group.images.defined() && !group.held && !group.image_features.has_value();
}

}  // namespace

void Step37Config::validate(int tensor_parallel_size) const {
  text.validate(tensor_parallel_size);
  vision.validate();
  if (mm_encoder_tp_mode == MmEncoderTpMode::kWeights) vision.validate_split(tensor_parallel_size);
  if (projector_sharding == ProjectorSharding::kRow) {
    parallel::even_shard_size(vision.output_dim(), tensor_parallel_size, "the vision tower's output width");
  }
  TORCH_CHECK_VALUE(execution.embedding_sharding == EmbeddingSharding::kVocab ||
                        (projector_sharding != ProjectorSharding::kRow && exchange == InsertExchange::kFused),
                    "a hidden-parallel embedding goes with a column-sharded or a replicated projector and the fused "
                    "exchange");
  TORCH_CHECK_VALUE(mtp_loss_scaling_factor >= 0.0, "mtp_loss_scaling_factor ", mtp_loss_scaling_factor,
                    " is negative");
  TORCH_CHECK_VALUE(!trains_mtp() || !text.mtp_layers.empty(), "mtp_loss_scaling_factor ", mtp_loss_scaling_factor,
                    ": the model has no layers of multi-token prediction to train");
  TORCH_CHECK_VALUE(!trains_mtp() || !freeze_language_model, "mtp_loss_scaling_factor ", mtp_loss_scaling_factor,
                    " trains layers that freeze_language_model freezes: set one of the two");
}

std::vector<std::string> Step37Config::auxiliary_losses() const {
  auto names = text.moe ? router_loss_names(*text.moe) : std::vector<std::string>{};
  if (trains_mtp()) names.emplace_back("mtp_loss");
  return names;
}

Step37ModelImpl::Step37ModelImpl(const Step37Config& config, const ModelGroups& groups)
    : config_(config), tp_(groups.tp) {
  config_.validate(tp_->getSize());
  // Registered in the order in which the forward pass uses them: GradientBuffer reduces and gathers in this order.
  vision_model = register_module("vision_model", make_tower(config_, tp_));
  language_model = GPTModel(config_.text, config_.execution, groups);
  image_insert_embedding = register_module(
      "image_insert_embedding",
      ImageInsertEmbedding(language_model->embedding,
                           ImageInsertEmbeddingOptions(config_.vision.output_dim(), config_.text.hidden_size)
                               .projector_bias(config_.projector_bias)
                               .projector_sharding(config_.projector_sharding)
                               .exchange(config_.exchange)
                               .checked(config_.checked)
                               .accumulate_into_grad(config_.execution.accumulate_into_grad)));
  register_module("language_model", language_model);
  if (config_.freeze_vision_model) freeze(*vision_model);
  if (config_.freeze_projector) freeze(*image_insert_embedding);
  if (config_.freeze_language_model) freeze(*language_model);
  // With a gradient of 0 weight decay would still change them.
  if (language_model->mtp && !config_.trains_mtp()) freeze(*language_model->mtp);
}

void Step37ModelImpl::keep_own_pictures(std::vector<ImageForInsert>& images) const {
  if (tp_->getSize() == 1 || config_.mm_encoder_tp_mode == MmEncoderTpMode::kWeights) return;
  std::vector<int64_t> costs;  // patches of each picture that every rank was given
  for (const auto& group : images) {
    if (!is_to_be_shared_out(group)) continue;
    const int64_t patch = config_.vision.patch_size;
    const int64_t patches = (group.images.size(2) / patch) * (group.images.size(3) / patch);
    costs.insert(costs.end(), static_cast<size_t>(group.images.size(0)), patches);
  }
  const auto holders = parallel::balanced_assignment(costs, tp_->getSize());
  auto next = holders.begin();
  for (auto& group : images) {
    if (!is_to_be_shared_out(group)) continue;
    const int64_t num_images = group.images.size(0);
    std::vector<int64_t> group_holders(next, next + num_images);
    next += num_images;
    std::vector<int64_t> own;
    for (int64_t image = 0; image < num_images; ++image) {
      if (group_holders[static_cast<size_t>(image)] == tp_->getRank()) own.push_back(image);
    }
    const int64_t num_rows = config_.vision.feature_rows(group.images.size(2), group.images.size(3));
    group.held = HeldImages{at::full({num_images}, num_rows, at::kLong),
                            at::tensor(at::ArrayRef<int64_t>(group_holders), at::kLong)};
    group.images = group.images.index_select(0, megatron_cpp::internal::index_tensors({own}, group.images.device())[0]);
  }
}

void Step37ModelImpl::run_tower(std::vector<ImageForInsert>& images) {
  const bool is_split = config_.mm_encoder_tp_mode == MmEncoderTpMode::kWeights;
  const auto is_held = [](const ImageForInsert& group) { return group.held.has_value(); };
  // The insert then leaves the gradient of each image's features on one rank; the split tower takes it on all.
  const bool gradients_are_on_holders =
      projected_part(config_.projector_sharding) == Part::kWhole || std::any_of(images.begin(), images.end(), is_held);
  for (auto& group : images) {
    if (group.image_features.has_value()) continue;
    TORCH_CHECK_VALUE(group.images.defined(), "the group of start token ", group.insert_start_token,
                      " has neither images nor image_features");
    TORCH_CHECK_VALUE(
        !is_split || !is_held(group), "the group of start token ", group.insert_start_token,
        " has each picture on one rank (held): with mm_encoder_tp_mode weights every rank needs them all");
    auto features = parallel::in_range("vision tower", [&] { return vision_model->forward(group.images); });
    if (is_split && gradients_are_on_holders) {
      features = parallel::copy_to_tensor_model_parallel_region(features, tp_);
    }
    group.image_features = features;
  }
}

at::Tensor Step37ModelImpl::embed(const Step37Batch& batch) {
  auto images = batch.images;
  keep_own_pictures(images);
  run_tower(images);
  const auto& position_ids = batch.attention.position_ids;
  return batch.plan ? image_insert_embedding->forward(batch.input_ids, images, *batch.plan, position_ids)
                    : image_insert_embedding->forward(batch.input_ids, images, position_ids);
}

at::Tensor Step37ModelImpl::forward(const Step37Batch& batch) {
  return language_model->forward(batch.input_ids, batch.attention, embed(batch));
}

void Step37ModelImpl::add_router_losses(const Step37Batch& batch, const RouterStatistics& statistics,
                                        LossSum& sum) const {
  const auto num_loss_tokens = batch.labels.ne(kIgnoreIndex).sum().to(sum.tokens.scalar_type());
  for (const auto& loss : statistics.losses(*config_.text.moe, tp_)) {
    sum.auxiliary.push_back(loss.to(sum.tokens.scalar_type()) * num_loss_tokens);
  }
}

LossSum Step37ModelImpl::loss_sum(const Step37Batch& batch, ExpertBalance* expert_balance, double loss_gradient) {
  const bool trains = c10::GradMode::is_enabled();
  const bool counts = trains && config_.text.moe;
  const bool adds_mtp = trains && config_.trains_mtp();
  const auto decoder_input = embed(batch);
  const auto& mask = batch.padding_mask;
  RouterStatistics statistics(counts && mask.defined() ? megatron_cpp::internal::to_device(mask, decoder_input.device())
                                                       : at::Tensor());
  at::Tensor mtp_input;
  // The output layer's input has no name: without multi-token prediction it is freed before the backward pass.
  LossSum sum =
      output_loss_sum(language_model->output_layer,
                      language_model->hidden_states(batch.input_ids, batch.attention, decoder_input,
                                                    counts ? &statistics : nullptr, adds_mtp ? &mtp_input : nullptr),
                      batch.labels.t(), output_loss_options(config_.text, config_.execution), tp_, loss_gradient);
  if (counts) add_router_losses(batch, statistics, sum);
  if (counts && expert_balance != nullptr) expert_balance->add(statistics);
  if (adds_mtp) {
    auto& mtp = *language_model->mtp;
    const double scale = config_.mtp_loss_scaling_factor / static_cast<double>(mtp.layers.size());
    const auto mtp_sum = mtp.loss_sum(mtp_input, decoder_input, batch.attention, batch.labels, loss_gradient * scale);
    sum.auxiliary.push_back(mtp_sum * scale);
  }
  return sum;
}

}  // namespace megatron_cpp::step37
