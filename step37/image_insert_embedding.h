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

#include "megatron_cpp/parameters/parameter_shard.h"
#include "megatron_cpp/tensor_parallel/column_parallel_linear.h"
#include "megatron_cpp/tensor_parallel/language_model_embedding.h"
#include "megatron_cpp/tensor_parallel/row_parallel_linear.h"
#include "step37/image_for_insert.h"
#include "step37/insert_plan.h"

namespace step37 {

namespace internal {
struct LocalFeatures;
}  // namespace internal

/// How align_projector [H, C] lies on the ranks.
enum class ProjectorSharding {
  /// Rank r holds rows [r·H/t, (r+1)·H/t) and projects every feature row to its H/t columns. For features that every
  /// rank has.
  kColumn,
  /// Rank r holds columns [r·C/t, (r+1)·C/t) and makes a summand of every projected row out of its channels. For
  /// features that are produced by channel. Sums of summands are rounded: not the first choice in bfloat16.
  kRow,
  /// Every rank holds all and projects whole images: those it is assigned. For raw pictures, whose features are only
  /// where the tower ran.
  kReplicated,
};

/// How projected rows reach the rank that owns them.
enum class InsertExchange {
  /// Through the word embedding's one collective: nothing is sent on top.
  kFused,
  /// The plain way, and the baseline: whole projected rows on every rank, inserted into the finished embedding. With a
  /// vocabulary-parallel embedding.
  kAllGather,
};

/// Whether checked mode is on unless the options say otherwise: in debug builds.
#ifdef NDEBUG
inline constexpr bool kCheckedByDefault = false;
#else
inline constexpr bool kCheckedByDefault = true;
#endif

/// Sizes, sharding and exchange of the insert; the same on every rank.
struct ImageInsertEmbeddingOptions {
  /// A projector [hidden_size, encoder_output_dim].
  ImageInsertEmbeddingOptions(int64_t encoder_output_dim, int64_t hidden_size)
      : encoder_output_dim_(encoder_output_dim), hidden_size_(hidden_size) {}

  TORCH_ARG(int64_t, encoder_output_dim);   ///< C
  TORCH_ARG(int64_t, hidden_size);          ///< H
  TORCH_ARG(bool, projector_bias) = false;  ///< whether projected rows get one, [H]
  TORCH_ARG(ProjectorSharding, projector_sharding) = ProjectorSharding::kColumn;  ///< by where features come from
  TORCH_ARG(InsertExchange, exchange) = InsertExchange::kFused;                   ///< kAllGather for comparison
  TORCH_ARG(MismatchPolicy, on_mismatch) = MismatchPolicy::kError;  ///< of images and start tokens in number
  /// The projector's backward adds into its existing gradients and gives autograd none.
  TORCH_ARG(bool, accumulate_into_grad) = false;
  /// Ranks compare what must be equal (a hash of the ids, image rows and holders, dtypes, flags) and agree on errors
  /// before anything else is sent: a disagreement is an error on every rank that names rank and field, instead of
  /// something computed wrong or a hang. Costs some small collectives.
  TORCH_ARG(bool, checked) = kCheckedByDefault;
};

/// Word embeddings [S,B,H] (this rank's rows [S/t,B,H] where the language embedding is sequence-parallel), with the
/// projected features of each group in the rows after its start tokens.
///
/// Gradients: an overwritten row sends nothing to the word embedding; a projected row gets the gradient of the row it
/// ended in, zero if it was cut or overwritten. Features that every rank gives get their whole gradient on every rank
/// with the column and the row sharding (of channels that come sliced, this rank's). With the replicated sharding, and
/// in every sharding as soon as a group of the batch has `rows`, only the rank that projects or holds an image gets
/// its gradient and the others zeros: what computes features on every rank needs GradientDomain::kReplicatedPartial
/// then.
///
/// Communication: what the word embedding alone costs, see ParallelEmbedding's derived classes, and nothing on top
/// where exchange is kFused and features are on every rank and frozen. docs/image-insert.md has the table of what else
/// is sent when features are trained or on single ranks, by sharding, and of what isn't sent when a part is frozen.
/// Which backward collectives run follows from which of embedding, projector and features need a gradient, which must
/// be equal on all ranks: a rank without images of its own passes [0, L, C] features that need one like the others'.
class ImageInsertEmbeddingImpl : public megatron::ParallelModule {
 public:
  /// @param language_embedding  borrowed: not among this module's parameters, buffers or children, and free to be
  ///                            shared. Its group is the one everything here is sharded over.
  /// @throws c10::ValueError if hidden_size isn't the embedding's, isn't divisible by t in the column sharding, or C
  ///         isn't in the row sharding; for a hidden-parallel embedding with the row sharding or kAllGather.
  ImageInsertEmbeddingImpl(const megatron::LanguageModelEmbedding& language_embedding,
                           ImageInsertEmbeddingOptions options);
  /// The reference's constructor; everything else as ImageInsertEmbeddingOptions has it.
  ImageInsertEmbeddingImpl(const megatron::LanguageModelEmbedding& language_embedding, int64_t encoder_output_dim,
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

  /// As given to the constructor.
  const ImageInsertEmbeddingOptions& options() const { return options_; }

  /// The projector: a megatron::ColumnParallelLinear, weight [H/t, C], a megatron::RowParallelLinear, [H, C/t], or a
  /// torch::nn::Linear where it is replicated, [H, C].
  std::shared_ptr<torch::nn::Module> align_projector;

 private:
  struct Projector {  ///< weight and bias, of whichever sharding
    at::Tensor weight;
    at::Tensor bias;
  };
  Projector projector() const;
  at::Tensor insert(const at::Tensor& input_ids, const std::vector<ImageForInsert>& images, const InsertPlan& plan,
                    const at::Tensor& position_ids);
  /// Whether the ranks project the rows they own in the sequence instead of the images they hold.
  bool owners_project(const std::vector<ImageForInsert>& images) const;
  void check_agreement(const at::Tensor& input_ids, const std::vector<ImageForInsert>& images, const InsertPlan& plan,
                       const internal::LocalFeatures& features) const;
  at::Tensor project(const std::vector<at::Tensor>& features, bool gathered) const;
  at::Tensor fused(const at::Tensor& input_ids, const at::Tensor& partial, const at::Tensor& projected,
                   const internal::LocalFeatures& features, const InsertPlan& plan) const;
  at::Tensor projected_by_owners(const at::Tensor& partial, const internal::LocalFeatures& features,
                                 const InsertPlan& plan) const;
  at::Tensor all_gathered(const at::Tensor& text, const at::Tensor& projected, const internal::LocalFeatures& features,
                          const InsertPlan& plan) const;
  at::Tensor gather_projected(const at::Tensor& projected, const internal::LocalFeatures& features) const;
  /// The runs that end in the rows that this rank has of the result, numbered from its first.
  std::vector<InsertRun> own_runs(const InsertPlan& plan) const;

  ImageInsertEmbeddingOptions options_;
  std::shared_ptr<megatron::LanguageModelEmbeddingImpl> language_embedding_;  ///< borrowed, not registered
  megatron::ColumnParallelLinear column_projector_{nullptr};
  megatron::RowParallelLinear row_projector_{nullptr};
  torch::nn::Linear replicated_projector_{nullptr};
};
TORCH_MODULE(ImageInsertEmbedding);

}  // namespace step37
