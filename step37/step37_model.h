// Step3.7: vision tower, image-insert embedding, decoder and loss.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <vector>

#include "megatron_cpp/transformer/execution.h"
#include "megatron_cpp/transformer/gpt_model.h"
#include "megatron_cpp/transformer/transformer_config.h"
#include "parallel/group.h"
#include "step37/insert/image_for_insert.h"
#include "step37/insert/image_insert_embedding.h"
#include "step37/vision/vision_tower.h"

/// Step3.7: vision tower, image insert and the model they make with the decoder of megatron_cpp/.
namespace megatron_cpp::step37 {

/// Sizes of the parts, how the insert is laid out, and what is trained.
struct Step37Config {
  TransformerConfig text;          ///< the decoder and its embedding
  TransformerExecution execution;  ///< how they run
  VisionConfig vision;             ///< the tower; its output_dim() is the projector's C
  bool projector_bias = false;     ///< whether projected rows get one, [H]
  ProjectorSharding projector_sharding = ProjectorSharding::kReplicated;  ///< features are where the tower ran
  InsertExchange exchange = InsertExchange::kFused;                       ///< see InsertExchange
  /// See ImageInsertEmbeddingOptions::checked.
  bool checked = checked_by_default();
  /// Parts that are not trained.
  bool freeze_vision_model = false;
  bool freeze_projector = false;       ///< align_projector
  bool freeze_language_model = false;  ///< embedding, decoder and output layer

  /// @throws c10::ValueError naming what doesn't fit, as the parts' own validate() do.
  void validate(int tensor_parallel_size) const;
};

/// One micro-batch. Equal on every rank of the tensor-parallel group, but for the pictures of `images`, of which a rank
/// may have its own only (ImageForInsert::held).
struct Step37Batch {
  at::Tensor input_ids;                ///< [B, S] int64 on the CPU
  at::Tensor labels;                   ///< [B, S] int64: the token each position predicts, -100 where no loss counts
  AttentionInput attention;            ///< positions and sub-sequences of the whole sequence
  std::vector<ImageForInsert> images;  ///< patches before images
};

/// Pictures through the tower, their features into the word embedding, that through the decoder.
class Step37ModelImpl : public torch::nn::Module {
 public:
  /// Parameters have no values yet: load them, or call initialize_parameters. Not collective.
  Step37ModelImpl(const Step37Config& config, const ModelGroups& groups);

  /// @return  logits [S, B, V'/t], this rank's columns of the padded vocabulary.
  /// The tower runs on whole pictures, spread over the ranks: on those this rank has, whose number may differ between
  /// ranks, none included. The projector takes their features wherever they are.
  /// Collective over tp. Throws c10::ValueError as the parts do.
  at::Tensor forward(const Step37Batch& batch);

  /// The sum of the token losses of the batch, a float32 scalar, equal on every rank. Divide by the number of loss
  /// tokens of the global batch. Collective over tp.
  at::Tensor loss_sum(const Step37Batch& batch);

  /// As given to the constructor.
  const Step37Config& config() const { return config_; }

  VisionTower vision_model{nullptr};                     ///< on every rank, each running it on its own pictures
  GPTModel language_model{nullptr};                      ///< takes the finished embedding as decoder_input
  ImageInsertEmbedding image_insert_embedding{nullptr};  ///< borrows language_model->embedding

 private:
  /// Of pictures that every rank was given, keeps those whose tower run is this rank's: whole pictures, balanced by
  /// patches. Others, and precomputed features, stay as they are.
  void keep_own_pictures(std::vector<ImageForInsert>& images) const;

  Step37Config config_;
  parallel::GroupPtr tp_;
};
TORCH_MODULE(Step37Model);

}  // namespace megatron_cpp::step37
