// The cache of `step37 generate`, on the golden model "wide".
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <vector>

#include "step37/published_checkpoint.h"
#include "step37/step37_model.h"
#include "tests/support/environment.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::step37 {
namespace {

namespace fs = std::filesystem;
using namespace test_support;

using Ids = std::vector<int64_t>;

const fs::path kWide = test_support::cases() / "models" / "wide";  // window 5; experts in layers 1 and 2

// ---- the cache ----

/// [S, B, V] of S positions of `ids`, given to the decoder in pieces of these lengths.
at::Tensor logits_in_pieces(Step37Model& model, const at::Tensor& ids, const Ids& pieces,
                            const parallel::GroupPtr& tp) {
  const bool sequence_parallel = model->config().execution.sequence_parallel;
  const int64_t t = sequence_parallel ? tp->getSize() : 1;
  auto& language_model = *model->language_model;
  KeyValueCache cache;
  std::vector<at::Tensor> logits;
  int64_t begin = 0;
  for (const int64_t n : pieces) {
    const int64_t padding = (t - n % t) % t;
    const auto input = at::constant_pad_nd(ids.narrow(1, begin, n), {0, padding}, 7);
    AttentionInput attention{at::cat({at::arange(begin, begin + n), at::arange(padding)}).unsqueeze(0), {}};
    if (padding > 0) attention.cu_seqlens = at::tensor({int64_t{0}, n, n + padding}, at::kInt);
    const auto embeddings = language_model.embedding->forward(input, attention.position_ids);
    const auto hidden = language_model.decoder->forward(embeddings, attention, pieces.size() > 1 ? &cache : nullptr);
    logits.push_back(language_model.output_layer->forward(hidden).narrow(0, 0, n));
    begin += n;
  }
  return at::cat(logits);
}

TEST(KeyValueCacheTest, GivesTheLogitsOfTheWholeSequence) {
  const at::NoGradGuard no_grad;
  const PublishedCheckpoint checkpoint(kWide);
  const auto generator = at::detail::createCPUGenerator(3);
  for (const int t : divisors_of_world()) {
    for (const int ep : divisors_of_world()) {
      if (t % ep != 0) continue;
      const auto& groups = test_support::groups({.tp = t, .dp = runtime().size() / t, .ep = ep, .etp = t / ep});
      for (const bool sequence_parallel : {false, true}) {
        SCOPED_TRACE(testing::Message() << "tp " << t << " ep " << ep << " sequence_parallel " << sequence_parallel);
        auto config = step37_config(checkpoint.config(), false);
        config.execution.sequence_parallel = sequence_parallel;
        Step37Model model(config, groups);
        checkpoint.load(parameter_shards(*model));
        model->to(runtime().device());
        // Padding, which sequence parallelism needs, goes with one batch row only.
        const auto ids = at::randint(3, 60, {sequence_parallel ? 1 : 2, 20}, generator, at::kLong);
        const auto expected = logits_in_pieces(model, ids, {20}, groups.tp);
        for (const Ids& pieces : {Ids{9, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}, Ids{2, 1, 8, 1, 3, 5}, Ids{19, 1}}) {
          EXPECT_TRUE(near(logits_in_pieces(model, ids, pieces, groups.tp), expected, 1e-5));
        }
      }
    }
  }
}

TEST(KeyValueCacheTest, RefusesGradientsAndAnotherBlocksCache) {
  Step37Model model(step37_config(PublishedCheckpoint(kWide).config(), false), world_tp());
  auto& decoder = model->language_model->decoder;
  KeyValueCache cache;
  const auto forward = [&] { decoder->forward(at::zeros({1, 1, 32}), {at::zeros({1, 1}, at::kLong), {}}, &cache); };
  EXPECT_TRUE(throws(forward, "a KeyValueCache goes without gradients"));
  const at::NoGradGuard no_grad;
  cache.layers.resize(2);
  EXPECT_TRUE(throws(forward, "the KeyValueCache is of 2 layers, the block of 3"));
}

}  // namespace
}  // namespace megatron_cpp::step37
