// Step3.7's image-insert embedding, tensor- and sequence-parallel: word embeddings in which projected image features
// overwrite the rows after each start token.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "megatron_cpp/tensor_parallel/language_model_embedding.h"
#include "step37/insert/image_for_insert.h"
#include "step37/insert/options.h"
#include "step37/insert/plan.h"
#include "step37/insert/projection.h"
#include "step37/insert/reference_insert.h"

namespace megatron_cpp::step37 {

/// Word embeddings [S,B,H] (this rank's rows [S/t,B,H] where the language embedding is sequence-parallel), with the
/// projected features of each group in the rows after its start tokens.
///
/// Gradients: a word embedding row that an image overwrites gets none. A projected row gets the gradient of the
/// embedding row that it overwrites, zero if it was cut or overwritten itself. With a column- or row-sharded projector,
/// features that every rank has get their whole gradient on every rank (if channels come sliced, this rank's). With a
/// replicated projector or none, and with every sharding if a group of the batch is `held`, features get their gradient
/// on the holder of the image and zeros on the other ranks: a module that computes features on every rank then needs
/// GradientDomain::kReplicatedPartial, or parallel::copy_to_tensor_model_parallel_region behind it.
///
/// Communication with kFused, if every rank has the features and they are frozen: the word embedding's one collective
/// (ParallelEmbedding::reduce), which carries the image rows too. docs/image-insert.md has the table of all cases.
/// Which backward collectives run depends on which of word embedding, projector and features need a gradient. That must
/// be equal on all ranks: a rank that holds no image passes [0, L, C] features with the same requires_grad.
class ImageInsertEmbeddingImpl : public ParallelModule {
 public:
  /// @param language_embedding  not registered: not among this module's parameters, buffers or children; other modules
  ///                            may share it. Everything here is sharded over its group.
  /// @throws c10::ValueError if hidden_size isn't that of language_embedding; if H (column) or C (row) isn't divisible
  ///         by t; without projector, if C != H or a bias is asked for; for a hidden-parallel embedding with a
  ///         row-sharded projector or kAllGather.
  ImageInsertEmbeddingImpl(const LanguageModelEmbedding& language_embedding, ImageInsertEmbeddingOptions options);
  /// The reference's constructor, with default options.
  ImageInsertEmbeddingImpl(const LanguageModelEmbedding& language_embedding, int64_t encoder_output_dim,
                           int64_t hidden_size, bool projector_bias = false);

  /// @param input_ids     [B, S] int64, equal on every rank. On the CPU; ids on a GPU cost one copy to the host.
  /// @param images        the groups, patches before images; if empty, the result is the plain word embedding.
  /// @param position_ids  [B, S] int64 or undefined, passed to the language embedding.
  /// @return              [S, B, H], or [S/t, B, H] under sequence parallelism.
  /// Collective over the group. Throws c10::ValueError before anything is sent, for a group without features ("the
  /// vision tower has to run first"), a wrong number of dimensions, width or number of images (unless
  /// MismatchPolicy::kTruncate), and ids outside the vocabulary. Every rank throws what every rank can see; only the
  /// holder of an image throws what is wrong with its features, unless `checked` makes every rank throw.
  at::Tensor forward(const at::Tensor& input_ids, const std::vector<ImageForInsert>& images,
                     const at::Tensor& position_ids = {});

  /// The same with a plan made earlier: by make_plan, or, for models that mark images without start tokens, by
  /// InsertPlan::from_runs or from_placeholders.
  at::Tensor forward(const at::Tensor& input_ids, const std::vector<ImageForInsert>& images, const InsertPlan& plan,
                     const at::Tensor& position_ids = {});

  /// The plan for these ids and images. Not collective.
  InsertPlan make_plan(const at::Tensor& input_ids, const std::vector<ImageForInsert>& images) const;

  /// One tensor [L_i, C] per image, in order: step37::feature_blocks, under the reference's name.
  static std::vector<at::Tensor> normalize_feature_list(const FeatureList& features) {
    return feature_blocks(features);
  }
  /// step37::insert_features, under the reference's name.
  static at::Tensor insert_features(const at::Tensor& input_embeddings, const FeatureList& image_features,
                                    const at::Tensor& input_ids, int64_t flag) {
    return step37::insert_features(input_embeddings, image_features, input_ids, flag);
  }

  std::vector<ParameterShard> own_parameters() const override { return {}; }

  /// As given to the constructor.
  const ImageInsertEmbeddingOptions& options() const { return options_; }

  /// The projector; its weight is [H/t, C], [H, C/t] or [H, C], as options().projector_sharding() says.
  std::shared_ptr<AlignProjector> align_projector;

 private:
  /// Whether each rank projects the rows that it owns in the sequence instead of the images that it holds.
  bool owners_project(const std::vector<ImageForInsert>& images) const;

  ImageInsertEmbeddingOptions options_;
  std::shared_ptr<LanguageModelEmbeddingImpl> words_;  ///< not registered as a child
};
TORCH_MODULE(ImageInsertEmbedding);

}  // namespace megatron_cpp::step37
