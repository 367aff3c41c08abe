// Checked mode of ImageInsertEmbedding: what a rank has other than the rest is named on all, and changes no bit where
// all agree.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "parallel/agree.h"
#include "tests/step37/image_insert_world.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::step37 {
namespace {

using namespace insert_world;
using namespace test_support;

/// What a rank passes, and how it has its layer.
struct Arguments {
  at::Tensor ids;
  std::vector<ImageForInsert> images;
  Trainable trainable;
  bool gradient_mode = true;
};

struct Disagreement {
  std::string name;
  std::string part;  ///< of the message, besides the rank
  std::function<void(Arguments&)> change;
};

/// Of features that every rank has.
std::vector<Disagreement> disagreements() {
  return {
      {"an id", "the hash of input_ids is ", [](Arguments& own) { own.ids[1][20] = 1; }},
      {"a batch row more", "batch size is 2 on rank 0 and 3 on rank ",
       [](Arguments& own) {
         own.ids = at::cat({own.ids, own.ids.narrow(0, 0, 1).fmod(17)});
       }},
      {"a sequence twice as long", "sequence length is 24 on rank 0 and 48 on rank ",
       [](Arguments& own) {
         own.ids = at::constant_pad_nd(own.ids, {0, kS});
       }},
      {"no group", "the number of image groups is 2 on rank 0 and 0 on rank ", [](Arguments& own) { own.images = {}; }},
      {"a group less", "the number of image groups is 2 on rank 0 and 1 on rank ",
       [](Arguments& own) { own.images.pop_back(); }},
      {"another token", "the hash of start tokens is ",
       [](Arguments& own) { own.images[1].insert_start_token = kPatch; }},
      {"a feature row less", "the hash of the images' row numbers is ",
       [](Arguments& own) {
         own.images[0].image_features = features(10, {3, 2});
       }},
      {"an image less", "the hash of the images' row numbers is ",
       [](Arguments& own) {
         own.images[0].image_features = features(10, {2, 3});
       }},
      {"rows on one rank only", "the hash of the images' holders is ",
       [](Arguments& own) {
         own.images[0].image_features = std::vector<at::Tensor>{};  // its own are none: it is not rank 0
         own.images[0].held = HeldImages{at::tensor({3, 3, 3}, at::kLong), at::zeros({3}, at::kLong)};
       }},
      {"a frozen embedding", "whether the word embedding is trained is 1 on rank 0 and 0 on rank ",
       [](Arguments& own) { own.trainable.embedding = false; }},
      {"a frozen projector", "whether align_projector is trained is 1 on rank 0 and 0 on rank ",
       [](Arguments& own) { own.trainable.projector = false; }},
      {"frozen features", "whether features are trained is 1 on rank 0 and 0 on rank ",
       [](Arguments& own) { own.trainable.features = false; }},
      {"no gradient mode", "gradient mode is 1 on rank 0 and 0 on rank ",
       [](Arguments& own) { own.gradient_mode = false; }},
      // What one rank finds by itself, all learn.
      {"no features", "has no image_features: the vision tower has to run first",
       [](Arguments& own) { own.images[0].image_features.reset(); }},
      {"features of another width", "have width 13, align_projector takes 12",
       [](Arguments& own) {
         own.images[0].image_features = features(10, {3, 3}, kC + 1);
       }},
      {"ids of another type", "input_ids must be [B, S] int64", [](Arguments& own) { own.ids = own.ids.to(at::kInt); }},
  };
}

at::Tensor forward(const Layer& layer, const Arguments& arguments) {
  layer.set_trainable(arguments.trainable);
  auto images = arguments.images;
  for (auto& group : images) {
    if (!group.image_features.has_value()) continue;
    group = layer.leaves({group}, {}, arguments.trainable.features).front();
  }
  const at::AutoGradMode mode(arguments.gradient_mode);
  return layer.forward(arguments.ids, images);
}

}  // namespace

// Without checked mode any of these hangs or computes something wrong.
TEST(ImageInsertChecked, NamesWhatARankHasOtherThanTheRest) {
  Warnings warnings;
  const Parameters parameters(1);
  const auto scenario = two_groups();
  const auto expected = dense(scenario, parameters, true, exact_values({kS, 2, kH}, 5)).output;
  for_each_variant([&](const Variant& variant) {
    if (variant.t == 1) return;
    const auto layer = make_layer(variant, parameters, {.on_mismatch = MismatchPolicy::kTruncate, .checked = true});
    const int64_t other = variant.t - 1;
    for (const auto& disagreement : disagreements()) {
      SCOPED_TRACE(disagreement.name);
      Arguments arguments{scenario.ids.clone(), scenario.images, {}};
      if (layer.rank() == other) disagreement.change(arguments);
      EXPECT_TRUE(throws<parallel::AgreedError>([&] { forward(layer, arguments); }, disagreement.part));
      EXPECT_TRUE(throws<parallel::AgreedError>([&] { forward(layer, arguments); }, "rank " + std::to_string(other)));
    }
    // All of them are still in step.
    EXPECT_TRUE(test_support::equal(forward(layer, {scenario.ids, scenario.images, {}}), layer.own_sequence(expected)));
  });
}

TEST(ImageInsertChecked, NamesTheRankWhoseOwnFeaturesDoNotFit) {
  const Parameters parameters(1);
  const auto scenario = two_groups();
  for_each_variant([&](const Variant& variant) {
    if (variant.t == 1) return;
    const auto layer = make_layer(variant, parameters, {.checked = true});
    const int64_t other = variant.t - 1;
    const auto by_rank = "(rank " + std::to_string(other) + " of " + std::to_string(variant.t) + ")";
    const Placed on_first{Placement::kOnHolders, std::vector<int64_t>(5, 0), true};
    auto refused = [&](const std::vector<ImageForInsert>& images, const std::string& part) {
      EXPECT_TRUE(throws<parallel::AgreedError>([&] { layer.forward(scenario.ids, images); }, part));
    };
    auto wrong = layer.leaves(scenario.images, on_first);
    if (layer.rank() == other) wrong[0].image_features = features(1, {1, 3});
    refused(wrong, "more images than the 0 of start token 17 that this rank holds " + by_rank);

    // Holders that differ and features to match: nobody finds anything by itself.
    auto moved = on_first;
    if (layer.rank() == other) moved.holders[4] = other;
    refused(layer.leaves(scenario.images, moved), "the hash of the images' holders is ");
    refused(layer.leaves(scenario.images, moved), "on rank " + std::to_string(other));

    auto longer = layer.leaves(scenario.images, on_first);
    if (layer.rank() == other) longer[1].held->num_rows[1] = 10;
    refused(longer, "the hash of the images' row numbers is ");
  });
}

TEST(ImageInsertChecked, ComputesTheSameBits) {
  Warnings warnings;
  const Parameters parameters(1);
  for (const auto& scenario : {two_groups(), overlaps(), Scenario{"no group", make_ids(2, {}), {}}}) {
    const auto loss_weights = exact_values({kS, scenario.ids.size(0), kH}, 5);
    const auto expected = dense(scenario, parameters, true, loss_weights);
    for_each_variant([&](const Variant& variant) {
      for (const auto& placed : placements(variant, scenario.images)) {
        const auto layer = make_layer(variant, parameters, {.checked = true});
        const auto images = layer.leaves(scenario.images, placed);
        const auto output = layer.forward(scenario.ids, images);
        EXPECT_TRUE(test_support::equal(output, layer.own_sequence(expected.output)));
        layer.backward(output, loss_weights);
        if (images.empty()) continue;
        EXPECT_TRUE(gradients_are(layer, images, expected, {}, placed));
      }
    });
  }
}

}  // namespace megatron_cpp::step37
