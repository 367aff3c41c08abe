// ImageInsertEmbedding against a dense embedding and projector of one process; the data are exact, so the comparisons
// are of bits.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>
#include <variant>
#include <vector>

#include "megatron_cpp/tensor_parallel/language_model_embedding.h"
#include "parallel/collectives.h"
#include "parallel/recording_backend.h"
#include "parallel/shard.h"
#include "step37/image_insert_embedding.h"
#include "tests/support/test_world.h"

namespace {

using megatron::LanguageModelEmbedding;
using megatron::VocabParallelEmbeddingOptions;
using parallel::CollectiveKind;
using parallel::CommunicationCount;
using step37::FeatureList;
using step37::ImageForInsert;
using step37::ImageInsertEmbedding;
using step37::ImageInsertEmbeddingImpl;
using step37::ImageInsertEmbeddingOptions;
using step37::InsertExchange;
using step37::MismatchPolicy;
using step37::ProjectorSharding;
using test_support::exact_values;
using test_support::groups;
using test_support::on_device;

constexpr int64_t kV = 19;  // padded by every t but 1
constexpr int64_t kH = 8;
constexpr int64_t kC = 5;
constexpr int64_t kS = 16;
constexpr int64_t kPatch = 17;
constexpr int64_t kImage = 18;

// ---- What is inserted where ----

struct Place {
  int64_t token;
  int64_t batch;
  int64_t position;
};

/// [B, S] ids below 17, and start tokens at `places`.
at::Tensor make_ids(int64_t B, const std::vector<Place>& places) {
  auto ids = (at::arange(B * kS, at::kLong) * 7).remainder(17).view({B, kS});
  for (const auto& place : places) ids[place.batch][place.position] = place.token;
  return ids;
}

at::Tensor features(int64_t seed, std::vector<int64_t> shape) {
  shape.push_back(kC);
  return exact_values(shape, seed);
}

ImageForInsert group_of(int64_t token, FeatureList list) {
  ImageForInsert group;
  group.insert_start_token = token;
  group.image_features = std::move(list);
  return group;
}

struct Scenario {
  std::string name;
  at::Tensor ids;
  std::vector<ImageForInsert> images;
  MismatchPolicy on_mismatch = MismatchPolicy::kError;
};

Scenario two_groups() {
  const auto ids = make_ids(2, {{kPatch, 0, 0}, {kPatch, 0, 4}, {kPatch, 1, 2}, {kImage, 0, 8}, {kImage, 1, 6}});
  return {"two groups",
          ids,
          {group_of(kPatch, features(10, {3, 3})),
           group_of(kImage, std::vector<at::Tensor>{features(11, {1, 7}), features(12, {9})})}};
}

/// Borders of shards are at 4, 8 and 12 for t = 4, at 8 for t = 2.
std::vector<Scenario> scenarios() {
  using List = std::vector<at::Tensor>;
  const auto truncate = MismatchPolicy::kTruncate;
  return {
      {"across borders", make_ids(1, {{kImage, 0, 1}}), {group_of(kImage, features(20, {1, 7}))}},
      {"whole shards", make_ids(1, {{kImage, 0, 1}}), {group_of(kImage, features(21, {1, 12}))}},
      {"adjacent images", make_ids(1, {{kImage, 0, 0}, {kImage, 0, 4}}), {group_of(kImage, features(22, {2, 4}))}},
      {"overlaps, an overrun and a flag at the end",
       make_ids(2, {{kImage, 0, 1}, {kImage, 0, 4}, {kImage, 1, 11}, {kImage, 1, 15}}),
       {group_of(kImage, features(23, {4, 6}))}},
      {"lists of one and of several images",
       make_ids(3, {{kImage, 0, 9}, {kImage, 2, 0}, {kImage, 2, 6}}),
       {group_of(kImage, List{features(24, {3}), features(25, {2, 4})})}},
      two_groups(),
      {"a later group over an earlier one",
       make_ids(1, {{kPatch, 0, 3}, {kPatch, 0, 10}, {kImage, 0, 1}}),
       {group_of(kPatch, features(26, {2, 3})), group_of(kImage, features(27, {1, 10}))}},
      {"no group", make_ids(2, {}), {}},
      {"no image", make_ids(2, {}), {group_of(kPatch, features(28, {0, 4})), group_of(kImage, List{})}},
      {"an image without rows",
       make_ids(1, {{kImage, 0, 2}, {kImage, 0, 5}}),
       {group_of(kImage, List{features(29, {0}), features(30, {3})})}},
      {"a token twice",
       make_ids(1, {{kImage, 0, 1}, {kImage, 0, 8}}),
       {group_of(kImage, features(31, {2, 6})), group_of(kImage, features(32, {1, 3}))},
       truncate},
      {"more images than places", make_ids(2, {{kImage, 1, 2}}), {group_of(kImage, features(33, {4, 3}))}, truncate},
      {"no place", make_ids(1, {}), {group_of(kImage, features(34, {2, 3}))}, truncate},
  };
}

/// `images` with every feature tensor replaced by what `change` makes of it.
template <class Change>
std::vector<ImageForInsert> changed(std::vector<ImageForInsert> images, const Change& change) {
  for (auto& group : images) {
    if (auto* tensor = std::get_if<at::Tensor>(&*group.image_features)) {
      *tensor = change(*tensor);
    } else {
      for (auto& entry : std::get<std::vector<at::Tensor>>(*group.image_features)) entry = change(entry);
    }
  }
  return images;
}

std::vector<ImageForInsert> leaves_of(const std::vector<ImageForInsert>& images, bool trainable = true) {
  return changed(images, [&](const at::Tensor& tensor) { return on_device(tensor).clone().requires_grad_(trainable); });
}

std::vector<at::Tensor> tensors_of(const std::vector<ImageForInsert>& images) {
  std::vector<at::Tensor> tensors;
  changed(images, [&](const at::Tensor& tensor) {
    tensors.push_back(tensor);
    return tensor;
  });
  return tensors;
}

std::vector<at::Tensor> blocks_of(const ImageForInsert& group) {
  std::vector<at::Tensor> blocks;
  for (const auto& tensor : tensors_of({group})) {
    if (tensor.dim() == 2) blocks.push_back(tensor);
    for (int64_t i = 0; tensor.dim() == 3 && i < tensor.size(0); ++i) blocks.push_back(tensor[i]);
  }
  return blocks;
}

std::vector<int64_t> rows_of(const std::vector<ImageForInsert>& images) {
  std::vector<int64_t> rows;
  for (const auto& group : images) {
    for (const auto& block : blocks_of(group)) rows.push_back(block.size(0));
  }
  return rows;
}

// ---- The dense counterpart ----

struct Parameters {
  explicit Parameters(int64_t seed, int64_t H = kH)
      : words(exact_values({kV, H}, seed)),
        weight(exact_values({H, kC}, seed + 1)),
        bias(exact_values({H}, seed + 2)) {}
  at::Tensor words;   // [V, H]
  at::Tensor weight;  // [H, C]
  at::Tensor bias;    // [H]
};

struct Results {
  at::Tensor output, words_gradient, weight_gradient, bias_gradient;
  std::vector<ImageForInsert> feature_gradients;
};

at::Tensor gradient_of(const at::Tensor& tensor) {
  return tensor.grad().defined() ? tensor.grad() : at::zeros_like(tensor);
}

/// Embeds everything, then overwrites row after row.
Results dense(const Scenario& scenario, const Parameters& parameters, bool with_bias, const at::Tensor& loss_weights) {
  const auto words = parameters.words.clone().requires_grad_();
  const auto weight = parameters.weight.clone().requires_grad_();
  const auto bias = parameters.bias.clone().requires_grad_();
  const auto images =
      changed(scenario.images, [](const at::Tensor& tensor) { return tensor.clone().requires_grad_(); });
  const auto embedded = at::embedding(words, scenario.ids.t());
  for (const auto& group : images) {
    const auto blocks = blocks_of(group);
    size_t image = 0;
    for (int64_t b = 0; b < scenario.ids.size(0); ++b) {
      for (int64_t p = 0; p < kS; ++p) {
        if (scenario.ids[b][p].item<int64_t>() != group.insert_start_token || image == blocks.size()) continue;
        const auto projected = at::linear(blocks[image], weight, with_bias ? bias : at::Tensor());
        for (int64_t row = 0; row < projected.size(0) && p + 1 + row < kS; ++row) {
          embedded[p + 1 + row][b].copy_(projected[row]);
        }
        ++image;
      }
    }
  }
  (embedded * loss_weights).sum().backward();
  return {embedded.detach(), gradient_of(words), gradient_of(weight), gradient_of(bias), changed(images, gradient_of)};
}

// ---- The layer ----

struct Variant {
  int t = 1;
  ProjectorSharding sharding = ProjectorSharding::kColumn;
  InsertExchange exchange = InsertExchange::kFused;
  bool sequence_parallel = false;
  bool column() const { return sharding == ProjectorSharding::kColumn; }
  bool fused() const { return exchange == InsertExchange::kFused; }
};

void for_each_variant(const std::function<void(const Variant&)>& action) {
  for (const int t : test_support::divisors_of_world()) {
    for (const auto sharding : {ProjectorSharding::kColumn, ProjectorSharding::kReplicated}) {
      for (const auto exchange : {InsertExchange::kFused, InsertExchange::kAllGather}) {
        for (const bool sequence_parallel : {false, true}) {
          const Variant variant{t, sharding, exchange, sequence_parallel};
          SCOPED_TRACE(testing::Message() << "t " << t << (variant.column() ? ", column" : ", replicated")
                                          << (variant.fused() ? ", fused" : ", all-gather") << ", sequence_parallel "
                                          << sequence_parallel);
          action(variant);
        }
      }
    }
  }
}

/// The rank's rows of `whole`, that of its sequence or its projector columns.
at::Tensor own_rows(const at::Tensor& whole, const parallel::GroupPtr& tp) {
  const int64_t rows = whole.size(0) / tp->getSize();
  return whole.narrow(0, rows * tp->getRank(), rows);
}

at::Tensor own_words(const at::Tensor& words, const parallel::GroupPtr& tp) {
  const int64_t padded = (kV + tp->getSize() - 1) / tp->getSize() * tp->getSize();
  return own_rows(at::constant_pad_nd(words, {0, 0, 0, padded - kV}), tp);
}

struct Layer {
  Variant variant;
  parallel::RecordedGroup recorded;
  LanguageModelEmbedding embedding{nullptr};
  ImageInsertEmbedding insert{nullptr};

  at::Tensor words() const { return embedding->word_embeddings->weight; }
  at::Tensor weight() const { return insert->named_parameters()["align_projector.weight"]; }
  at::Tensor bias() const { return insert->named_parameters()["align_projector.bias"]; }
  /// This rank's rows of a [S, B, H].
  at::Tensor own_sequence(const at::Tensor& whole) const {
    return variant.sequence_parallel ? own_rows(whole, recorded.group) : whole;
  }
  void backward(const at::Tensor& output, const at::Tensor& loss_weights) const {
    (output * on_device(own_sequence(loss_weights))).sum().backward();
  }
};

void assign(const at::Tensor& parameter, const at::Tensor& value) {
  const at::NoGradGuard no_grad;
  parameter.copy_(value);
}

ImageInsertEmbedding make_insert(const Layer& layer, const Parameters& parameters,
                                 const ImageInsertEmbeddingOptions& options) {
  ImageInsertEmbedding insert(layer.embedding, options);
  insert->to(test_support::runtime().device());
  for (auto& parameter : insert->named_parameters()) {
    const auto& whole = parameter.key() == "align_projector.weight" ? parameters.weight : parameters.bias;
    assign(parameter.value(), layer.variant.column() ? own_rows(whole, layer.recorded.group) : whole);
  }
  return insert;
}

Layer make_layer(const Variant& variant, const Parameters& parameters, MismatchPolicy on_mismatch, bool bias,
                 bool accumulate_into_grad = false) {
  Layer layer{variant, parallel::record(groups(variant.t).tp)};
  const int64_t H = parameters.words.size(1);
  layer.embedding = LanguageModelEmbedding(
      VocabParallelEmbeddingOptions(kV, H).sequence_parallel(variant.sequence_parallel), layer.recorded.group);
  layer.embedding->to(test_support::runtime().device());
  assign(layer.words(), own_words(parameters.words, layer.recorded.group));
  layer.insert = make_insert(layer, parameters,
                             ImageInsertEmbeddingOptions(kC, H)
                                 .projector_bias(bias)
                                 .projector_sharding(variant.sharding)
                                 .exchange(variant.exchange)
                                 .on_mismatch(on_mismatch)
                                 .accumulate_into_grad(accumulate_into_grad));
  return layer;
}

/// A projector's gradient, complete: the column sharding's is, the replicated one's is summed over the ranks.
void expect_projector_gradient(const at::Tensor& parameter, const at::Tensor& whole, const Layer& layer) {
  const auto& tp = groups(layer.variant.t).tp;
  EXPECT_TRUE(parameter.grad().defined());
  const auto gradient = gradient_of(parameter);
  if (layer.variant.column()) {
    EXPECT_TRUE(test_support::equal(gradient, own_rows(whole, tp)));
  } else {
    EXPECT_TRUE(test_support::equal(parallel::all_reduce(gradient, tp), whole));
  }
}

/// Features that every rank has: the column sharding completes their gradients, in the replicated one each rank has
/// those of its images.
void expect_feature_gradients(const std::vector<ImageForInsert>& leaves, const std::vector<ImageForInsert>& expected,
                              const Layer& layer) {
  const auto actual = tensors_of(leaves);
  const auto wanted = tensors_of(expected);
  for (size_t i = 0; i < actual.size(); ++i) {
    EXPECT_TRUE(actual[i].grad().defined());
    const auto gradient = gradient_of(actual[i]);
    EXPECT_TRUE(test_support::equal(
        layer.variant.column() ? gradient : parallel::all_reduce(gradient, groups(layer.variant.t).tp), wanted[i]));
  }
}

/// Keeps warnings from the test's output.
class Warnings : public c10::WarningHandler {
 public:
  void process(const c10::Warning& warning) override { texts.push_back(warning.msg()); }
  std::vector<std::string> texts;

 private:
  c10::WarningUtils::WarningHandlerGuard guard_{this};
};

template <class Action>
std::string value_error(const Action& action) {
  try {
    action();
  } catch (const c10::ValueError& error) {
    return error.what_without_backtrace();
  }
  return "nothing thrown";
}

template <class Action>
void expect_refused(const Action& action, const std::string& part) {
  EXPECT_NE(value_error(action).find(part), std::string::npos) << value_error(action) << "\n  lacks: " << part;
}

std::string text(const CommunicationCount& count) {
  std::string result;
  for (int kind = 0; kind < parallel::kNumCollectiveKinds; ++kind) {
    const auto collective = static_cast<CollectiveKind>(kind);
    result += std::string(collective_name(collective)) + " " + std::to_string(count.of(collective)) + ", ";
  }
  return result + std::to_string(count.bytes_sent) + " bytes";
}

/// Counts to expect on t ranks.
class Expected {
 public:
  explicit Expected(int t) : t_(t) {}
  /// A collective on `elements` float32 elements in all.
  Expected& add(bool happens, CollectiveKind kind, int64_t elements) {
    if (!happens || t_ == 1) return *this;
    ++count_.collectives[static_cast<size_t>(kind)];
    count_.bytes_sent += (kind == CollectiveKind::kAllReduce ? 2 : 1) * elements * 4 * (t_ - 1) / t_;
    return *this;
  }
  const CommunicationCount& count() const { return count_; }

 private:
  int64_t t_;
  CommunicationCount count_;
};

struct Trainable {
  bool embedding, projector, features;
};

const std::vector<Trainable> kTrainable{{true, true, true},   {true, true, false},  {true, false, true},
                                        {true, false, false}, {false, true, true},  {false, true, false},
                                        {false, false, true}, {false, false, false}};

}  // namespace

TEST(ImageInsertEmbedding, EqualsTheDenseOne) {
  Warnings warnings;
  const Parameters parameters(1);
  for (const auto& scenario : scenarios()) {
    const auto loss_weights = exact_values({kS, scenario.ids.size(0), kH}, 5);
    for (const bool bias : {false, true}) {
      const auto expected = dense(scenario, parameters, bias, loss_weights);
      SCOPED_TRACE(testing::Message() << scenario.name << ", bias " << bias);
      for_each_variant([&](const Variant& variant) {
        auto layer = make_layer(variant, parameters, scenario.on_mismatch, bias);
        const auto images = leaves_of(scenario.images);
        const auto output = layer.insert->forward(scenario.ids, images);
        EXPECT_TRUE(test_support::equal(output, layer.own_sequence(expected.output)));
        layer.backward(output, loss_weights);
        EXPECT_TRUE(
            test_support::equal(layer.words().grad(), own_words(expected.words_gradient, layer.recorded.group)));
        if (scenario.images.empty()) {
          EXPECT_FALSE(layer.weight().grad().defined());
          return;
        }
        expect_projector_gradient(layer.weight(), expected.weight_gradient, layer);
        if (bias) expect_projector_gradient(layer.bias(), expected.bias_gradient, layer);
        expect_feature_gradients(images, expected.feature_gradients, layer);
      });
    }
  }
}

TEST(ImageInsertEmbedding, ReplicatedTakesAnyHiddenSize) {
  const Parameters parameters(1, 9);
  const auto scenario = two_groups();
  const auto loss_weights = exact_values({kS, 2, 9}, 5);
  const auto expected = dense(scenario, parameters, true, loss_weights);
  for_each_variant([&](const Variant& variant) {
    if (variant.column()) return;
    auto layer = make_layer(variant, parameters, scenario.on_mismatch, true);
    const auto output = layer.insert->forward(scenario.ids, leaves_of(scenario.images));
    EXPECT_TRUE(test_support::equal(output, layer.own_sequence(expected.output)));
    layer.backward(output, loss_weights);
    expect_projector_gradient(layer.weight(), expected.weight_gradient, layer);
  });
}

// Which parts are trained decides what is sent, and changes no value.
TEST(ImageInsertEmbedding, SendsWhatTheHeaderSaysForEveryChoiceOfTrainableParts) {
  const Parameters parameters(1);
  const auto scenario = two_groups();
  const auto loss_weights = exact_values({kS, 2, kH}, 5);
  const auto expected = dense(scenario, parameters, true, loss_weights);
  const auto rows = rows_of(scenario.images);
  int64_t n = 0;
  for (const int64_t image_rows : rows) n += image_rows;
  constexpr int64_t kM = kS * 2 * kH;
  for_each_variant([&](const Variant& variant) {
    std::vector<int64_t> rows_of_rank(static_cast<size_t>(variant.t), 0);
    const auto holders = parallel::balanced_assignment(rows, variant.t);
    for (size_t image = 0; image < rows.size(); ++image)
      rows_of_rank[static_cast<size_t>(holders[image])] += rows[image];
    const int64_t gathered_rows =
        variant.column() ? n : variant.t * *std::max_element(rows_of_rank.begin(), rows_of_rank.end());
    for (const auto& [embedding, projector, with_features] : kTrainable) {
      SCOPED_TRACE(testing::Message() << "trainable: embedding " << embedding << ", projector " << projector
                                      << ", features " << with_features);
      auto layer = make_layer(variant, parameters, scenario.on_mismatch, true);
      layer.words().requires_grad_(embedding);
      layer.weight().requires_grad_(projector);
      layer.bias().requires_grad_(projector);
      const auto images = leaves_of(scenario.images, with_features);
      const bool any = embedding || projector || with_features;
      const bool gathers = !variant.fused();
      const bool sp = variant.sequence_parallel;

      const auto start = *layer.recorded.count;
      const auto output = layer.insert->forward(scenario.ids, images);
      const auto after_forward = *layer.recorded.count;
      EXPECT_TRUE(test_support::equal(output, layer.own_sequence(expected.output)));
      EXPECT_EQ(output.requires_grad(), any);
      if (any) layer.backward(output, loss_weights);
      const auto after_backward = *layer.recorded.count;

      EXPECT_EQ(text(after_forward - start), text(Expected(variant.t)
                                                      .add(sp, CollectiveKind::kReduceScatter, kM)
                                                      .add(!sp, CollectiveKind::kAllReduce, kM)
                                                      .add(gathers, CollectiveKind::kAllGather, gathered_rows * kH)
                                                      .count()));
      EXPECT_EQ(text(after_backward - after_forward),
                text(Expected(variant.t)
                         .add(sp && (gathers ? embedding : any), CollectiveKind::kAllGather, kM)
                         .add(sp && gathers && (projector || with_features), CollectiveKind::kReduceScatter,
                              gathered_rows * kH)
                         .add(variant.column() && with_features, CollectiveKind::kAllReduce, n * kC)
                         .count()));

      if (embedding) {
        EXPECT_TRUE(
            test_support::equal(layer.words().grad(), own_words(expected.words_gradient, layer.recorded.group)));
      } else {
        EXPECT_FALSE(layer.words().grad().defined());
      }
      if (projector) {
        expect_projector_gradient(layer.weight(), expected.weight_gradient, layer);
        expect_projector_gradient(layer.bias(), expected.bias_gradient, layer);
      } else {
        EXPECT_FALSE(layer.weight().grad().defined());
        EXPECT_FALSE(layer.bias().grad().defined());
      }
      if (with_features) {
        expect_feature_gradients(images, expected.feature_gradients, layer);
      } else {
        for (const auto& tensor : tensors_of(images)) EXPECT_FALSE(tensor.grad().defined());
      }
    }
  });
}

// The point of the fusion: an image costs what text costs.
TEST(ImageInsertEmbedding, FusedInsertSendsWhatTextAloneSends) {
  const Parameters parameters(1);
  const auto scenario = two_groups();
  const auto loss_weights = exact_values({kS, 2, kH}, 5);
  for_each_variant([&](const Variant& variant) {
    if (!variant.fused()) return;
    auto layer = make_layer(variant, parameters, scenario.on_mismatch, false);
    auto sent = [&](const std::vector<ImageForInsert>& images) {
      const auto start = *layer.recorded.count;
      const auto output = layer.insert->forward(scenario.ids, images);
      const auto after_forward = *layer.recorded.count;
      layer.backward(output, loss_weights);
      return text(after_forward - start) + "; " + text(*layer.recorded.count - after_forward);
    };
    const auto text_only = sent({});
    EXPECT_EQ(sent(leaves_of(scenario.images, false)), text_only);
    if (!variant.column()) {
      EXPECT_EQ(sent(leaves_of(scenario.images, true)), text_only);
    }
  });
}

namespace {

/// Of `images`, those that `rank` holds, as tensors of their own; `holders` of all images of all groups. A group of one
/// tensor stays one, perhaps of no image; a list has an entry an image, and where there is none a tensor [0, 1, C].
std::vector<ImageForInsert> held_by(int64_t rank, std::vector<ImageForInsert> images,
                                    const std::vector<int64_t>& holders, bool give_holders) {
  size_t image = 0;
  for (auto& group : images) {
    const auto blocks = blocks_of(group);
    std::vector<int64_t> rows;
    std::vector<int64_t> group_holders;
    std::vector<int64_t> own;
    std::vector<at::Tensor> own_blocks;
    for (size_t i = 0; i < blocks.size(); ++i, ++image) {
      rows.push_back(blocks[i].size(0));
      group_holders.push_back(holders[image]);
      if (holders[image] != rank) continue;
      own.push_back(static_cast<int64_t>(i));
      own_blocks.push_back(blocks[i]);
    }
    group.rows = at::tensor(rows, at::kLong);
    if (give_holders) group.holders = at::tensor(group_holders, at::kLong);
    if (const auto* tensor = std::get_if<at::Tensor>(&*group.image_features)) {
      group.image_features = tensor->index_select(0, at::tensor(own, at::kLong));
    } else if (own_blocks.empty()) {
      group.image_features = at::zeros({0, 1, kC});
    } else {
      group.image_features = own_blocks;
    }
  }
  return images;
}

}  // namespace

// As the vision tower leaves them: each rank has its own images, some ranks none. No rank may wait for another in vain,
// whatever is trained.
TEST(ImageInsertEmbedding, TakesImagesThatOnlyTheirHolderHas) {
  const Parameters parameters(1);
  for (const auto& scenario : {two_groups(), scenarios().front()}) {
    const auto loss_weights = exact_values({kS, scenario.ids.size(0), kH}, 5);
    const auto expected = dense(scenario, parameters, true, loss_weights);
    const auto rows = rows_of(scenario.images);
    for_each_variant([&](const Variant& variant) {
      if (variant.column()) return;
      const auto balanced = parallel::balanced_assignment(rows, variant.t);
      std::vector<int64_t> dealt;  // in turn, backwards
      for (size_t i = 0; i < rows.size(); ++i) dealt.push_back(variant.t - 1 - static_cast<int64_t>(i) % variant.t);
      const std::vector<int64_t> last(rows.size(), variant.t - 1);
      const std::vector<std::pair<bool, std::vector<int64_t>>> assignments{
          {false, {balanced.begin(), balanced.end()}}, {true, dealt}, {true, last}};
      for (const auto& [given, holders] : assignments) {
        for (const auto& [embedding, projector, with_features] : kTrainable) {
          SCOPED_TRACE(testing::Message()
                       << scenario.name << ", holders " << at::IntArrayRef(holders) << ", trainable: embedding "
                       << embedding << ", projector " << projector << ", features " << with_features);
          auto layer = make_layer(variant, parameters, scenario.on_mismatch, true);
          layer.words().requires_grad_(embedding);
          layer.weight().requires_grad_(projector);
          layer.bias().requires_grad_(projector);
          const int64_t rank = layer.recorded.group->getRank();
          const auto images = leaves_of(held_by(rank, scenario.images, holders, given), with_features);
          const auto output = layer.insert->forward(scenario.ids, images);
          EXPECT_TRUE(test_support::equal(output, layer.own_sequence(expected.output)));
          if (!(embedding || projector || with_features)) continue;
          layer.backward(output, loss_weights);
          if (embedding) {
            EXPECT_TRUE(
                test_support::equal(layer.words().grad(), own_words(expected.words_gradient, layer.recorded.group)));
          }
          if (projector) {
            expect_projector_gradient(layer.weight(), expected.weight_gradient, layer);
            expect_projector_gradient(layer.bias(), expected.bias_gradient, layer);
          }
          if (!with_features) continue;
          const auto leaves = tensors_of(images);
          const auto gradients = tensors_of(held_by(rank, expected.feature_gradients, holders, given));
          for (size_t i = 0; i < leaves.size(); ++i) EXPECT_TRUE(test_support::equal(leaves[i].grad(), gradients[i]));
        }
      }
    });
  }
}

// What made a rank's features (the tower) gets a gradient on every rank, zero where there was no image.
TEST(ImageInsertEmbedding, GivesGradientsToWhatMadeNoFeatures) {
  const Parameters parameters(1);
  const auto scenario = two_groups();
  const std::vector<int64_t> holders(rows_of(scenario.images).size(), 0);
  for_each_variant([&](const Variant& variant) {
    if (variant.column()) return;
    auto layer = make_layer(variant, parameters, scenario.on_mismatch, false);
    layer.words().requires_grad_(false);
    layer.weight().requires_grad_(false);
    const auto tower = on_device(at::ones({kC})).requires_grad_();
    const int64_t rank = layer.recorded.group->getRank();
    const auto images = changed(leaves_of(held_by(rank, scenario.images, holders, true), false),
                                [&](const at::Tensor& tensor) { return tensor * tower; });
    const auto output = layer.insert->forward(scenario.ids, images);
    layer.backward(output, exact_values({kS, 2, kH}, 5));
    EXPECT_TRUE(tower.grad().defined());
    EXPECT_EQ(gradient_of(tower).ne(0).any().item<bool>(), rank == 0);
  });
}

TEST(ImageInsertEmbedding, PlanMadeAheadChangesNothing) {
  Warnings warnings;
  const Parameters parameters(1);
  const Scenario cut{"more images than places",
                     make_ids(2, {{kImage, 1, 2}}),
                     {group_of(kImage, features(33, {4, 3}))},
                     MismatchPolicy::kTruncate};
  for (const auto& scenario : {two_groups(), cut}) {
    for_each_variant([&](const Variant& variant) {
      auto layer = make_layer(variant, parameters, scenario.on_mismatch, true);
      const auto positions = at::arange(kS, at::kLong).expand(scenario.ids.sizes());
      const auto plan = layer.insert->make_plan(scenario.ids, scenario.images);
      const auto start = *layer.recorded.count;
      const auto expected = layer.insert->forward(scenario.ids, scenario.images);
      const auto once = *layer.recorded.count - start;
      EXPECT_TRUE(test_support::equal(layer.insert->forward(scenario.ids, scenario.images, plan), expected));
      EXPECT_TRUE(test_support::equal(layer.insert->forward(scenario.ids, scenario.images, plan, positions), expected));
      EXPECT_TRUE(test_support::equal(layer.insert->forward(scenario.ids, scenario.images, positions), expected));
      EXPECT_EQ(layer.recorded.count->total() - start.total(), 4 * once.total());
    });
  }
}

TEST(ImageInsertEmbedding, TakesIdsAndFeaturesOfOtherDevicesAndTypes) {
  const Parameters parameters(1);
  const auto scenario = two_groups();
  const auto loss_weights = exact_values({kS, 2, kH}, 5);
  const auto expected = dense(scenario, parameters, false, loss_weights);
  for_each_variant([&](const Variant& variant) {
    auto layer = make_layer(variant, parameters, scenario.on_mismatch, false);
    const auto images = changed(
        scenario.images, [](const at::Tensor& tensor) { return tensor.to(at::kDouble).clone().requires_grad_(); });
    const auto output = layer.insert->forward(on_device(scenario.ids), images);
    EXPECT_EQ(output.scalar_type(), at::kFloat);
    EXPECT_TRUE(test_support::equal(output, layer.own_sequence(expected.output)));
    layer.backward(output, loss_weights);
    const auto gradients = changed(expected.feature_gradients, [](const at::Tensor& t) { return t.to(at::kDouble); });
    const auto leaves = tensors_of(images);
    for (size_t i = 0; i < leaves.size(); ++i) {
      const auto gradient = variant.column() ? leaves[i].grad() : on_device(leaves[i].grad());
      EXPECT_TRUE(
          test_support::equal(variant.column() ? gradient : parallel::all_reduce(gradient, groups(variant.t).tp),
                              tensors_of(gradients)[i]));
    }
  });
}

TEST(ImageInsertEmbedding, TwoOfThemShareALanguageEmbedding) {
  const Parameters parameters(1);
  const Parameters others(40);
  const auto scenario = two_groups();
  const auto loss_weights = exact_values({kS, 2, kH}, 5);
  const auto expected = dense(scenario, parameters, true, loss_weights);
  auto other_parameters = others;
  other_parameters.words = parameters.words;
  const auto other_expected = dense(scenario, other_parameters, true, loss_weights);
  for_each_variant([&](const Variant& variant) {
    auto layer = make_layer(variant, parameters, scenario.on_mismatch, true);
    auto second = layer;
    second.insert = make_insert(layer, others, layer.insert->options());
    const auto first_output = layer.insert->forward(scenario.ids, scenario.images);
    const auto second_output = second.insert->forward(scenario.ids, scenario.images);
    EXPECT_TRUE(test_support::equal(first_output, layer.own_sequence(expected.output)));
    EXPECT_TRUE(test_support::equal(second_output, layer.own_sequence(other_expected.output)));
    layer.backward(first_output, loss_weights);
    layer.backward(second_output, loss_weights);
    EXPECT_TRUE(
        test_support::equal(layer.words().grad(),
                            own_words(expected.words_gradient + other_expected.words_gradient, layer.recorded.group)));
    expect_projector_gradient(layer.weight(), expected.weight_gradient, layer);
    expect_projector_gradient(second.weight(), other_expected.weight_gradient, second);
  });
}

TEST(ImageInsertEmbedding, AccumulatesIntoExistingGradients) {
  const Parameters parameters(1);
  const auto scenario = two_groups();
  const auto loss_weights = exact_values({kS, 2, kH}, 5);
  const auto expected = dense(scenario, parameters, true, loss_weights);
  for_each_variant([&](const Variant& variant) {
    auto layer = make_layer(variant, parameters, scenario.on_mismatch, true, /*accumulate_into_grad=*/true);
    for (int pass = 0; pass < 2; ++pass) {
      const void* memory = pass == 0 ? nullptr : layer.weight().grad().data_ptr();
      layer.backward(layer.insert->forward(scenario.ids, scenario.images), loss_weights);
      if (pass == 1) {
        EXPECT_EQ(layer.weight().grad().data_ptr(), memory);
      }
    }
    expect_projector_gradient(layer.weight(), expected.weight_gradient * 2, layer);
    expect_projector_gradient(layer.bias(), expected.bias_gradient * 2, layer);
  });
}

TEST(ImageInsertEmbedding, OwnsItsProjectorAndNothingElse) {
  for_each_variant([&](const Variant& variant) {
    for (const bool bias : {false, true}) {
      auto layer = make_layer(variant, Parameters(1), MismatchPolicy::kError, bias);
      auto& insert = layer.insert;
      EXPECT_EQ(insert->parameters().size(), bias ? 2U : 1U);
      EXPECT_TRUE(insert->buffers().empty());
      EXPECT_EQ(insert->children().size(), 1U);
      EXPECT_EQ(insert->children().at(0), insert->align_projector);
      for (const auto& module : insert->modules()) {
        EXPECT_NE(module.get(), layer.embedding.get());
        EXPECT_NE(module.get(), layer.embedding->word_embeddings.get());
      }
      const int64_t rows = variant.column() ? kH / variant.t : kH;
      EXPECT_EQ(layer.weight().sizes(), (std::vector<int64_t>{rows, kC}));

      const auto shards = megatron::parameter_shards(*insert);
      ASSERT_EQ(shards.size(), bias ? 2U : 1U);
      const auto rule = variant.column() ? megatron::GradientRule::kSharded
                        : variant.t > 1  ? megatron::GradientRule::kReplicatedPartial
                                         : megatron::GradientRule::kReplicated;
      EXPECT_EQ(shards[0].name, "align_projector.weight");
      EXPECT_EQ(shards[0].segments.at(0).global_shape, (std::vector<int64_t>{kH, kC}));
      EXPECT_EQ(shards[0].rule, rule);
      EXPECT_NEAR(shards[0].initial_value.value, std::sqrt(2.0 / kC), 1e-12);
      if (!bias) continue;
      EXPECT_EQ(shards[1].name, "align_projector.bias");
      EXPECT_EQ(shards[1].rule, rule);
      EXPECT_EQ(shards[1].initial_value.value, 0.0);
    }
  });
}

TEST(ImageInsertEmbedding, HasTheReferencesConstructor) {
  const LanguageModelEmbedding embedding(VocabParallelEmbeddingOptions(kV, kH), groups(1).tp);
  EXPECT_EQ(ImageInsertEmbedding(embedding, kC, kH)->parameters().size(), 1U);
  const ImageInsertEmbedding with_bias(embedding, kC, kH, true);
  EXPECT_EQ(with_bias->parameters().size(), 2U);
  EXPECT_EQ(with_bias->options().projector_sharding(), ProjectorSharding::kColumn);
  EXPECT_EQ(with_bias->options().exchange(), InsertExchange::kFused);
  EXPECT_EQ(with_bias->options().on_mismatch(), MismatchPolicy::kError);
}

TEST(ImageInsertEmbedding, RefusesWhatDoesNotFitOnEveryRank) {
  const auto good = two_groups();
  const Parameters parameters(1);
  for_each_variant([&](const Variant& variant) {
    auto layer = make_layer(variant, parameters, MismatchPolicy::kError, false);
    auto& insert = layer.insert;
    auto refused = [&](const std::vector<ImageForInsert>& images, const std::string& part, const at::Tensor& ids = {}) {
      expect_refused([&] { insert->forward(ids.defined() ? ids : good.ids, images); }, part);
    };
    const auto one = make_ids(1, {{kImage, 0, 3}});

    auto without = good.images;
    without[1].image_features.reset();
    refused(without, "start token 18 has no image_features: the vision tower has to run first");
    refused({group_of(kImage, exact_values({kC}, 1))}, "[L, C] or [N, L, C], got [5]", one);
    refused({group_of(kImage, exact_values({1, 1, 3, kC}, 1))}, "[L, C] or [N, L, C], got [1, 1, 3, 5]", one);
    refused({group_of(kImage, std::vector<at::Tensor>{at::Tensor()})}, "got an undefined tensor", one);
    refused({group_of(kImage, exact_values({1, 3, kC + 1}, 1))},
            "image features of start token 18 have width 6, align_projector takes 5", one);
    refused({group_of(kImage, at::zeros({0, 3, kC + 1}))}, "have width 6, align_projector takes 5", make_ids(1, {}));
    refused({good.images[0]}, "3 images for 1 occurrences of start token 17: the last occurrence is in batch row 0",
            make_ids(1, {{kPatch, 0, 3}}));
    refused({group_of(kImage, features(1, {1, 2}))},
            "1 images for 2 occurrences of start token 18: the first without an image is in batch row 1 at position 6");
    refused({group_of(kImage, std::vector<at::Tensor>{})}, "0 images for 1 occurrences of start token 18", one);
    refused({group_of(kImage, features(1, {1, 2}))}, "1 images for 0 occurrences of start token 18", make_ids(1, {}));

    auto outside = good.ids.clone();
    outside[1][1] = kV;
    refused(good.images, "token id 19 at batch row 1, position 1 is outside the vocabulary [0, 19)", outside);
    refused({}, "token id 19 at batch row 1, position 1 is outside the vocabulary [0, 19)", outside);
    refused(good.images, "input_ids must be [B, S] int64, got [16]", good.ids[0]);
    refused(good.images, "input_ids must be [B, S] int64, got [2, 16] Int", good.ids.to(at::kInt));

    const auto plan = insert->make_plan(good.ids, good.images);
    auto refused_plan = [&](const at::Tensor& ids, const std::vector<ImageForInsert>& images, const std::string& part) {
      expect_refused([&] { insert->forward(ids, images, plan); }, part);
    };
    refused_plan(good.ids.narrow(1, 0, 8), good.images, "input_ids [2, 8] do not fit a plan for [2, 16]");
    refused_plan(good.ids.narrow(0, 0, 1), good.images, "input_ids [1, 16] do not fit a plan for [2, 16]");
    refused_plan(good.ids, {good.images[0]}, "3 images for a plan of 5");
    refused_plan(good.ids, {good.images[0], group_of(kImage, features(1, {2, 7}))},
                 "image 4 has 7 feature rows, the plan says 9");
    auto six = good.images;
    six.push_back(group_of(kImage, features(1, {1, 2})));
    refused_plan(good.ids, six, "6 images for a plan of 5");
    refused_plan(outside, good.images, "token id 19");

    auto local = held_by(layer.recorded.group->getRank(), good.images, std::vector<int64_t>(5, 0), true);
    if (variant.column()) {
      refused(local, "a column-sharded projector needs all of them on every rank");
    } else {
      auto wrong = local;
      wrong[0].holders = at::zeros({2}, at::kLong);
      refused(wrong, "2 holders for 3 images of start token 17");
      wrong[0].holders = at::full({3}, variant.t, at::kLong);
      refused(wrong, "is no rank of a group of " + std::to_string(variant.t));
      wrong[0].holders = at::full({3}, -1, at::kLong);
      refused(wrong, "holder -1 of an image of start token 17 is no rank");
      wrong = local;
      wrong[1].rows = wrong[1].rows.to(at::kInt);
      refused(wrong, "rows of start token 18 must be [N] int64 on the CPU, got [2] Int");
      // Every rank has an image too many, or one too few.
      wrong = good.images;
      for (auto& group : wrong) group.rows = at::tensor(rows_of({group}), at::kLong);
      wrong[1].image_features = std::vector<at::Tensor>{features(1, {7}), features(2, {9}), features(3, {1})};
      expect_refused([&] { insert->forward(good.ids, wrong); }, variant.t == 1 ? "more images than the 2" : "images");
      wrong[0].image_features = features(1, {0, 3});
      wrong[1].image_features = features(1, {0, 7});
      if (variant.t == 1) refused(wrong, "0 images of start token 17 where this rank holds 3");
    }

    if (variant.sequence_parallel && variant.t > 1) {
      const auto expected = "sequence length " + std::to_string(variant.t * 3 + 1) +
                            " is not divisible by tensor-parallel size " + std::to_string(variant.t);
      refused({group_of(kImage, features(1, {1, 1}))}, expected, one.narrow(1, 0, variant.t * 3 + 1));
      refused({}, expected, one.narrow(1, 0, variant.t * 3 + 1));
    }
    EXPECT_EQ(layer.recorded.count->total(), 0);
    // And it still works.
    EXPECT_TRUE(
        test_support::equal(insert->forward(good.ids, good.images),
                            layer.own_sequence(dense(good, parameters, false, exact_values({kS, 2, kH}, 5)).output)));
  });
}

TEST(ImageInsertEmbedding, RefusesSizesAtConstruction) {
  for (const int t : test_support::divisors_of_world()) {
    const LanguageModelEmbedding embedding(VocabParallelEmbeddingOptions(kV, 9), groups(t).tp);
    expect_refused([&] { ImageInsertEmbedding(embedding, kC, kH); }, "hidden_size 8 is not the language embedding's 9");
    if (t == 1) continue;
    expect_refused([&] { ImageInsertEmbedding(embedding, kC, 9); },
                   "hidden size 9 is not divisible by tensor-parallel size " + std::to_string(t));
  }
}

TEST(ImageInsertEmbedding, WarnsOnceOfACutOnRankZero) {
  const Parameters parameters(1);
  for_each_variant([&](const Variant& variant) {
    auto layer = make_layer(variant, parameters, MismatchPolicy::kTruncate, false);
    Warnings warnings;
    layer.insert->forward(make_ids(2, {{kImage, 1, 2}}), {group_of(kImage, features(33, {4, 3}))});
    if (layer.recorded.group->getRank() == 0) {
      EXPECT_EQ(warnings.texts,
                std::vector<std::string>{"4 images for 1 occurrences of start token 18: inserting the overlap"});
    } else {
      EXPECT_TRUE(warnings.texts.empty());
    }
  });
}

TEST(NormalizeFeatureList, IsOneBlockAnImage) {
  const auto tensor = features(1, {3, 2});
  const auto blocks = ImageInsertEmbeddingImpl::normalize_feature_list(tensor);
  ASSERT_EQ(blocks.size(), 3U);
  for (int64_t i = 0; i < 3; ++i) {
    EXPECT_TRUE(test_support::equal(blocks[static_cast<size_t>(i)], tensor[i]));
    EXPECT_TRUE(blocks[static_cast<size_t>(i)].is_alias_of(tensor));
  }
  const auto flat = features(2, {4});
  const auto mixed = ImageInsertEmbeddingImpl::normalize_feature_list(std::vector<at::Tensor>{flat, tensor});
  ASSERT_EQ(mixed.size(), 4U);
  EXPECT_TRUE(test_support::equal(mixed[0], flat));
  EXPECT_TRUE(test_support::equal(mixed[3], tensor[2]));
  EXPECT_TRUE(ImageInsertEmbeddingImpl::normalize_feature_list(features(1, {0, 2})).empty());
  EXPECT_TRUE(ImageInsertEmbeddingImpl::normalize_feature_list(std::vector<at::Tensor>{}).empty());
  for (const auto& shape : {std::vector<int64_t>{5}, std::vector<int64_t>{1, 1, 1, 5}}) {
    expect_refused([&] { ImageInsertEmbeddingImpl::normalize_feature_list(std::vector<at::Tensor>{at::zeros(shape)}); },
                   "[L, C] or [N, L, C], got");
    expect_refused([&] { ImageInsertEmbeddingImpl::normalize_feature_list(at::zeros(shape)); },
                   "[L, C] or [N, L, C], got");
  }
}

namespace {

/// insert_features of projected rows, written one by one.
at::Tensor painted(const at::Tensor& embeddings, const std::vector<at::Tensor>& blocks, const at::Tensor& ids,
                   int64_t flag) {
  auto result = embeddings.clone();
  size_t image = 0;
  for (int64_t b = 0; b < ids.size(0); ++b) {
    for (int64_t p = 0; p < ids.size(1); ++p) {
      if (ids[b][p].item<int64_t>() != flag || image == blocks.size()) continue;
      for (int64_t row = 0; row < blocks[image].size(0) && p + 1 + row < ids.size(1); ++row) {
        result[p + 1 + row][b].copy_(blocks[image][row]);
      }
      ++image;
    }
  }
  return result;
}

}  // namespace

TEST(InsertFeatures, EqualsThePainterAndLeavesTheInputAlone) {
  Warnings warnings;
  for (int64_t seed = 0; seed < 40; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    const int64_t B = 1 + seed % 3;
    const int64_t S = 5 + seed % 7;
    const auto ids = (exact_values({B, S}, seed) * 8).to(at::kLong).remainder(5);
    const auto embeddings = exact_values({S, B, kH}, seed + 1);
    std::vector<at::Tensor> blocks;
    const int64_t images = ids.eq(2).sum().item<int64_t>() + seed % 2;
    for (int64_t i = 0; i < images; ++i) blocks.push_back(exact_values({(seed + i) % 4, kH}, 100 * seed + i));
    const auto input = on_device(embeddings).clone();
    const auto output = ImageInsertEmbeddingImpl::insert_features(input, blocks, ids, 2);
    EXPECT_TRUE(test_support::equal(output, painted(embeddings, blocks, ids, 2)));
    EXPECT_TRUE(test_support::equal(input, embeddings));
  }
}

TEST(InsertFeatures, PassesGradientsByRow) {
  const auto ids = make_ids(2, {{kImage, 0, 3}, {kImage, 1, 14}, {kImage, 0, 5}});
  const auto loss_weights = exact_values({kS, 2, kH}, 3);
  auto gradients = [&](bool through_painter) {
    const auto embeddings = on_device(exact_values({kS, 2, kH}, 1)).requires_grad_();
    const auto images = on_device(exact_values({3, 4, kH}, 2)).requires_grad_();
    const auto output = through_painter ? painted(embeddings, {images[0], images[1], images[2]}, ids, kImage)
                                        : ImageInsertEmbeddingImpl::insert_features(embeddings, images, ids, kImage);
    (output * on_device(loss_weights)).sum().backward();
    return std::array<at::Tensor, 2>{embeddings.grad(), images.grad()};
  };
  const auto actual = gradients(false);
  const auto expected = gradients(true);
  EXPECT_TRUE(test_support::equal(actual[0], expected[0]));
  EXPECT_TRUE(test_support::equal(actual[1], expected[1]));
}

TEST(InsertFeatures, ReturnsItsInputIfThereIsNothingToInsert) {
  Warnings warnings;
  const auto embeddings = on_device(exact_values({kS, 2, kH}, 1));
  const auto images = exact_values({2, 3, kH}, 2);
  const auto with_flags = make_ids(2, {{kImage, 0, 3}, {kImage, 1, 4}});
  const auto insert = &ImageInsertEmbeddingImpl::insert_features;
  EXPECT_TRUE(insert(embeddings, images, make_ids(2, {}), kImage).is_same(embeddings));
  EXPECT_TRUE(insert(embeddings, std::vector<at::Tensor>{}, with_flags, kImage).is_same(embeddings));
  EXPECT_TRUE(insert(embeddings, at::zeros({0, 3, kH}), with_flags, kImage).is_same(embeddings));
  EXPECT_TRUE(warnings.texts.empty());
  EXPECT_FALSE(insert(embeddings, images, with_flags, kImage).is_same(embeddings));
}

TEST(InsertFeatures, WarnsOfCountsThatDiffer) {
  Warnings warnings;
  const auto ids = make_ids(2, {{kImage, 0, 3}, {kImage, 1, 4}});
  ImageInsertEmbeddingImpl::insert_features(exact_values({kS, 2, kH}, 1), exact_values({3, 2, kH}, 2), ids, kImage);
  EXPECT_EQ(warnings.texts,
            std::vector<std::string>{"3 images for 2 occurrences of start token 18: inserting the overlap"});
}

TEST(InsertFeatures, RefusesShapesThatDoNotFit) {
  const auto ids = make_ids(2, {{kImage, 0, 3}});
  const auto insert = &ImageInsertEmbeddingImpl::insert_features;
  expect_refused(
      [&] {
        insert(at::zeros({2, kS, kH}), at::zeros({1, 2, kH}), ids, kImage);
      },
      "embeddings [2, 16, 8] are not the [S, B, H] of input_ids [2, 16]");
  expect_refused([&] { insert(at::zeros({kS, 2, kH}), at::zeros({kH}), ids, kImage); }, "[L, C] or [N, L, C], got [8]");
  expect_refused([&] { insert(at::zeros({kS, 2, kH}), at::zeros({1, 2, kH}), ids.to(at::kInt), kImage); }, "input_ids");
}
