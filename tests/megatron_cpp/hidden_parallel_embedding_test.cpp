// The hidden-parallel embedding against at::embedding and the vocabulary-parallel one; the data are exact, so the
// comparisons are of bits.
#include "megatron_cpp/tensor_parallel/hidden_parallel_embedding.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "megatron_cpp/tensor_parallel/language_model_embedding.h"
#include "parallel/collectives.h"
#include "parallel/recording_backend.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp {
namespace {

using parallel::CollectiveKind;
using namespace test_support;

constexpr int64_t kV = 7;
constexpr int64_t kB = 3;

at::Tensor make_ids(int64_t S) { return (at::arange(kB * S, at::kLong) * 5 + 3).remainder(kV).view({kB, S}); }

HiddenParallelEmbedding make_embedding(const ParallelEmbeddingOptions& options, const parallel::GroupPtr& tp,
                                       const at::Tensor& weight) {
  HiddenParallelEmbedding embedding(options, tp);
  embedding->to(test_support::runtime().device());
  const at::NoGradGuard no_grad;
  embedding->weight.copy_(part(weight, 1, tp));
  return embedding;
}

}  // namespace

TEST(HiddenParallelEmbedding, EqualsTheDenseEmbedding) {
  for (const int t : test_support::divisors_of_world()) {
    for (const bool sequence_parallel : {false, true}) {
      SCOPED_TRACE(testing::Message() << "t " << t << ", sequence_parallel " << sequence_parallel);
      const auto recorded = parallel::record(groups(t).tp);
      const auto& tp = recorded.group;
      const int64_t S = 4 * t;
      const int64_t H = 3 * t;
      const auto ids = make_ids(S);
      const auto weight = exact_values({kV, H}, 1);
      const auto loss_weights = exact_values({S, kB, H}, 2);
      const auto dense_weight = weight.clone().requires_grad_();
      const auto dense = at::embedding(dense_weight, ids.t());
      (dense * loss_weights).sum().backward();

      auto embedding = make_embedding(ParallelEmbeddingOptions(kV, H).sequence_parallel(sequence_parallel), tp, weight);
      const auto output = embedding->forward(ids);
      const auto in_forward = *recorded.count;
      EXPECT_TRUE(test_support::equal(output, sequence_parallel ? part(dense.detach(), 0, tp) : dense.detach()));
      (output * on_device(sequence_parallel ? part(loss_weights, 0, tp) : loss_weights)).sum().backward();
      EXPECT_TRUE(test_support::equal(embedding->weight.grad(), part(dense_weight.grad(), 1, tp)));

      const auto in_backward = *recorded.count - in_forward;
      const int64_t once = t > 1 ? 1 : 0;
      const int64_t gathered = S * kB * H * 4 * (t - 1) / t;
      EXPECT_EQ(in_forward.of(sequence_parallel ? CollectiveKind::kAllToAll : CollectiveKind::kAllGather), once);
      EXPECT_EQ(in_forward.bytes_sent, sequence_parallel ? gathered / t : gathered);
      EXPECT_EQ(in_forward.total(), once);
      EXPECT_EQ(in_backward.of(CollectiveKind::kAllToAll), sequence_parallel ? once : 0);
      EXPECT_EQ(in_backward.bytes_sent, sequence_parallel ? gathered / t : 0);
      EXPECT_EQ(in_backward.total(), sequence_parallel ? once : 0);
    }
  }
}

TEST(HiddenParallelEmbedding, PartialHoldsOwnColumnsOfAllButRowsLeftOut) {
  for (const int t : test_support::divisors_of_world()) {
    const auto recorded = parallel::record(groups(t).tp);
    const auto& tp = recorded.group;
    const int64_t S = 4 * t;
    const auto ids = make_ids(S);
    const auto weight = exact_values({kV, 3 * t}, 1);
    const auto loss_weights = exact_values({S, kB, 3}, 2);
    const auto left_out = at::arange(1, S * kB, 4, at::kLong).flip(0);
    auto embedding = make_embedding({kV, 3 * t}, tp, weight);
    const auto partial = embedding->partial(ids, left_out);
    partial.view({-1, 3}).index_fill_(0, on_device(left_out), 0);  // they may hold anything
    const auto kept = at::ones({S * kB, 1}).index_fill_(0, left_out, 0).view({S, kB, 1});
    EXPECT_TRUE(test_support::equal(partial, part(at::embedding(weight, ids.t()), 2, tp) * kept));
    (partial * on_device(loss_weights)).sum().backward();
    const auto dense_weight = part(weight, 1, tp).clone().requires_grad_();
    (at::embedding(dense_weight, ids.t()) * kept * loss_weights).sum().backward();
    EXPECT_TRUE(test_support::equal(embedding->weight.grad(), dense_weight.grad()));
    EXPECT_EQ(recorded.count->total(), 0);
  }
}

TEST(HiddenParallelEmbedding, AccumulatingIntoGradIsTheSameAsAutograds) {
  for (const int t : test_support::divisors_of_world()) {
    const auto& tp = groups(t).tp;
    const auto weight = exact_values({kV, 3 * t}, 1);
    std::vector<at::Tensor> gradients;
    for (const bool accumulate_into_grad : {false, true}) {
      auto embedding =
          make_embedding(ParallelEmbeddingOptions(kV, 3 * t).accumulate_into_grad(accumulate_into_grad), tp, weight);
      const void* memory = nullptr;
      for (int64_t pass = 0; pass < 2; ++pass) {
        const auto output = embedding->forward(make_ids(4 * t).roll(pass, 1));
        (output * on_device(exact_values({4 * t, kB, 3 * t}, 30 + pass))).sum().backward();
        if (pass == 1 && accumulate_into_grad) {
          EXPECT_EQ(embedding->weight.grad().data_ptr(), memory);
        }
        memory = embedding->weight.grad().data_ptr();
      }
      gradients.push_back(embedding->weight.grad());
    }
    EXPECT_TRUE(test_support::equal(gradients[1], gradients[0]));
  }
}

TEST(HiddenParallelEmbedding, IsAPartOfTheSameTableAsTheVocabularyParallelOne) {
  for (const int t : test_support::divisors_of_world()) {
    const auto& tp = groups(t).tp;
    const LanguageModelEmbedding hidden(ParallelEmbeddingOptions(kV, 3 * t), tp, EmbeddingSharding::kHidden);
    const LanguageModelEmbedding vocab(ParallelEmbeddingOptions(kV, 3 * t), tp);
    const auto hidden_shards = parameter_shards(*hidden);
    const auto vocab_shards = parameter_shards(*vocab);
    ASSERT_EQ(hidden_shards.size(), 1U);
    EXPECT_EQ(hidden_shards[0].name, "word_embeddings.weight");
    EXPECT_EQ(hidden_shards[0].segments.at(0).name, vocab_shards.at(0).segments.at(0).name);
    EXPECT_EQ(hidden_shards[0].segments[0].global_shape, vocab_shards[0].segments[0].global_shape);
    EXPECT_EQ(hidden_shards[0].segments[0].box, (Box{{0, 3 * tp->getRank()}, {kV, 3}}));
    EXPECT_EQ(hidden->layout(), Part::kColumns);
    EXPECT_EQ(vocab->layout(), Part::kSummand);
    // The same initial values, wherever they lie.
    initialize_parameters(hidden_shards, 1);
    initialize_parameters(vocab_shards, 1);
    const auto whole = parallel::all_gather(vocab->word_embeddings->weight.detach(), tp).narrow(0, 0, kV);
    EXPECT_TRUE(test_support::equal(hidden->word_embeddings->weight.detach(), part(whole, 1, tp)));
  }
}

TEST(HiddenParallelEmbedding, RefusesWhatDoesNotFitOnEveryRank) {
  for (const int t : test_support::divisors_of_world()) {
    const auto recorded = parallel::record(groups(t).tp);
    auto embedding = make_embedding(ParallelEmbeddingOptions(kV, 3 * t).sequence_parallel(true), recorded.group,
                                    at::ones({kV, 3 * t}));
    for (const int64_t wrong : {kV, int64_t{-1}}) {
      auto ids = make_ids(4 * t);
      ids[1][2] = wrong;
      EXPECT_EQ(value_error([&] { embedding->forward(ids); }),
                "token id " + std::to_string(wrong) + " at batch row 1, position 2 is outside the vocabulary [0, 7)");
    }
    if (t > 1) {
      const auto size = " is not divisible by tensor-parallel size " + std::to_string(t);
      EXPECT_EQ(value_error([&] { embedding->forward(make_ids(t + 1)); }),
                "sequence length " + std::to_string(t + 1) + size);
      EXPECT_EQ(value_error([&] { HiddenParallelEmbedding(ParallelEmbeddingOptions(kV, 3 * t + 1), recorded.group); }),
                "hidden size " + std::to_string(3 * t + 1) + size);
    }
    EXPECT_EQ(recorded.count->total(), 0);
  }
}

}  // namespace megatron_cpp
