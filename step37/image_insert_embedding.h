// Step3.7's image-insert embedding, tensor- and sequence-parallel: a borrowed language embedding and an align_projector
// whose rows land after each start token.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "megatron_cpp/tensor_parallel/column_parallel_linear.h"
#include "megatron_cpp/tensor_parallel/language_model_embedding.h"
#include "megatron_cpp/tensor_parallel/parameter_shard.h"
#include "step37/image_for_insert.h"
#include "step37/insert_plan.h"

namespace step37 {

/// How align_projector [H, C] lies on the ranks.
enum class ProjectorSharding {
  /// Rank r holds rows [r·H/t, (r+1)·H/t) and projects every feature row to its H/t columns. For features that every
  /// rank has.
  kColumn,
  /// Every rank holds all and projects whole images: those it is assigned. For raw pictures, whose features are only
  /// where the tower ran.
  kReplicated,
};

/// How projected rows reach the rank that owns them.
enum class InsertExchange {
  /// Written into the embedding's partial sum, whose one collective delivers them: nothing is sent on top.
  kFused,
  /// The plain way, and the baseline: projected rows are gathered and inserted into the finished embedding.
  kAllGather,
};

struct ImageInsertEmbeddingOptions {
  ImageInsertEmbeddingOptions(int64_t encoder_output_dim, int64_t hidden_size)
      : encoder_output_dim_(encoder_output_dim), hidden_size_(hidden_size) {}

  TORCH_ARG(int64_t, encoder_output_dim);  ///< C
  TORCH_ARG(int64_t, hidden_size);         ///< H
  TORCH_ARG(bool, projector_bias) = false;
  TORCH_ARG(ProjectorSharding, projector_sharding) = ProjectorSharding::kColumn;
  TORCH_ARG(InsertExchange, exchange) = InsertExchange::kFused;
  TORCH_ARG(MismatchPolicy, on_mismatch) = MismatchPolicy::kError;
  /// The projector's backward adds into its existing gradients and gives autograd none.
  TORCH_ARG(bool, accumulate_into_grad) = false;
};

/// Word embeddings [S,B,H] (this rank's rows [S/t,B,H] where the language embedding is sequence-parallel), with the
/// projected features of each group in the rows after its start tokens.
///
/// Gradients: an overwritten row sends nothing to the word embedding; a projected row gets the gradient of the row it
/// ended in, zero if it was cut or overwritten.
///
/// Communication on top of the language embedding's own (n feature rows in all, t ranks, bytes sent per rank):
///   kFused, column        forward 0; backward 1 all-reduce of [n, C] if features need a gradient
///   kFused, replicated    0
///   kAllGather, column    forward 1 all-gather of [n, H]; backward 1 reduce-scatter of it under sequence parallelism,
///                         and the all-reduce of [n, C] as above
///   kAllGather, replicated   the same with rows, padded to the rank that holds most
/// Which backward collectives run follows from which of embedding, projector and features need a gradient, which must
/// be equal on all ranks: a rank without images of its own passes [0, L, C] features that need one like the others'.
class ImageInsertEmbeddingImpl : public megatron::ParallelModule {
 public:
  /// @param language_embedding  borrowed: not among this module's parameters, buffers or children, and free to be
  /// shared.
  ///                            Its group is the one everything here is sharded over.
  /// @throws c10::ValueError if hidden_size isn't the embedding's, or isn't divisible by t in the column sharding.
  ImageInsertEmbeddingImpl(megatron::LanguageModelEmbedding language_embedding, ImageInsertEmbeddingOptions options);
  /// The reference's constructor; everything else as ImageInsertEmbeddingOptions has it.
  ImageInsertEmbeddingImpl(megatron::LanguageModelEmbedding language_embedding, int64_t encoder_output_dim,
                           int64_t hidden_size, bool projector_bias = false);

  /// @param input_ids     [B, S] int64, equal on every rank. On the CPU; ids on a GPU cost one copy to the host.
  /// @param images        the groups, patches before images; empty: the plain word embedding.
  /// @param position_ids  [B, S] int64 or undefined, handed to the language embedding.
  /// @return              [S, B, H], or [S/t, B, H] under sequence parallelism.
  /// Collective over the group. Throws c10::ValueError, before anything is sent and on every rank alike: a group
  /// without features ("the vision tower has to run first"), features of another rank or width, an image count that
  /// doesn't match (unless MismatchPolicy::kTruncate), ids outside the vocabulary.
  at::Tensor forward(const at::Tensor& input_ids, const std::vector<ImageForInsert>& images,
                     const at::Tensor& position_ids = {});

  /// The same with a plan that make_plan gave, so that the loader can make it ahead of time.
  at::Tensor forward(const at::Tensor& input_ids, const std::vector<ImageForInsert>& images, const InsertPlan& plan,
                     const at::Tensor& position_ids = {});

  /// The plan for these ids and images. Not collective.
  InsertPlan make_plan(const at::Tensor& input_ids, const std::vector<ImageForInsert>& images) const;

  /// One tensor [L_i, C] per image, in order.
  static std::vector<at::Tensor> normalize_feature_list(const FeatureList& features);

  /// The reference's insertion on plain tensors, without communication: a copy of `input_embeddings` [S, B, H] in which
  /// the k-th block of projected features overwrites the rows after the k-th occurrence of `flag` in input_ids [B, S].
  /// Returns the input itself if there is no occurrence or no feature; warns and inserts the overlap if the counts
  /// differ.
  static at::Tensor insert_features(const at::Tensor& input_embeddings, const FeatureList& image_features,
                                    const at::Tensor& input_ids, int64_t flag);

  std::vector<megatron::ParameterShard> own_parameters() const override;

  const ImageInsertEmbeddingOptions& options() const { return options_; }

  /// The projector: a megatron::ColumnParallelLinear, or a torch::nn::Linear where it is replicated. Its weight is
  /// [H/t, C] or [H, C].
  std::shared_ptr<torch::nn::Module> align_projector;

 private:
  struct LocalFeatures;

  at::Tensor projector_weight() const;
  LocalFeatures local_features(const std::vector<ImageForInsert>& images, const InsertPlan& plan) const;
  /// Appends what this rank projects of `group`, whose tensors hold the images `given`.
  void append_own_features(const ImageForInsert& group, const std::vector<int64_t>& given, const InsertPlan& plan,
                           const LocalFeatures& local, std::vector<at::Tensor>& pieces) const;
  at::Tensor project(const at::Tensor& features) const;
  at::Tensor fused(const at::Tensor& input_ids, const LocalFeatures& local, const InsertPlan& plan);
  at::Tensor all_gathered(const at::Tensor& input_ids, const LocalFeatures& local, const InsertPlan& plan,
                          const at::Tensor& position_ids);
  at::Tensor gather_projected(const at::Tensor& projected, const LocalFeatures& local) const;

  ImageInsertEmbeddingOptions options_;
  std::shared_ptr<megatron::LanguageModelEmbeddingImpl> language_embedding_;  ///< borrowed, not registered
  megatron::ColumnParallelLinear column_projector_{nullptr};
  torch::nn::Linear replicated_projector_{nullptr};
};
TORCH_MODULE(ImageInsertEmbedding);

}  // namespace step37
