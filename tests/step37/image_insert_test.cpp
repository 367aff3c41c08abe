// ImageInsertEmbedding's values and refusals, against a dense embedding and projector of one process; the data are
// exact, so the comparisons are of bits.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "megatron_cpp/tensor_parallel/language_model_embedding.h"
#include "megatron_cpp/tensor_parallel/vocab_parallel_embedding.h"
#include "parallel/collectives.h"
#include "step37/insert/image_insert_embedding.h"
#include "tests/step37/image_insert_world.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::step37 {
namespace {

using namespace insert_world;
using namespace test_support;

/// Placements other than everywhere that a variant takes: sliced by channel, and on single ranks as balanced, dealt in
/// turn backwards, or all on the last.
std::vector<Placed> partial_placements(const Variant& variant, const std::vector<ImageForInsert>& images) {
  const auto images_in_all = rows_of(images).size();
  std::vector<int64_t> dealt;
  for (size_t i = 0; i < images_in_all; ++i) dealt.push_back(variant.t - 1 - static_cast<int64_t>(i) % variant.t);
  const std::vector<int64_t> last(images_in_all, variant.t - 1);
  std::vector<Placed> result{insert_world::on_balanced_holders(images, variant.t),
                             {Placement::kOnHolders, dealt, true},
                             {Placement::kOnHolders, last, true}};
  if (variant.row()) result.push_back({Placement::kSliced, {}, false});
  return result;
}

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
        const auto layer = make_layer(variant, parameters, {.on_mismatch = scenario.on_mismatch, .bias = bias});
        const auto images = layer.leaves(scenario.images);
        const auto output = layer.forward(scenario.ids, images);
        EXPECT_TRUE(test_support::equal(output, layer.own_sequence(expected.output)));
        layer.backward(output, loss_weights);
        if (!scenario.images.empty()) {
          EXPECT_TRUE(gradients_are(layer, images, expected, {}));
          return;
        }
        EXPECT_TRUE(test_support::equal(layer.words().grad(), layer.own_words(expected.words_gradient)));
        EXPECT_FALSE(layer.weight().grad().defined());
      });
    }
  }
}

// The user's own projector, alike on every rank; its gradients are parts, which the ranks add.
TEST(ImageInsertEmbedding, TakesRowsThatAreProjectedAlready) {
  const Parameters parameters(1);
  const auto scenario = two_groups();
  const auto loss_weights = exact_values({kS, 2, kH}, 5);
  const auto expected = dense(scenario, parameters, true, loss_weights);
  for_each_variant([&](const Variant& variant) {
    if (!variant.replicated()) return;
    const auto layer = make_layer(variant, parameters);
    ImageInsertEmbedding insert(
        layer.embedding,
        ImageInsertEmbeddingOptions(kH, kH).projector_sharding(ProjectorSharding::kNone).exchange(variant.exchange));
    EXPECT_TRUE(parameter_shards(*insert).empty());
    const auto weight = on_device(parameters.weight).clone().requires_grad_();
    const auto bias = on_device(parameters.bias).clone().requires_grad_();
    const auto projected =
        changed(scenario.images, [&](const at::Tensor& tensor) { return at::linear(on_device(tensor), weight, bias); });
    const auto output = insert->forward(scenario.ids, projected);
    EXPECT_TRUE(test_support::equal(output, layer.own_sequence(expected.output)));
    layer.backward(output, loss_weights);
    EXPECT_TRUE(test_support::equal(layer.words().grad(), layer.own_words(expected.words_gradient)));
    const auto& tp = groups(variant.t).tp;
    EXPECT_TRUE(test_support::equal(parallel::all_reduce(weight.grad(), tp), expected.weight_gradient));
    EXPECT_TRUE(test_support::equal(parallel::all_reduce(bias.grad(), tp), expected.bias_gradient));
  });
}

TEST(ImageInsertEmbedding, TakesPlaceholdersInsteadOfStartTokens) {
  const Parameters parameters(1);
  const auto ids = make_ids(2, {{kImage, 0, 3}, {kImage, 0, 4}, {kImage, 0, 5}, {kImage, 0, 23}, {kImage, 1, 0}});
  const auto rows = features(1, {5});
  const auto loss_weights = exact_values({kS, 2, kH}, 5);
  const auto words = parameters.words.clone().requires_grad_();
  const auto weight = parameters.weight.clone().requires_grad_();
  // In the order of ids [B, S]; the output is [S, B, H].
  const auto places = ids.eq(kImage).view(-1).nonzero().view(-1);
  const auto dense = at::embedding(words, ids)
                         .view({-1, kH})
                         .index_copy(0, places, at::linear(rows, weight))
                         .view({2, kS, kH})
                         .transpose(0, 1);
  (dense * loss_weights).sum().backward();
  for_each_variant([&](const Variant& variant) {
    const auto layer = make_layer(variant, parameters, {.bias = false});
    ImageForInsert images{.image_features =
                              std::vector<at::Tensor>{on_device(rows.slice(0, 0, 2)), on_device(rows.slice(0, 2, 5))}};
    const auto plan = InsertPlan::from_placeholders({ids.const_data_ptr<int64_t>(), static_cast<size_t>(ids.numel())},
                                                    2, kS, kImage, {2, 3});
    const auto output = layer.forward(ids, {images}, plan);
    EXPECT_TRUE(test_support::equal(output, layer.own_sequence(dense)));
    layer.backward(output, loss_weights);
    EXPECT_TRUE(test_support::equal(layer.words().grad(), layer.own_words(words.grad())));
    EXPECT_TRUE(insert_world::projector_gradient_is(layer, layer.weight(), weight.grad()));
  });
}

namespace {

/// An embedding that looks at the whole gradient it gets.
struct Watched : VocabParallelEmbeddingImpl {
  using VocabParallelEmbeddingImpl::VocabParallelEmbeddingImpl;
  at::Tensor partial(const at::Tensor& ids, const at::Tensor& left_out) override {
    auto result = VocabParallelEmbeddingImpl::partial(ids, left_out);
    result.register_hook([this](const at::Tensor& gradient) { is_finite = gradient.isfinite().all().item<bool>(); });
    return result;
  }
  bool is_finite = false;
};

}  // namespace

// Also where the rows of text alone travel: what is in memory that nobody wrote would be anything.
TEST(ImageInsertEmbedding, GivesTheEmbeddingAFiniteGradient) {
  const auto scenario = two_groups();
  for (const int t : test_support::divisors_of_world()) {
    for (const bool projector_trains : {false, true}) {
      const auto& tp = groups(t).tp;
      const auto words = std::make_shared<Watched>(ParallelEmbeddingOptions(kV, kH).sequence_parallel(true), tp);
      words->to(test_support::device());
      ImageInsertEmbedding insert(LanguageModelEmbedding(words), ImageInsertEmbeddingOptions(kC, kH));
      insert->to(test_support::device());
      insert->align_projector->weight.requires_grad_(projector_trains);
      const auto output = insert->forward(scenario.ids, scenario.images);
      // The memory that a buffer of this size gets next holds NaN.
      for (int i = 0; i < 8; ++i) at::full({kS, 2, kH}, std::nan(""), output.options().requires_grad(false));
      output.sum().backward();
      EXPECT_TRUE(words->is_finite);
    }
  }
}

// Only what is split has to be divisible: H by the column sharding and the hidden-parallel embedding, C by the row
// sharding.
TEST(ImageInsertEmbedding, TakesOddSizesWhereNothingIsSplit) {
  const auto ids = make_ids(2, {{kImage, 0, 5}, {kImage, 1, 9}});
  for_each_variant([&](const Variant& variant) {
    const bool odd_H = !variant.column() && !variant.hidden();
    const Parameters parameters(1, {.H = odd_H ? 9 : kH, .C = variant.row() ? kC : 5});
    const auto& [V, H, C] = parameters.sizes();
    const Scenario scenario{"odd sizes", ids, {group_of(kImage, features(1, {2, 8}, C))}};
    const auto loss_weights = exact_values({kS, 2, H}, 5);
    const auto expected = dense(scenario, parameters, true, loss_weights);
    const auto layer = make_layer(variant, parameters);
    const auto images = layer.leaves(scenario.images);
    const auto output = layer.forward(scenario.ids, images);
    EXPECT_TRUE(test_support::equal(output, layer.own_sequence(expected.output)));
    layer.backward(output, loss_weights);
    EXPECT_TRUE(gradients_are(layer, images, expected, {}));
  });
}

// A tower of convolutions leaves channels before positions.
TEST(ImageInsertEmbedding, TakesFeaturesOfAnyStrides) {
  const Parameters parameters(1);
  const Scenario one_image{"one image", make_ids(1, {{kImage, 0, 5}}), {group_of(kImage, features(1, {1, 8}))}};
  for (const auto& scenario : {one_image, two_groups()}) {
    const auto loss_weights = exact_values({kS, scenario.ids.size(0), kH}, 5);
    const auto expected = dense(scenario, parameters, true, loss_weights);
    for_each_variant([&](const Variant& variant) {
      for (const auto& trainable : kTrainable) {
        if (!trainable.any()) continue;
        SCOPED_TRACE(testing::Message() << scenario.name << ", " << trainable.name());
        const auto layer = make_layer(variant, parameters);
        layer.set_trainable(trainable);
        const auto images = layer.leaves(scenario.images, {}, trainable.features);
        const auto channels_first = changed(
            images, [](const at::Tensor& tensor) { return tensor.transpose(-1, -2).contiguous().transpose(-1, -2); });
        const auto output = layer.forward(scenario.ids, channels_first);
        EXPECT_TRUE(test_support::equal(output, layer.own_sequence(expected.output)));
        layer.backward(output, loss_weights);
        EXPECT_TRUE(gradients_are(layer, images, expected, trainable));
      }
    });
  }
}

// As the vision tower leaves them: each rank has its own images, some ranks none, or its own channels. No rank may wait
// for another in vain, whatever is trained.
TEST(ImageInsertEmbedding, TakesFeaturesThatAreNotOnEveryRank) {
  const Parameters parameters(1);
  for (const auto& scenario : {two_groups(), scenarios().front()}) {
    const auto loss_weights = exact_values({kS, scenario.ids.size(0), kH}, 5);
    const auto expected = dense(scenario, parameters, true, loss_weights);
    for_each_variant([&](const Variant& variant) {
      for (const auto& placed : partial_placements(variant, scenario.images)) {
        for (const auto& trainable : kTrainable) {
          SCOPED_TRACE(testing::Message() << scenario.name << ", holders " << at::IntArrayRef(placed.holders)
                                          << ", given " << placed.give_holders << ", " << trainable.name());
          const auto layer = make_layer(variant, parameters);
          layer.set_trainable(trainable);
          const auto images = layer.leaves(scenario.images, placed, trainable.features);
          const auto output = layer.forward(scenario.ids, images);
          EXPECT_TRUE(test_support::equal(output, layer.own_sequence(expected.output)));
          EXPECT_EQ(output.requires_grad(), trainable.any());
          if (trainable.any()) layer.backward(output, loss_weights);
          EXPECT_TRUE(gradients_are(layer, images, expected, trainable, placed));
        }
      }
    });
  }
}

// What made a rank's features (the tower) gets a gradient on every rank, zero where there was no image.
TEST(ImageInsertEmbedding, GivesGradientsToWhatMadeNoFeatures) {
  const Parameters parameters(1);
  const auto scenario = two_groups();
  const Placed on_first{Placement::kOnHolders, std::vector<int64_t>(rows_of(scenario.images).size(), 0), true};
  for_each_variant([&](const Variant& variant) {
    const auto layer = make_layer(variant, parameters);
    layer.set_trainable({.embedding = false, .projector = false});
    const auto tower = on_device(at::ones({kC})).requires_grad_();
    const auto images = changed(layer.leaves(scenario.images, on_first, false),
                                [&](const at::Tensor& tensor) { return tensor * tower; });
    const auto output = layer.forward(scenario.ids, images);
    layer.backward(output, exact_values({kS, 2, kH}, 5));
    EXPECT_TRUE(tower.grad().defined());
    EXPECT_EQ(insert_world::gradient_of(tower).ne(0).any().item<bool>(), layer.rank() == 0);
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
      const auto layer = make_layer(variant, parameters, {.on_mismatch = scenario.on_mismatch});
      const auto positions = at::arange(kS, at::kLong).expand(scenario.ids.sizes());
      const auto plan = layer.insert->make_plan(scenario.ids, scenario.images);
      const auto start = *layer.recorded.count;
      const auto expected = layer.forward(scenario.ids, scenario.images);
      const auto once = *layer.recorded.count - start;
      EXPECT_TRUE(test_support::equal(layer.forward(scenario.ids, scenario.images, plan), expected));
      EXPECT_TRUE(test_support::equal(layer.forward(scenario.ids, scenario.images, plan, positions), expected));
      EXPECT_TRUE(test_support::equal(layer.forward(scenario.ids, scenario.images, positions), expected));
      EXPECT_EQ(layer.recorded.count->total() - start.total(), 4 * once.total());
    });
  }
}

TEST(ImageInsertEmbedding, TakesIdsAndFeaturesOfOtherDevicesAndTypes) {
  const Parameters parameters(1);
  const auto scenario = two_groups();
  const auto loss_weights = exact_values({kS, 2, kH}, 5);
  const auto expected = dense(scenario, parameters, false, loss_weights);
  const auto to_double = [](const at::Tensor& tensor) { return tensor.to(at::kDouble); };
  for_each_variant([&](const Variant& variant) {
    const auto layer = make_layer(variant, parameters, {.bias = false});
    // With nothing else to train, where a gradient goes follows from ids on the host, if they are there.
    layer.set_trainable({.projector = false, .features = false});
    layer.backward(layer.forward(on_device(scenario.ids), scenario.images), loss_weights);
    EXPECT_TRUE(test_support::equal(layer.words().grad(), layer.own_words(expected.words_gradient)));

    layer.set_trainable({});
    const auto images = changed(
        scenario.images, [](const at::Tensor& tensor) { return tensor.to(at::kDouble).clone().requires_grad_(); });
    const auto output = layer.forward(on_device(scenario.ids), images);
    EXPECT_EQ(output.scalar_type(), at::kFloat);
    EXPECT_TRUE(test_support::equal(output, layer.own_sequence(expected.output)));
    layer.backward(output, loss_weights);
    const auto gradients = changed(expected.feature_gradients, to_double);
    const auto leaves = tensors_of(images);
    for (size_t i = 0; i < leaves.size(); ++i) {
      // Gradients come back to the features' device, which the group's collectives may not be for.
      const auto gradient = on_device(leaves[i].grad());
      EXPECT_TRUE(
          test_support::equal(variant.replicated() ? parallel::all_reduce(gradient, groups(variant.t).tp) : gradient,
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
    const auto layer = make_layer(variant, parameters);
    auto second = layer;
    second.insert = make_insert(layer, others, layer.insert->options());
    const auto first_output = layer.forward(scenario.ids, scenario.images);
    const auto second_output = second.forward(scenario.ids, scenario.images);
    EXPECT_TRUE(test_support::equal(first_output, layer.own_sequence(expected.output)));
    EXPECT_TRUE(test_support::equal(second_output, layer.own_sequence(other_expected.output)));
    layer.backward(first_output, loss_weights);
    layer.backward(second_output, loss_weights);
    EXPECT_TRUE(test_support::equal(layer.words().grad(),
                                    layer.own_words(expected.words_gradient + other_expected.words_gradient)));
    EXPECT_TRUE(projector_gradient_is(layer, layer.weight(), expected.weight_gradient));
    EXPECT_TRUE(projector_gradient_is(second, second.weight(), other_expected.weight_gradient));
  });
}

TEST(ImageInsertEmbedding, AccumulatesIntoExistingGradients) {
  const Parameters parameters(1);
  const auto scenario = two_groups();
  const auto loss_weights = exact_values({kS, 2, kH}, 5);
  const auto expected = dense(scenario, parameters, true, loss_weights);
  for_each_variant([&](const Variant& variant) {
    for (const bool with_embedding : {false, true}) {  // without, a replicated projector works by rows owned
      const auto layer = make_layer(variant, parameters, {.accumulate_into_grad = true});
      layer.words().requires_grad_(with_embedding);
      for (int pass = 0; pass < 2; ++pass) {
        const void* memory = pass == 0 ? nullptr : layer.weight().grad().data_ptr();
        layer.backward(layer.forward(scenario.ids, scenario.images), loss_weights);
        if (pass == 1) {
          EXPECT_EQ(layer.weight().grad().data_ptr(), memory);
        }
      }
      EXPECT_TRUE(projector_gradient_is(layer, layer.weight(), expected.weight_gradient * 2));
      EXPECT_TRUE(projector_gradient_is(layer, layer.bias(), expected.bias_gradient * 2));
    }
  });
}

TEST(ImageInsertEmbedding, OwnsItsProjectorAndNothingElse) {
  for_each_variant([&](const Variant& variant) {
    for (const bool bias : {false, true}) {
      const auto layer = make_layer(variant, Parameters(1), {.bias = bias});
      const auto& insert = layer.insert;
      EXPECT_EQ(insert->parameters().size(), bias ? 2U : 1U);
      EXPECT_TRUE(insert->buffers().empty());
      EXPECT_EQ(insert->children().size(), 1U);
      EXPECT_EQ(insert->children().at(0), insert->align_projector);
      for (const auto& module : insert->modules()) {
        EXPECT_NE(module.get(), layer.embedding.get());
        EXPECT_NE(module.get(), layer.embedding->word_embeddings.get());
      }
      const int64_t rows = variant.column() ? kH / variant.t : kH;
      const int64_t columns = variant.row() ? kC / variant.t : kC;
      EXPECT_EQ(layer.weight().sizes(), (std::vector<int64_t>{rows, columns}));

      const auto shards = parameter_shards(*insert);
      ASSERT_EQ(shards.size(), bias ? 2U : 1U);
      const auto replicated = variant.t > 1 ? GradientDomain::kReplicatedPartial : GradientDomain::kReplicated;
      EXPECT_EQ(shards[0].name, "align_projector.weight");
      EXPECT_EQ(shards[0].domain, variant.replicated() ? replicated : GradientDomain::kSharded);
      EXPECT_NEAR(shards[0].initial_value.value, std::sqrt(2.0 / kC), 1e-12);
      const auto& segment = shards[0].segments.at(0);
      EXPECT_EQ(segment.global_shape, (std::vector<int64_t>{kH, kC}));
      const int64_t row = variant.column() ? rows * layer.rank() : 0;
      const int64_t column = variant.row() ? columns * layer.rank() : 0;
      EXPECT_EQ(segment.box, (Box{{row, column}, {rows, columns}}));
      if (!bias) continue;
      EXPECT_EQ(shards[1].name, "align_projector.bias");
      // The row sharding's is added on one rank and its gradient is whole on all.
      EXPECT_EQ(shards[1].domain, variant.column() ? GradientDomain::kSharded
                                  : variant.row()  ? GradientDomain::kReplicated
                                                   : replicated);
      EXPECT_EQ(shards[1].initial_value.value, 0.0);
    }
  });
}

TEST(ImageInsertEmbedding, HasTheReferencesConstructor) {
  const LanguageModelEmbedding embedding(ParallelEmbeddingOptions(kV, kH), groups(1).tp);
  EXPECT_EQ(ImageInsertEmbedding(embedding, kC, kH)->parameters().size(), 1U);
  const ImageInsertEmbedding with_bias(embedding, kC, kH, true);
  EXPECT_EQ(with_bias->parameters().size(), 2U);
  EXPECT_EQ(with_bias->options().projector_sharding(), ProjectorSharding::kColumn);
  EXPECT_EQ(with_bias->options().exchange(), InsertExchange::kFused);
  EXPECT_EQ(with_bias->options().on_mismatch(), MismatchPolicy::kError);
  EXPECT_EQ(with_bias->options().checked(), checked_by_default());
}

TEST(ImageInsertEmbedding, RefusesWhatDoesNotFitOnEveryRank) {
  const auto good = two_groups();
  const Parameters parameters(1);
  for_each_variant([&](const Variant& variant) {
    const auto layer = make_layer(variant, parameters, {.bias = false});
    auto refused = [&](const std::vector<ImageForInsert>& images, const std::string& part, const at::Tensor& ids = {}) {
      EXPECT_TRUE(throws([&] { layer.forward(ids.defined() ? ids : good.ids, images); }, part));
    };
    const auto one = make_ids(1, {{kImage, 0, 3}});

    auto without = good.images;
    without[1].image_features.reset();
    refused(without, "start token 18 has no image_features: the vision tower has to run first");
    refused({group_of(kImage, exact_values({kC}, 1))}, "[L, C] or [N, L, C], got [12]", one);
    refused({group_of(kImage, exact_values({1, 1, 3, kC}, 1))}, "[L, C] or [N, L, C], got [1, 1, 3, 12]", one);
    refused({group_of(kImage, std::vector<at::Tensor>{at::Tensor()})}, "got an undefined tensor", one);
    refused({group_of(kImage, exact_values({1, 3, kC + 1}, 1))},
            "image features of start token 18 have width 13, align_projector takes 12", one);
    refused({group_of(kImage, at::zeros({0, 3, kC + 1}))}, "have width 13, align_projector takes 12", make_ids(1, {}));
    refused({group_of(kImage, at::zeros({0, 0, 0}))}, "have width 0, align_projector takes 12", make_ids(1, {}));
    refused({good.images[0]}, "3 images for 1 occurrences of start token 17: the last occurrence is in batch row 0",
            make_ids(1, {{kPatch, 0, 3}}));
    refused({group_of(kImage, features(1, {1, 2}))},
            "1 images for 2 occurrences of start token 18: the first without an image is in batch row 1 at position 7");
    refused({group_of(kImage, std::vector<at::Tensor>{})}, "0 images for 1 occurrences of start token 18", one);
    refused({group_of(kImage, features(1, {1, 2}))}, "1 images for 0 occurrences of start token 18", make_ids(1, {}));

    auto outside = good.ids.clone();
    outside[1][1] = kV;
    refused(good.images, "token id 19 at batch row 1, position 1 is outside the vocabulary [0, 19)", outside);
    refused({}, "token id 19 at batch row 1, position 1 is outside the vocabulary [0, 19)", outside);
    refused(good.images, "input_ids must be [B, S] int64, got [24]", good.ids[0]);
    refused(good.images, "input_ids must be [B, S] int64, got [2, 24] Int", good.ids.to(at::kInt));

    const auto plan = layer.insert->make_plan(good.ids, good.images);
    auto refused_plan = [&](const at::Tensor& ids, const std::vector<ImageForInsert>& images, const std::string& part) {
      EXPECT_TRUE(throws([&] { layer.forward(ids, images, plan); }, part));
    };
    refused_plan(good.ids.narrow(1, 0, 8), good.images, "input_ids [2, 8] do not fit a plan for [2, 24]");
    refused_plan(good.ids.narrow(0, 0, 1), good.images, "input_ids [1, 24] do not fit a plan for [2, 24]");
    refused_plan(good.ids, {good.images[0]}, "3 images for a plan of 5");
    refused_plan(good.ids, {good.images[0], group_of(kImage, features(1, {2, 11}))},
                 "image 4 has 11 feature rows, the plan says 9");
    auto six = good.images;
    six.push_back(group_of(kImage, features(1, {1, 2})));
    refused_plan(good.ids, six, "6 images for a plan of 5");
    refused_plan(outside, good.images, "token id 19");

    if (variant.sequence_parallel && variant.t > 1) {
      const auto expected = "sequence length " + std::to_string(variant.t * 3 + 1) +
                            " is not divisible by tensor-parallel size " + std::to_string(variant.t);
      refused({group_of(kImage, features(1, {1, 1}))}, expected, one.narrow(1, 0, variant.t * 3 + 1));
      refused({}, expected, one.narrow(1, 0, variant.t * 3 + 1));
    }
    EXPECT_EQ(layer.recorded.count->total(), 0);
    // And it still works.
    EXPECT_TRUE(
        test_support::equal(layer.forward(good.ids, good.images),
                            layer.own_sequence(dense(good, parameters, false, exact_values({kS, 2, kH}, 5)).output)));
  });
}

TEST(ImageInsertEmbedding, RefusesFeaturesOfSingleRanksThatDoNotFit) {
  const auto good = two_groups();
  for_each_variant([&](const Variant& variant) {
    const auto layer = make_layer(variant, Parameters(1), {.bias = false});
    auto refused = [&](const std::vector<ImageForInsert>& images, const std::string& part) {
      EXPECT_TRUE(throws([&] { layer.forward(good.ids, images); }, part));
    };
    const auto local = layer.own_images(good.images, {Placement::kOnHolders, std::vector<int64_t>(5, 0), true});
    auto wrong = local;
    wrong[0].held->holders = at::zeros({2}, at::kLong);
    refused(wrong, "2 holders for 3 images of start token 17");
    wrong[0].held->holders = at::full({3}, variant.t, at::kLong);
    refused(wrong, "is no rank of a group of " + std::to_string(variant.t));
    wrong[0].held->holders = at::full({3}, -1, at::kLong);
    refused(wrong, "holder -1 of an image of start token 17 is no rank");
    wrong[0].held->holders = at::zeros({3}, at::kInt);
    refused(wrong, "holders of start token 17 must be [N] int64 on the CPU, got [3] Int");
    wrong = local;
    wrong[1].held->num_rows = wrong[1].held->num_rows.to(at::kInt);
    refused(wrong, "num_rows of start token 18 must be [N] int64 on the CPU, got [2] Int");
    wrong[1].held->num_rows = at::zeros({2, 1}, at::kLong);
    refused(wrong, "num_rows of start token 18 must be [N] int64 on the CPU, got [2, 1]");
    // Every rank has an image too many, or one too few.
    wrong = good.images;
    for (auto& group : wrong) group.held = HeldImages{at::tensor(rows_of({group}), at::kLong), {}};
    wrong[1].image_features = std::vector<at::Tensor>{features(1, {11}), features(2, {9}), features(3, {1})};
    refused(wrong, variant.t == 1 ? "more images than the 2" : "images");
    wrong[0].image_features = features(1, {0, 3});
    wrong[1].image_features = features(1, {0, 11});
    if (variant.t == 1) refused(wrong, "0 images of start token 17 where this rank holds 3");
    EXPECT_EQ(layer.recorded.count->total(), 0);
  });
}

// A slice of the channels is what the row sharding needs, and only where every rank has all images.
TEST(ImageInsertEmbedding, RefusesSlicedChannelsWhereTheyDoNotBelong) {
  const auto good = two_groups();
  for_each_variant([&](const Variant& variant) {
    if (variant.t == 1) return;
    const auto layer = make_layer(variant, Parameters(1), {.bias = false});
    auto refused = [&](const std::vector<ImageForInsert>& images, const std::string& part) {
      EXPECT_TRUE(throws([&] { layer.forward(good.ids, images); }, part));
    };
    const auto width = std::to_string(kC / variant.t);
    const auto sliced = layer.own_images(good.images, {Placement::kSliced, {}, false});
    const auto takes_all = "have width " + width + ", align_projector takes 12";
    if (variant.row()) {
      refused({sliced[0], good.images[1]}, "have width 12, others " + width + ": either all are sliced by channel");
      refused({good.images[0], sliced[1]}, "have width " + width + ", others 12: either all are sliced by channel");
    } else {
      refused(sliced, takes_all);
    }
    refused(layer.own_images(sliced, {Placement::kOnHolders, std::vector<int64_t>(5, 0), true}),
            layer.rank() == 0 ? takes_all : "width");
    EXPECT_EQ(layer.recorded.count->total(), 0);
  });
}

TEST(ImageInsertEmbedding, RefusesAtConstruction) {
  for (const int t : test_support::divisors_of_world()) {
    auto refused = [&](const LanguageModelEmbedding& embedding, const ImageInsertEmbeddingOptions& options,
                       const std::string& part) {
      EXPECT_TRUE(throws([&] { ImageInsertEmbedding(embedding, options); }, part));
    };
    const LanguageModelEmbedding odd(ParallelEmbeddingOptions(kV, 7), groups(t).tp);
    refused(odd, {kC, kH}, "hidden_size 12 is not the language embedding's 7");
    const LanguageModelEmbedding hidden(ParallelEmbeddingOptions(kV, kH), groups(t).tp, EmbeddingSharding::kHidden);
    refused(hidden, ImageInsertEmbeddingOptions(kC, kH).projector_sharding(ProjectorSharding::kRow),
            "a hidden-parallel embedding takes a column-sharded or a replicated projector");
    for (const auto sharding : {ProjectorSharding::kColumn, ProjectorSharding::kReplicated}) {
      refused(hidden,
              ImageInsertEmbeddingOptions(kC, kH).projector_sharding(sharding).exchange(InsertExchange::kAllGather),
              "a hidden-parallel embedding goes with the fused exchange only");
    }
    if (t == 1) continue;
    const auto of_t = " 7 is not divisible by tensor-parallel size " + std::to_string(t);
    refused(odd, {kC, 7}, "hidden size" + of_t);
    refused(odd, ImageInsertEmbeddingOptions(7, 7).projector_sharding(ProjectorSharding::kRow),
            "encoder_output_dim" + of_t);
  }
}

TEST(ImageInsertEmbedding, WarnsOnceOfACutOnRankZero) {
  const Parameters parameters(1);
  for_each_variant([&](const Variant& variant) {
    const auto layer = make_layer(variant, parameters, {.on_mismatch = MismatchPolicy::kTruncate});
    Warnings warnings;
    layer.forward(make_ids(2, {{kImage, 1, 2}}), {group_of(kImage, features(33, {4, 3}))});
    if (layer.rank() == 0) {
      EXPECT_EQ(warnings.texts,
                std::vector<std::string>{"4 images for 1 occurrences of start token 18: inserting the overlap"});
    } else {
      EXPECT_TRUE(warnings.texts.empty());
    }
  });
}

}  // namespace megatron_cpp::step37
