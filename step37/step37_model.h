// Step3.7: vision tower, image-insert embedding, decoder and loss.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <optional>
#include <string>
#include <vector>

#include "megatron_cpp/training/expert_balance.h"
#include "megatron_cpp/training/trainer.h"
#include "megatron_cpp/transformer/execution.h"
#include "megatron_cpp/transformer/gpt_model.h"
#include "megatron_cpp/transformer/transformer_config.h"
#include "parallel/group.h"
#include "step37/insert/image_for_insert.h"
#include "step37/insert/image_insert_embedding.h"
#include "step37/vision/vision_tower.h"

/// Step3.7: vision tower, image insert, and the whole model with the decoder of megatron_cpp/.
namespace megatron_cpp::step37 {

/// Sizes of the parts, sharding of the insert, and which parts are frozen.
struct Step37Config {
  TransformerConfig text;          ///< the decoder and its embedding
  TransformerExecution execution;  ///< how they run
  VisionConfig vision;             ///< the tower; its output_dim() is the projector's C
  bool projector_bias = false;     ///< whether the projector has a bias [H]
  ProjectorSharding projector_sharding = ProjectorSharding::kReplicated;  ///< features are where the tower ran
  InsertExchange exchange = InsertExchange::kFused;                       ///< see InsertExchange
  /// How the ranks share the tower's work. With kWeights every rank has all features: the natural partner is a
  /// column-sharded projector.
  MmEncoderTpMode mm_encoder_tp_mode = MmEncoderTpMode::kData;
  bool recompute_tower = false;  ///< each block of the tower keeps its input alone; for the decoder see `execution`
  /// See ImageInsertEmbeddingOptions::checked.
  bool checked = checked_by_default();
  /// Parts that are not trained.
  bool freeze_vision_model = false;
  bool freeze_projector = false;       ///< align_projector
  bool freeze_language_model = false;  ///< embedding, decoder and output layer
  /// Weight of multi-token prediction's mean loss over its layers, as in Megatron-Core; 0: they are not trained.
  double mtp_loss_scaling_factor = 0.0;

  /// Whether there are layers of multi-token prediction that are trained.
  bool trains_mtp() const { return mtp_loss_scaling_factor > 0.0; }
  /// Names of what Step37Model::loss_sum adds to the token losses, for TrainerOptions: router_loss_names, and
  /// "mtp_loss" if that is trained.
  std::vector<std::string> auxiliary_losses() const;

  /// @throws c10::ValueError naming what doesn't fit, as the validate() of each part does.
  void validate(int tensor_parallel_size) const;
};

/// One micro-batch. Equal on every rank of the tensor-parallel group, except that with MmEncoderTpMode::kData a rank
/// may have only the pictures of `images` that it holds (ImageForInsert::held).
struct Step37Batch {
  at::Tensor input_ids;                ///< [B, S] int64 on the CPU
  at::Tensor labels;                   ///< [B, S] int64: the token to predict at each position, -100 for no loss
  AttentionInput attention;            ///< positions and sub-sequences of the whole sequence
  std::vector<ImageForInsert> images;  ///< patches before images
  /// Which rows the images' features overwrite; made from the groups' start tokens unless given.
  std::optional<InsertPlan> plan = std::nullopt;
  /// [B, S], not 0 where there is padding instead of a token, which counts in no statistic of the routing; undefined:
  /// there is none.
  at::Tensor padding_mask = {};
};

/// The vision tower turns pictures into features, which are inserted into the decoder's input.
class Step37ModelImpl : public torch::nn::Module {
 public:
  /// Parameters have no values yet: load them, or call initialize_parameters. Not collective.
  Step37ModelImpl(const Step37Config& config, const ModelGroups& groups);

  /// @return  logits [S, B, V'/t], this rank's columns of the padded vocabulary.
  /// With MmEncoderTpMode::kData each picture goes through the tower on one rank; the number of pictures may differ
  /// between ranks and may be 0. With kWeights each goes through the tower on all ranks together.
  /// Collective over tp, and with experts over ep and etp. Throws c10::ValueError as the parts do.
  at::Tensor forward(const Step37Batch& batch);

  /// The decoder's input: [S, B, H], with sequence_parallel [S/t, B, H], this rank's rows.
  /// Collective over tp. Throws c10::ValueError as the tower and the insert do, and with MmEncoderTpMode::kWeights for
  /// a group whose pictures are `held`.
  at::Tensor embed(const Step37Batch& batch);

  /// The sum of the token losses of the batch, a float32 scalar, equal on every rank, and while gradients are on
  /// Step37Config::auxiliary_losses. Divide by the number of loss tokens of the global batch.
  ///  - Those of the routers (RouterStatistics::losses) are means over the batch's tokens, times the number of its loss
  ///    tokens.
  ///  - mtp_loss is mtp_loss_scaling_factor / n times the token losses of all n layers of multi-token prediction
  ///    (MultiTokenPredictionBlock::loss_sum; its embeddings are embed()'s, with the pictures). Layer k has a few
  ///    targets less than the decoder; dividing by the decoder's number of loss tokens gives each target the same
  ///    weight however a batch is split.
  /// @param expert_balance  null, or where the routing of this batch is counted, while gradients are on.
  /// @param loss_gradient   what the gradient of each of these losses will be, 1 over that number: read with
  ///                        TransformerExecution::loss_chunk and while gradients are on, see linear_cross_entropy.
  /// Collective over tp, and with experts over ep and etp.
  LossSum loss_sum(const Step37Batch& batch, ExpertBalance* expert_balance = nullptr, double loss_gradient = 1.0);

  /// As given to the constructor.
  const Step37Config& config() const { return config_; }

  VisionTower vision_model{nullptr};                     ///< see Step37Config::mm_encoder_tp_mode
  GPTModel language_model{nullptr};                      ///< takes the result of the insert as decoder_input; its mtp
                                                         ///< is frozen unless Step37Config::trains_mtp
  ImageInsertEmbedding image_insert_embedding{nullptr};  ///< uses language_model->embedding

 private:
  /// Splits the pictures that every rank was given over the ranks, balanced by number of patches, and keeps those of
  /// this rank. Groups that are `held` or have features are left alone.
  void keep_own_pictures(std::vector<ImageForInsert>& images) const;
  /// Fills in image_features where the tower has yet to run.
  void run_tower(std::vector<ImageForInsert>& images);
  /// Appends the losses of router_loss_names to sum.auxiliary.
  void add_router_losses(const Step37Batch& batch, const RouterStatistics& statistics, LossSum& sum) const;

  Step37Config config_;
  parallel::GroupPtr tp_;
};
TORCH_MODULE(Step37Model);

}  // namespace megatron_cpp::step37
