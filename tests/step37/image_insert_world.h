// Shared by the tests of the image insert: cases, a dense reference in one process, the layer in every variant, and
// checks of the gradients on each rank. All values are exact in floating point: results are compared bit by bit.
#pragma once

#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <string>
#include <variant>
#include <vector>

#include "megatron_cpp/tensor_parallel/language_model_embedding.h"
#include "parallel/group.h"
#include "parallel/recording_backend.h"
#include "step37/insert/image_insert_embedding.h"

namespace megatron_cpp::insert_world {

// Every t in {1, 2, 3, 4} divides H, C and S; none but 1 divides V, which is then padded.
inline constexpr int64_t kV = 19;
inline constexpr int64_t kH = 12;
inline constexpr int64_t kC = 12;
inline constexpr int64_t kS = 24;
inline constexpr int64_t kPatch = 17;
inline constexpr int64_t kImage = 18;

// ---- What is inserted where ----

struct Place {
  int64_t token;
  int64_t batch;
  int64_t position;
};

/// [B, S] ids below 17, and start tokens at `places`.
at::Tensor make_ids(int64_t B, const std::vector<Place>& places, int64_t S = kS);

/// Exact features [shape.., C].
at::Tensor features(int64_t seed, std::vector<int64_t> shape, int64_t C = kC);

step37::ImageForInsert group_of(int64_t token, step37::FeatureList list);

struct Scenario {
  std::string name;
  at::Tensor ids;
  std::vector<step37::ImageForInsert> images;
  step37::MismatchPolicy on_mismatch = step37::MismatchPolicy::kError;
};

/// Five images in two groups, a tensor and a list, on both sides of the borders of sequence shards.
Scenario two_groups();

/// Images that begin before others end, that are cut at S, and a start token in the last position.
Scenario overlaps();

std::vector<Scenario> scenarios();

/// `images` with every feature tensor replaced by change(tensor).
template <class Change>
std::vector<step37::ImageForInsert> changed(std::vector<step37::ImageForInsert> images, const Change& change) {
  for (auto& group : images) {
    if (auto* tensor = std::get_if<at::Tensor>(&*group.image_features)) {
      *tensor = change(*tensor);
    } else {
      for (auto& entry : std::get<std::vector<at::Tensor>>(*group.image_features)) entry = change(entry);
    }
  }
  return images;
}

std::vector<at::Tensor> tensors_of(const std::vector<step37::ImageForInsert>& images);
/// One tensor [L, C] per image of the group.
std::vector<at::Tensor> blocks_of(const step37::ImageForInsert& group);
/// Number of feature rows of each image of all groups.
std::vector<int64_t> rows_of(const std::vector<step37::ImageForInsert>& images);

// ---- The dense reference ----

struct Sizes {
  int64_t V = kV, H = kH, C = kC;
};

struct Parameters {
  explicit Parameters(int64_t seed, const Sizes& sizes = {});
  Sizes sizes() const { return {words.size(0), words.size(1), weight.size(1)}; }

  at::Tensor words;   ///< [V, H]
  at::Tensor weight;  ///< [H, C]
  at::Tensor bias;    ///< [H]
};

struct Results {
  at::Tensor output, words_gradient, weight_gradient, bias_gradient;
  std::vector<step37::ImageForInsert> feature_gradients;
};

/// tensor.grad(), or zeros if it is undefined.
at::Tensor gradient_of(const at::Tensor& tensor);

/// Embeds everything, then overwrites row after row; the gradients are those of (output * loss_weights).sum().
Results dense(const Scenario& scenario, const Parameters& parameters, bool with_bias, const at::Tensor& loss_weights);

// ---- The layer ----

struct Variant {
  int t = 1;
  Part embedding = Part::kSummand;
  step37::ProjectorSharding sharding = step37::ProjectorSharding::kColumn;
  step37::InsertExchange exchange = step37::InsertExchange::kFused;
  bool sequence_parallel = false;

  bool hidden() const { return embedding == Part::kColumns; }
  bool column() const { return sharding == step37::ProjectorSharding::kColumn; }
  bool row() const { return sharding == step37::ProjectorSharding::kRow; }
  bool replicated() const { return sharding == step37::ProjectorSharding::kReplicated; }
  bool fused() const { return exchange == step37::InsertExchange::kFused; }
  std::string name() const;
};

/// All combinations that the insert allows, for t ranks.
std::vector<Variant> variants(int t);

/// All variants for all t that divide the world.
void for_each_variant(const std::function<void(const Variant&)>& action);

struct Trainable {
  bool embedding = true, projector = true, features = true;
  bool any() const { return embedding || projector || features; }
  std::string name() const;
};

inline constexpr Trainable kTrainable[] = {{true, true, true},   {true, true, false},  {true, false, true},
                                           {true, false, false}, {false, true, true},  {false, true, false},
                                           {false, false, true}, {false, false, false}};

/// Where features are before the insert.
enum class Placement {
  kEverywhere,
  kSliced,     ///< every rank has its C/t channels of all features: for the row sharding
  kOnHolders,  ///< each image on one rank
};
std::string name_of(Placement placement);

struct Placed {
  Placement placement = Placement::kEverywhere;
  std::vector<int64_t> holders;  ///< per image of all groups
  bool give_holders = false;     ///< whether to pass them; if not, they must be the balanced ones of the layer
};

/// On the holders that the layer computes by itself.
Placed on_balanced_holders(const std::vector<step37::ImageForInsert>& images, int t);

/// The placements that a variant allows: everywhere, on holders t-1, ..., 0, t-1, ..., sliced by channel.
std::vector<Placed> placements(const Variant& variant, const std::vector<step37::ImageForInsert>& images);

struct LayerOptions {
  step37::MismatchPolicy on_mismatch = step37::MismatchPolicy::kError;
  bool bias = true;
  bool accumulate_into_grad = false;        ///< of the projector
  bool words_accumulate_into_grad = false;  ///< of the embedding
  bool checked = false;                     ///< off, so that its collectives aren't counted
};

struct Layer {
  Variant variant;
  Sizes sizes;
  parallel::RecordedGroup recorded;
  LanguageModelEmbedding embedding{nullptr};
  step37::ImageInsertEmbedding insert{nullptr};

  int64_t rank() const;
  at::Tensor words() const;
  at::Tensor weight() const;
  at::Tensor bias() const;  ///< undefined without bias
  /// This rank's part of a global [S, B, H], [V, H], [H, C] or [H].
  at::Tensor own_sequence(const at::Tensor& whole) const;
  at::Tensor own_words(const at::Tensor& whole) const;
  at::Tensor own_weight(const at::Tensor& whole) const;
  at::Tensor own_bias(const at::Tensor& whole) const;
  /// The part of `images` (or of their gradients) that this rank passes (or expects).
  std::vector<step37::ImageForInsert> own_images(const std::vector<step37::ImageForInsert>& images,
                                                 const Placed& placed) const;
  /// The same on the device of the test, as new leaves.
  std::vector<step37::ImageForInsert> leaves(const std::vector<step37::ImageForInsert>& images,
                                             const Placed& placed = {}, bool trainable = true) const;

  void set_trainable(const Trainable& trainable) const;
  /// The insert's forward; `more` is a plan, position ids, both or nothing.
  template <class... More>
  at::Tensor forward(const at::Tensor& ids, const std::vector<step37::ImageForInsert>& images,
                     const More&... more) const {
    auto module = insert;  // a const ModuleHolder gives a const module, and forward isn't const
    return module->forward(ids, images, more...);
  }
  void backward(const at::Tensor& output, const at::Tensor& loss_weights) const;
};

Layer make_layer(const Variant& variant, const Parameters& parameters, const LayerOptions& options = {});

/// Another insert with the word embedding of `layer`.
step37::ImageInsertEmbedding make_insert(const Layer& layer, const Parameters& parameters,
                                         const step37::ImageInsertEmbeddingOptions& options);

/// Whether the gradient of a projector parameter fits its GradientDomain: it is this rank's part of `whole` ([H, C] or
/// [H]), or, if the projector is replicated, the sum over the ranks is `whole`. Collective over the group of `layer`.
testing::AssertionResult projector_gradient_is(const Layer& layer, const at::Tensor& parameter,
                                               const at::Tensor& whole);

/// Whether the features that this rank passed have the right gradients: complete ones, but with a replicated projector
/// and features on every rank only those of the images that this rank projects. Collective over the group of `layer`.
testing::AssertionResult feature_gradients_are(const Layer& layer, const std::vector<step37::ImageForInsert>& passed,
                                               const std::vector<step37::ImageForInsert>& whole, const Placed& placed);

/// Whether everything trainable has its gradient and nothing else has one. Needs at least one image group. Collective
/// over the group of `layer`.
testing::AssertionResult gradients_are(const Layer& layer, const std::vector<step37::ImageForInsert>& passed,
                                       const Results& expected, const Trainable& trainable, const Placed& placed = {});

}  // namespace megatron_cpp::insert_world
