#include "tests/step37/image_insert_world.h"

#include <ATen/ATen.h>

#include <utility>

#include "parallel/collectives.h"
#include "parallel/shard.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::insert_world {
namespace {

using step37::FeatureList;
using step37::ImageForInsert;
using step37::ImageInsertEmbedding;
using step37::ImageInsertEmbeddingOptions;
using step37::InsertExchange;
using step37::MismatchPolicy;
using step37::ProjectorSharding;
using namespace test_support;

void assign(const at::Tensor& parameter, const at::Tensor& value) {
  const at::NoGradGuard no_grad;
  parameter.copy_(value);
}

/// Of `images`, those that `rank` holds, as tensors of their own. A group of one tensor stays one, perhaps of no image;
/// a list has an entry an image, and where there is none a tensor [0, 1, C], so that the rank takes part in backward.
std::vector<ImageForInsert> held_by(int64_t rank, std::vector<ImageForInsert> images, const Placed& placed, int64_t C) {
  size_t image = 0;
  for (auto& group : images) {
    const auto blocks = blocks_of(group);
    std::vector<int64_t> rows;
    std::vector<int64_t> group_holders;
    std::vector<int64_t> own;
    std::vector<at::Tensor> own_blocks;
    for (size_t i = 0; i < blocks.size(); ++i, ++image) {
      rows.push_back(blocks[i].size(0));
      group_holders.push_back(placed.holders[image]);
      if (placed.holders[image] != rank) continue;
      own.push_back(static_cast<int64_t>(i));
      own_blocks.push_back(blocks[i]);
    }
    group.held = step37::HeldImages{at::tensor(rows, at::kLong), {}};
    if (placed.give_holders) group.held->holders = at::tensor(group_holders, at::kLong);
    if (const auto* tensor = std::get_if<at::Tensor>(&*group.image_features)) {
      group.image_features = tensor->index_select(0, at::tensor(own, at::kLong).to(tensor->device()));
    } else if (own_blocks.empty()) {
      group.image_features = at::zeros({0, 1, C});
    } else {
      group.image_features = own_blocks;
    }
  }
  return images;
}

}  // namespace

// ---- What is inserted where ----

at::Tensor make_ids(int64_t B, const std::vector<Place>& places, int64_t S) {
  auto ids = (at::arange(B * S, at::kLong) * 7).remainder(17).view({B, S});
  for (const auto& place : places) ids[place.batch][place.position] = place.token;
  return ids;
}

at::Tensor features(int64_t seed, std::vector<int64_t> shape, int64_t C) {
  shape.push_back(C);
  return exact_values(shape, seed);
}

ImageForInsert group_of(int64_t token, FeatureList list) {
  ImageForInsert group;
  group.insert_start_token = token;
  group.image_features = std::move(list);
  return group;
}

Scenario two_groups() {
  const auto ids = make_ids(2, {{kPatch, 0, 0}, {kPatch, 0, 5}, {kPatch, 1, 2}, {kImage, 0, 10}, {kImage, 1, 7}});
  return {"two groups",
          ids,
          {group_of(kPatch, features(10, {3, 3})),
           group_of(kImage, std::vector<at::Tensor>{features(11, {1, 11}), features(12, {9})})}};
}

Scenario overlaps() {
  return {"overlaps, an overrun and a token at the end",
          make_ids(2, {{kImage, 0, 1}, {kImage, 0, 4}, {kImage, 1, 19}, {kImage, 1, 23}}),
          {group_of(kImage, features(23, {4, 6}))}};
}

/// Borders of shards are at 12 for t = 2, at 8 and 16 for t = 3, at 6, 12 and 18 for t = 4.
std::vector<Scenario> scenarios() {
  using List = std::vector<at::Tensor>;
  const auto truncate = MismatchPolicy::kTruncate;
  return {
      {"across borders", make_ids(1, {{kImage, 0, 2}}), {group_of(kImage, features(20, {1, 17}))}},
      {"whole shards", make_ids(1, {{kImage, 0, 5}}), {group_of(kImage, features(21, {1, 18}))}},
      {"adjacent images", make_ids(1, {{kImage, 0, 0}, {kImage, 0, 6}}), {group_of(kImage, features(22, {2, 6}))}},
      overlaps(),
      {"lists of one and of several images",
       make_ids(3, {{kImage, 0, 9}, {kImage, 2, 0}, {kImage, 2, 10}}),
       {group_of(kImage, List{features(24, {3}), features(25, {2, 7})})}},
      two_groups(),
      {"a later group over an earlier one",
       make_ids(1, {{kPatch, 0, 3}, {kPatch, 0, 15}, {kImage, 0, 1}}),
       {group_of(kPatch, features(26, {2, 3})), group_of(kImage, features(27, {1, 16}))}},
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

Parameters::Parameters(int64_t seed, const Sizes& sizes)
    : words(exact_values({sizes.V, sizes.H}, seed)),
      weight(exact_values({sizes.H, sizes.C}, seed + 1)),
      bias(exact_values({sizes.H}, seed + 2)) {}

at::Tensor gradient_of(const at::Tensor& tensor) {
  return tensor.grad().defined() ? tensor.grad() : at::zeros_like(tensor);
}

Results dense(const Scenario& scenario, const Parameters& parameters, bool with_bias, const at::Tensor& loss_weights) {
  const auto words = parameters.words.clone().requires_grad_();
  const auto weight = parameters.weight.clone().requires_grad_();
  const auto bias = parameters.bias.clone().requires_grad_();
  const auto images =
      changed(scenario.images, [](const at::Tensor& tensor) { return tensor.clone().requires_grad_(); });
  const int64_t B = scenario.ids.size(0);
  const int64_t S = scenario.ids.size(1);
  const auto embedded = at::embedding(words, scenario.ids.t());
  for (const auto& group : images) {
    const auto blocks = blocks_of(group);
    size_t image = 0;
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t p = 0; p < S; ++p) {
        if (scenario.ids[b][p].item<int64_t>() != group.insert_start_token || image == blocks.size()) continue;
        const auto projected = at::linear(blocks[image], weight, with_bias ? bias : at::Tensor());
        for (int64_t row = 0; row < projected.size(0) && p + 1 + row < S; ++row) {
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

std::string Variant::name() const {
  return "t " + std::to_string(t) + (hidden() ? ", hidden" : ", vocabulary") +
         (column() ? ", column"
          : row()  ? ", row"
                   : ", replicated") +
         (fused() ? ", fused" : ", all-gather") + (sequence_parallel ? ", sequence-parallel" : "");
}

std::vector<Variant> variants(int t) {
  std::vector<Variant> result;
  for (const auto embedding : {Part::kSummand, Part::kColumns}) {
    for (const auto sharding : {ProjectorSharding::kColumn, ProjectorSharding::kRow, ProjectorSharding::kReplicated}) {
      for (const auto exchange : {InsertExchange::kFused, InsertExchange::kAllGather}) {
        for (const bool sequence_parallel : {false, true}) {
          const Variant variant{t, embedding, sharding, exchange, sequence_parallel};
          if (variant.hidden() && (variant.row() || !variant.fused())) continue;
          result.push_back(variant);
        }
      }
    }
  }
  return result;
}

void for_each_variant(const std::function<void(const Variant&)>& action) {
  for (const int t : test_support::divisors_of_world()) {
    for (const auto& variant : variants(t)) {
      SCOPED_TRACE(variant.name());
      action(variant);
    }
  }
}

std::string Trainable::name() const {
  return std::string("trainable:") + (embedding ? " embedding" : "") + (projector ? " projector" : "") +
         (features ? " features" : "");
}

std::string name_of(Placement placement) {
  switch (placement) {
    case Placement::kEverywhere:
      return "features everywhere";
    case Placement::kSliced:
      return "features sliced";
    case Placement::kOnHolders:
      return "features on holders";
  }
  TORCH_INTERNAL_ASSERT(false);
}

Placed on_balanced_holders(const std::vector<ImageForInsert>& images, int t) {
  const auto holders = parallel::balanced_assignment(rows_of(images), t);
  return {Placement::kOnHolders, {holders.begin(), holders.end()}, false};
}

std::vector<Placed> placements(const Variant& variant, const std::vector<ImageForInsert>& images) {
  // The first image on the last rank and so on: neither balanced nor even.
  std::vector<int64_t> dealt;
  for (size_t i = 0; i < rows_of(images).size(); ++i) {
    dealt.push_back(variant.t - 1 - static_cast<int64_t>(i) % variant.t);
  }
  std::vector<Placed> result{{Placement::kEverywhere, on_balanced_holders(images, variant.t).holders, false},
                             {Placement::kOnHolders, dealt, true}};
  if (variant.row()) result.push_back({Placement::kSliced, result.front().holders, false});
  return result;
}

int64_t Layer::rank() const { return recorded.group->getRank(); }
at::Tensor Layer::words() const { return embedding->word_embeddings->weight; }
at::Tensor Layer::weight() const { return insert->named_parameters()["align_projector.weight"]; }
at::Tensor Layer::bias() const {
  const auto parameters = insert->named_parameters();
  const auto* bias = parameters.find("align_projector.bias");
  return bias != nullptr ? *bias : at::Tensor();
}

at::Tensor Layer::own_sequence(const at::Tensor& whole) const {
  return variant.sequence_parallel ? part(whole, 0, recorded.group) : whole;
}

at::Tensor Layer::own_words(const at::Tensor& whole) const {
  if (variant.hidden()) return part(whole, 1, recorded.group);
  const int64_t padding = (variant.t - sizes.V % variant.t) % variant.t;
  return part(at::constant_pad_nd(whole, {0, 0, 0, padding}), 0, recorded.group);
}

at::Tensor Layer::own_weight(const at::Tensor& whole) const {
  return variant.replicated() ? whole : part(whole, variant.column() ? 0 : 1, recorded.group);
}

at::Tensor Layer::own_bias(const at::Tensor& whole) const {
  return variant.column() ? part(whole, 0, recorded.group) : whole;
}

std::vector<ImageForInsert> Layer::own_images(const std::vector<ImageForInsert>& images, const Placed& placed) const {
  switch (placed.placement) {
    case Placement::kEverywhere:
      return images;
    case Placement::kSliced:
      return changed(images, [&](const at::Tensor& tensor) { return part(tensor, tensor.dim() - 1, recorded.group); });
    case Placement::kOnHolders:
      return held_by(rank(), images, placed, sizes.C);
  }
  TORCH_INTERNAL_ASSERT(false);
}

std::vector<ImageForInsert> Layer::leaves(const std::vector<ImageForInsert>& images, const Placed& placed,
                                          bool trainable) const {
  return changed(own_images(images, placed), [&](const at::Tensor& tensor) {
    return on_device(tensor).clone(at::MemoryFormat::Contiguous).requires_grad_(trainable);
  });
}

void Layer::set_trainable(const Trainable& trainable) const {
  words().requires_grad_(trainable.embedding);
  for (auto& parameter : insert->parameters()) parameter.requires_grad_(trainable.projector);
}

void Layer::backward(const at::Tensor& output, const at::Tensor& loss_weights) const {
  (output * on_device(own_sequence(loss_weights))).sum().backward();
}

ImageInsertEmbedding make_insert(const Layer& layer, const Parameters& parameters,
                                 const ImageInsertEmbeddingOptions& options) {
  ImageInsertEmbedding insert(layer.embedding, options);
  insert->to(test_support::device());
  auto named = insert->named_parameters();
  assign(named["align_projector.weight"], layer.own_weight(parameters.weight));
  if (options.projector_bias()) assign(named["align_projector.bias"], layer.own_bias(parameters.bias));
  return insert;
}

Layer make_layer(const Variant& variant, const Parameters& parameters, const LayerOptions& options) {
  Layer layer{variant, parameters.sizes(), parallel::record(test_support::groups(variant.t).tp)};
  const auto& [V, H, C] = layer.sizes;
  layer.embedding = LanguageModelEmbedding(ParallelEmbeddingOptions(V, H)
                                               .sequence_parallel(variant.sequence_parallel)
                                               .accumulate_into_grad(options.words_accumulate_into_grad),
                                           layer.recorded.group,
                                           variant.hidden() ? EmbeddingSharding::kHidden : EmbeddingSharding::kVocab);
  layer.embedding->to(test_support::device());
  assign(layer.words(), layer.own_words(parameters.words));
  layer.insert = make_insert(layer, parameters,
                             ImageInsertEmbeddingOptions(C, H)
                                 .projector_bias(options.bias)
                                 .projector_sharding(variant.sharding)
                                 .exchange(variant.exchange)
                                 .on_mismatch(options.on_mismatch)
                                 .accumulate_into_grad(options.accumulate_into_grad)
                                 .checked(options.checked));
  return layer;
}

testing::AssertionResult projector_gradient_is(const Layer& layer, const at::Tensor& parameter,
                                               const at::Tensor& whole) {
  const auto& tp = test_support::groups(layer.variant.t).tp;
  // Every rank reaches the sum, whatever it has.
  const auto complete =
      layer.variant.replicated() ? parallel::all_reduce(gradient_of(parameter), tp) : gradient_of(parameter);
  if (!parameter.grad().defined()) return testing::AssertionFailure() << "the projector has no gradient";
  return test_support::equal(complete, whole.dim() == 2 ? layer.own_weight(whole) : layer.own_bias(whole));
}

testing::AssertionResult feature_gradients_are(const Layer& layer, const std::vector<ImageForInsert>& passed,
                                               const std::vector<ImageForInsert>& whole, const Placed& placed) {
  const bool summed = layer.variant.replicated() && placed.placement == Placement::kEverywhere;
  const auto& tp = test_support::groups(layer.variant.t).tp;
  const auto actual = tensors_of(passed);
  const auto expected = tensors_of(layer.own_images(whole, placed));
  auto result = testing::AssertionSuccess();
  for (size_t i = 0; i < actual.size(); ++i) {
    const auto complete = summed ? parallel::all_reduce(gradient_of(actual[i]), tp) : gradient_of(actual[i]);
    const auto equal = test_support::equal(complete, expected[i]);
    if (!actual[i].grad().defined()) {
      result = testing::AssertionFailure() << "feature tensor " << i << " has no gradient";
    } else if (!equal) {
      result = testing::AssertionFailure() << "the gradient of feature tensor " << i << " is " << equal.message();
    }
  }
  return result;
}

testing::AssertionResult gradients_are(const Layer& layer, const std::vector<ImageForInsert>& passed,
                                       const Results& expected, const Trainable& trainable, const Placed& placed) {
  std::string problems;
  const auto note = [&](const std::string& what, const testing::AssertionResult& result) {
    if (!result) problems += what + ": " + result.message() + "; ";
  };
  const auto none = [&](const at::Tensor& tensor) {
    return tensor.grad().defined() ? testing::AssertionFailure() << "is frozen and has a gradient"
                                   : testing::AssertionSuccess();
  };
  note("words", trainable.embedding
                    ? test_support::equal(layer.words().grad(), layer.own_words(expected.words_gradient))
                    : none(layer.words()));
  note("weight", trainable.projector ? projector_gradient_is(layer, layer.weight(), expected.weight_gradient)
                                     : none(layer.weight()));
  if (const auto bias = layer.bias(); bias.defined()) {
    note("bias", trainable.projector ? projector_gradient_is(layer, bias, expected.bias_gradient) : none(bias));
  }
  if (trainable.features) {
    note("features", feature_gradients_are(layer, passed, expected.feature_gradients, placed));
  } else {
    for (const auto& tensor : tensors_of(passed)) note("features", none(tensor));
  }
  return problems.empty() ? testing::AssertionSuccess() : testing::AssertionFailure() << problems;
}

}  // namespace megatron_cpp::insert_world
