// ImageInsertEmbedding's two functions of plain tensors: features as one block an image, and projected rows written
// over embeddings.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <array>
#include <string>
#include <vector>

#include "step37/insert/image_insert_embedding.h"
#include "tests/step37/image_insert_world.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::step37 {
namespace {

using namespace insert_world;
using namespace test_support;

}  // namespace

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
    EXPECT_TRUE(
        throws([&] { ImageInsertEmbeddingImpl::normalize_feature_list(std::vector<at::Tensor>{at::zeros(shape)}); },
               "[L, C] or [N, L, C], got"));
    EXPECT_TRUE(throws([&] { ImageInsertEmbeddingImpl::normalize_feature_list(at::zeros(shape)); },
                       "[L, C] or [N, L, C], got"));
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
  const auto ids = make_ids(2, {{kImage, 0, 3}, {kImage, 1, 22}, {kImage, 0, 5}});
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
  EXPECT_TRUE(throws(
      [&] {
        insert(at::zeros({2, kS, kH}), at::zeros({1, 2, kH}), ids, kImage);
      },
      "embeddings [2, 24, 12] are not the [S, B, H] of input_ids [2, 24]"));
  EXPECT_TRUE(throws(
      [&] {
        insert(at::zeros({kS, 2, kH}), at::zeros({kH}), ids, kImage);
      },
      "[L, C] or [N, L, C], got [12]"));
  EXPECT_TRUE(throws(
      [&] {
        insert(at::zeros({kS, 2, kH}), at::zeros({1, 2, kH}), ids.to(at::kInt), kImage);
      },
      "input_ids"));
}

}  // namespace megatron_cpp::step37
