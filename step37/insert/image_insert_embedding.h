// Step3.7's image-insert embedding, tensor- and sequence-parallel: a borrowed language embedding and an align_projector
// whose rows land after each start token.
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
/// Gradients: an overwritten row sends nothing to the word embedding; a projected row gets the gradient of the row it
/// ended in, zero if it was cut or overwritten. Features that every rank gives get their whole gradient on every rank
/// with the column and the row sharding (of channels that come sliced, this rank's). With the replicated sharding and
/// without projector, and in every sharding as soon as a group of the batch is `held`, only the rank that projects or
/// holds an image gets its gradient and the others zeros: what computes features on every rank needs
/// GradientDomain::kReplicatedPartial then.
///
/// Communication: what the word embedding alone costs, see ParallelEmbedding's derived classes, and nothing on top
/// where exchange is kFused and features are on every rank and frozen. docs/image-insert.md has the table of what else
/// is sent when features are trained or on single ranks, by sharding, and of what isn't sent when a part is frozen.
/// Which backward collectives run follows from which of embedding, projector and features need a gradient, which must
/// be equal on all ranks: a rank without images of its own passes [0, L, C] features that need one like the others'.
class ImageInsertEmbeddingImpl : public ParallelModule {
 public:
  /// @param language_embedding  borrowed: not among this module's parameters, buffers or children, and free to be
  ///                            shared. Its group is the one everything here is sharded over.
  /// @throws c10::ValueError if hidden_size isn't the embedding's, isn't divisible by t in the column sharding, or C
  ///         isn't in the row sharding; for a hidden-parallel embedding with the row sharding or kAllGather.
  ImageInsertEmbeddingImpl(const LanguageModelEmbedding& language_embedding, ImageInsertEmbeddingOptions options);
  /// The reference's constructor; everything else as ImageInsertEmbeddingOptions has it.
  ImageInsertEmbeddingImpl(const LanguageModelEmbedding& language_embedding, int64_t encoder_output_dim,
                           int64_t hidden_size, bool projector_bias = false);

  /// @param input_ids     [B, S] int64, equal on every rank. On the CPU; ids on a GPU cost one copy to the host.
  /// @param images        the groups, patches before images; empty: the plain word embedding.
  /// @param position_ids  [B, S] int64 or undefined, handed to the language embedding.
  /// @return              [S, B, H], or [S/t, B, H] under sequence parallelism.
  /// Collective over the group. Throws c10::ValueError, before anything is sent: a group without features ("the vision
  /// tower has to run first"), features of another rank or width, an image count that doesn't match (unless
  /// MismatchPolicy::kTruncate), ids outside the vocabulary. On every rank alike where every rank was given the same;
  /// what is wrong with features of single ranks is thrown by those that hold them, with `checked` by all.
  at::Tensor forward(const at::Tensor& input_ids, const std::vector<ImageForInsert>& images,
                     const at::Tensor& position_ids = {});

  /// The same with a plan made ahead of time, by make_plan, or by InsertPlan::from_runs or from_placeholders for models
  /// that mark images in another way than by start tokens.
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
  std::shared_ptr<LanguageModelEmbeddingImpl> words_;  ///< borrowed, not registered
};
TORCH_MODULE(ImageInsertEmbedding);

}  // namespace megatron_cpp::step37
