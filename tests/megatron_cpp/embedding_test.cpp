// The vocabulary-parallel embedding against at::embedding; the data are exact, so the comparisons are of bits.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "megatron_cpp/tensor_parallel/embedding_look_up.h"
#include "megatron_cpp/tensor_parallel/language_model_embedding.h"
#include "megatron_cpp/tensor_parallel/vocab_parallel_embedding.h"
#include "parallel/collectives.h"
#include "parallel/recording_backend.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp {
namespace {

using parallel::CollectiveKind;
using namespace test_support;

constexpr int64_t kH = 6;
constexpr int64_t kB = 3;

/// Vocabularies that t ranks hold with padding: in the last shard; one id, so that all shards but the first are
/// padding.
std::vector<int64_t> vocabularies(int t) { return {5 * t, 5 * t - 2, 1}; }

int64_t rows_per_rank(int64_t V, int t) { return (V + t - 1) / t; }

/// [B, S] ids with every shard's first and last one, the vocabulary's last, and repetitions.
at::Tensor make_ids(int64_t V, int t, int64_t S) {
  const int64_t rows = rows_per_rank(V, t);
  std::vector<int64_t> borders;
  for (int64_t begin = 0; begin < V; begin += rows) {
    borders.push_back(begin);
    borders.push_back(std::min(begin + rows, V) - 1);
  }
  auto ids = at::empty({kB, S}, at::kLong);
  auto* out = ids.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < kB * S; ++i) {
    out[i] = i < static_cast<int64_t>(borders.size()) ? borders[static_cast<size_t>(i)] : (i * i + 3) % V;
  }
  return ids;
}

/// The rank's rows of a [V, H] tensor, those of the padding zero.
at::Tensor own_rows(const at::Tensor& whole, const parallel::GroupPtr& tp) {
  const int64_t V = whole.size(0);
  const int64_t rows = rows_per_rank(V, tp->getSize());
  const auto padded = at::constant_pad_nd(whole, {0, 0, 0, rows * tp->getSize() - V});
  return padded.narrow(0, rows * tp->getRank(), rows);
}

VocabParallelEmbedding make_embedding(const ParallelEmbeddingOptions& options, const parallel::GroupPtr& tp,
                                      const at::Tensor& weight) {
  VocabParallelEmbedding embedding(options, tp);
  embedding->to(test_support::runtime().device());
  const at::NoGradGuard no_grad;
  embedding->weight.copy_(own_rows(weight, tp));
  return embedding;
}

struct Dense {
  Dense(const at::Tensor& ids, const at::Tensor& weight, const at::Tensor& loss_weights) {
    const auto leaf = weight.clone().requires_grad_();
    const auto embedded = at::embedding(leaf, ids.t());
    (embedded * loss_weights).sum().backward();
    output = embedded.detach();
    weight_gradient = leaf.grad();
  }
  at::Tensor output, weight_gradient;
};

int64_t once(int t) { return t == 1 ? 0 : 1; }

}  // namespace

TEST(PaddedVocabularySize, IsTheNextMultiple) {
  EXPECT_EQ(padded_vocabulary_size(10, 1), 10);
  EXPECT_EQ(padded_vocabulary_size(10, 4), 12);
  EXPECT_EQ(padded_vocabulary_size(12, 4), 12);
  EXPECT_EQ(padded_vocabulary_size(1, 4), 4);
  EXPECT_EQ(padded_vocabulary_size(128815, 8, 128), 129024);
}

TEST(VocabParallelEmbedding, EqualsTheDenseEmbedding) {
  for (const int t : test_support::divisors_of_world()) {
    for (const int64_t V : vocabularies(t)) {
      for (const bool sequence_parallel : {false, true}) {
        SCOPED_TRACE(testing::Message() << "t " << t << ", V " << V << ", sequence_parallel " << sequence_parallel);
        const auto recorded = parallel::record(groups(t).tp);
        const auto& tp = recorded.group;
        const int64_t S = 4 * t;
        const auto ids = make_ids(V, t, S);
        const auto weight = exact_values({V, kH}, 1);
        const auto loss_weights = exact_values({S, kB, kH}, 2);
        const Dense dense(ids, weight, loss_weights);

        auto embedding =
            make_embedding(ParallelEmbeddingOptions(V, kH).sequence_parallel(sequence_parallel), tp, weight);
        const auto output = embedding->forward(ids);
        const auto in_forward = *recorded.count;
        EXPECT_TRUE(test_support::equal(output, sequence_parallel ? part(dense.output, 0, tp) : dense.output));
        (output * on_device(sequence_parallel ? part(loss_weights, 0, tp) : loss_weights)).sum().backward();
        EXPECT_TRUE(test_support::equal(embedding->weight.grad(), own_rows(dense.weight_gradient, tp)));

        const auto in_backward = *recorded.count - in_forward;
        const int64_t bytes = S * kB * kH * 4 * (t - 1) / t;
        if (sequence_parallel) {
          EXPECT_EQ(in_forward.of(CollectiveKind::kReduceScatter), once(t));
          EXPECT_EQ(in_forward.bytes_sent, bytes);
          EXPECT_EQ(in_backward.of(CollectiveKind::kAllGather), once(t));
          EXPECT_EQ(in_backward.bytes_sent, bytes);
        } else {
          EXPECT_EQ(in_forward.of(CollectiveKind::kAllReduce), once(t));
          EXPECT_EQ(in_forward.bytes_sent, 2 * bytes);
        }
        EXPECT_EQ(in_forward.total(), once(t));
        EXPECT_EQ(in_backward.total(), sequence_parallel ? once(t) : 0);
      }
    }
  }
}

TEST(VocabParallelEmbedding, PartialHoldsOwnIdsOnlyAndSendsNothing) {
  for (const int t : test_support::divisors_of_world()) {
    for (const int64_t V : vocabularies(t)) {
      const auto recorded = parallel::record(groups(t).tp);
      const auto& tp = recorded.group;
      const auto ids = make_ids(V, t, 4 * t);
      const auto weight = exact_values({V, kH}, 1) + 5;  // no element is zero
      auto embedding = make_embedding({V, kH}, tp, weight);
      const auto partial = embedding->partial(ids);
      const int64_t rows = rows_per_rank(V, t);
      const auto own = ids.t().ge(rows * tp->getRank()).logical_and(ids.t().lt(rows * (tp->getRank() + 1)));
      EXPECT_TRUE(test_support::equal(partial, at::embedding(weight, ids.t()) * own.unsqueeze(-1)));
      EXPECT_EQ(recorded.count->total(), 0);
      EXPECT_TRUE(test_support::equal(parallel::all_reduce(partial.detach(), tp), at::embedding(weight, ids.t())));
    }
  }
}

// What an insert of image features does: rank 0 fills the rows left out, the one reduction carries both.
TEST(VocabParallelEmbedding, RowsLeftOutBelongToTheCaller) {
  for (const int t : test_support::divisors_of_world()) {
    for (const bool sequence_parallel : {false, true}) {
      const auto& tp = groups(t).tp;
      const int64_t V = 5 * t - 2;
      const int64_t S = 4 * t;
      const auto ids = make_ids(V, t, S);
      const auto weight = exact_values({V, kH}, 1) + 5;
      const auto loss_weights = exact_values({S, kB, kH}, 2);
      const auto left_out = at::arange(1, S * kB, 4, at::kLong).flip(0);  // in no particular order
      const auto features = exact_values({left_out.size(0), kH}, 3);

      // Dense: the same, with rows replaced.
      const auto dense_weight = weight.clone().requires_grad_();
      const auto dense_features = features.clone().requires_grad_();
      const auto dense = at::embedding(dense_weight, ids.t()).view({-1, kH}).index_copy(0, left_out, dense_features);
      (dense.view({S, kB, kH}) * loss_weights).sum().backward();

      auto embedding = make_embedding(ParallelEmbeddingOptions(V, kH).sequence_parallel(sequence_parallel), tp, weight);
      const auto partial = embedding->partial(ids, left_out);
      const auto zeros = on_device(at::zeros({left_out.size(0), kH}));
      EXPECT_TRUE(test_support::equal(partial.view({-1, kH}).index_select(0, on_device(left_out)), zeros));
      const auto own_features = on_device(features).clone().requires_grad_();
      if (tp->getRank() == 0) partial.view({-1, kH}).index_copy_(0, on_device(left_out), own_features);
      const auto output = embedding->reduce(partial);
      const auto whole = dense.detach().view({S, kB, kH});
      EXPECT_TRUE(test_support::equal(output, sequence_parallel ? part(whole, 0, tp) : whole));
      (output * on_device(sequence_parallel ? part(loss_weights, 0, tp) : loss_weights)).sum().backward();
      EXPECT_TRUE(test_support::equal(embedding->weight.grad(), own_rows(dense_weight.grad(), tp)));
      if (tp->getRank() == 0) {
        EXPECT_TRUE(test_support::equal(own_features.grad(), dense_features.grad()));
      }
    }
  }
}

TEST(VocabParallelEmbedding, RowsLeftOutGetNoGradientFromTheirIds) {
  for (const int t : test_support::divisors_of_world()) {
    const int64_t V = 5 * t - 2;
    const auto ids = make_ids(V, t, 4 * t);
    const auto everything = at::arange(4 * t * kB, at::kLong);
    auto embedding = make_embedding({V, kH}, groups(t).tp, exact_values({V, kH}, 1));
    const auto output = embedding->forward(ids);  // for comparison: somebody has a gradient
    const auto left_out = embedding->reduce(embedding->partial(ids, everything));
    EXPECT_TRUE(test_support::equal(left_out, at::zeros({4 * t, kB, kH})));
    left_out.sum().backward();
    EXPECT_TRUE(test_support::equal(embedding->weight.grad(), at::zeros_like(embedding->weight)));
    output.sum().backward();
    EXPECT_FALSE(parallel::all_reduce(embedding->weight.grad(), groups(t).tp).eq(0).all().item<bool>());
  }
}

TEST(VocabParallelEmbedding, FrozenWeightsHaveNoGradient) {
  for (const int t : test_support::divisors_of_world()) {
    for (const bool sequence_parallel : {false, true}) {
      const auto& tp = groups(t).tp;
      const int64_t V = 5 * t - 2;
      const auto ids = make_ids(V, t, 4 * t);
      const auto weight = exact_values({V, kH}, 1);
      auto embedding = make_embedding(ParallelEmbeddingOptions(V, kH).sequence_parallel(sequence_parallel), tp, weight);
      embedding->weight.requires_grad_(false);
      const auto output = embedding->forward(ids);
      EXPECT_FALSE(output.requires_grad());
      const auto dense = at::embedding(weight, ids.t());
      EXPECT_TRUE(test_support::equal(output, sequence_parallel ? part(dense, 0, tp) : dense));
      // A trainable row among frozen ones still gets its gradient.
      const auto feature = on_device(at::ones({kH})).requires_grad_();
      const auto partial = embedding->partial(ids, at::zeros({1}, at::kLong));
      partial[0][0].add_(feature);
      embedding->reduce(partial).sum().backward();
      EXPECT_EQ(feature.grad().sum().item<float>(), static_cast<float>(kH));
    }
  }
}

TEST(VocabParallelEmbedding, AccumulatingIntoGradIsTheSameAsAutograds) {
  for (const int t : test_support::divisors_of_world()) {
    const auto& tp = groups(t).tp;
    const int64_t V = 5 * t - 2;
    const auto weight = exact_values({V, kH}, 1);
    std::vector<at::Tensor> gradients;
    for (const bool accumulate_into_grad : {false, true}) {
      auto embedding =
          make_embedding(ParallelEmbeddingOptions(V, kH).accumulate_into_grad(accumulate_into_grad), tp, weight);
      for (int64_t pass = 0; pass < 2; ++pass) {
        const auto ids = make_ids(V, t, 4 * t).roll(pass, 1);
        const auto output = embedding->forward(ids);
        const void* memory = embedding->weight.grad().defined() ? embedding->weight.grad().data_ptr() : nullptr;
        (output * on_device(exact_values({4 * t, kB, kH}, 30 + pass))).sum().backward();
        if (memory != nullptr && accumulate_into_grad) {
          EXPECT_EQ(embedding->weight.grad().data_ptr(), memory);
        }
      }
      gradients.push_back(embedding->weight.grad());
    }
    EXPECT_TRUE(test_support::equal(gradients[1], gradients[0]));
  }
}

TEST(VocabParallelEmbedding, RefusesIdsOutsideTheVocabularyOnEveryRank) {
  for (const int t : test_support::divisors_of_world()) {
    const auto recorded = parallel::record(groups(t).tp);
    const int64_t V = 5 * t - 2;
    auto embedding = make_embedding({V, kH}, recorded.group, exact_values({V, kH}, 1));
    for (const int64_t wrong : {V, int64_t{-1}}) {  // V is a row of the padding
      auto ids = make_ids(V, t, 4 * t);
      ids[1][2] = wrong;
      EXPECT_EQ(value_error([&] { embedding->forward(ids); }),
                "token id " + std::to_string(wrong) + " at batch row 1, position 2 is outside the vocabulary [0, " +
                    std::to_string(V) + ")");
    }
    EXPECT_NE(value_error([&] { embedding->forward(at::zeros({4}, at::kLong)); }).find("[B, S] int64"),
              std::string::npos);
    EXPECT_NE(value_error([&] {
                embedding->forward(at::zeros({4, 4}, at::kInt));
              }).find("got [4, 4] Int"),
              std::string::npos);
    EXPECT_EQ(recorded.count->total(), 0);
  }
}

TEST(VocabParallelEmbedding, RefusesRowsToLeaveOutThatTheHostCannotRead) {
  const auto& tp = test_support::single();
  VocabParallelEmbedding embedding(ParallelEmbeddingOptions(8, kH), tp);
  const auto ids = at::zeros({1, 4}, at::kLong);
  for (const auto& rows : {at::zeros({1}, at::TensorOptions(at::kLong).device(at::kMeta)), at::zeros({1}, at::kInt),
                           at::zeros({1, 1}, at::kLong)}) {
    EXPECT_TRUE(contains(value_error([&] { embedding->partial(ids, rows); }), "rows_left_out must be [n] int64"));
  }
}

// What a rank looks up of ids on a GPU, which the host doesn't read. It works on the CPU as well.
TEST(VocabParallelEmbedding, LooksUpIdsOfAGpuInRowsHereAndThere) {
  constexpr int64_t kRows = 10;
  const auto ids = at::arange(4 * kRows, at::kLong).flip(0).view({2, -1});
  const auto left_out = at::tensor({2, 0}, at::kLong);
  const auto look_up = megatron_cpp::internal::plan_look_up_on_device(ids, left_out, 4 * kRows, {kRows, 2 * kRows});
  const auto by_row = ids.t().reshape({-1}).index_select(0, look_up.output_rows);
  EXPECT_EQ(look_up.output_rows.size(0), 4 * kRows - 2);
  EXPECT_EQ(look_up.output_rows.eq(2).sum().item<int64_t>(), 0);
  const auto here = by_row.ge(kRows).logical_and(by_row.lt(2 * kRows));
  EXPECT_EQ(here.sum().item<int64_t>(), kRows);
  EXPECT_TRUE(test_support::equal(look_up.table_rows.masked_select(here), by_row.masked_select(here) - kRows));
  // Four ids, or fewer, to a row.
  const auto uses = at::bincount(look_up.table_rows, {}, kRows);
  EXPECT_EQ(uses.sizes(), (std::vector<int64_t>{kRows}));
  EXPECT_LE(uses.max().item<int64_t>(), 4);
}

TEST(VocabParallelEmbedding, RefusesSequencesThatDoNotDivide) {
  for (const int t : test_support::divisors_of_world()) {
    if (t == 1) continue;
    const auto recorded = parallel::record(groups(t).tp);
    auto embedding =
        make_embedding(ParallelEmbeddingOptions(7, kH).sequence_parallel(true), recorded.group, at::ones({7, kH}));
    EXPECT_EQ(
        value_error([&] {
          embedding->forward(at::zeros({2, t + 1}, at::kLong));
        }),
        "sequence length " + std::to_string(t + 1) + " is not divisible by tensor-parallel size " + std::to_string(t));
    EXPECT_EQ(recorded.count->total(), 0);
  }
}

TEST(LanguageModelEmbedding, IsTheThreeStepsInARow) {
  for (const int t : test_support::divisors_of_world()) {
    for (const bool sequence_parallel : {false, true}) {
      const auto& tp = groups(t).tp;
      const int64_t V = 5 * t - 2;
      const auto ids = make_ids(V, t, 4 * t);
      const auto positions = at::arange(4 * t, at::kLong).expand({kB, 4 * t});
      const auto weight = exact_values({V, kH}, 1);
      LanguageModelEmbedding embedding(ParallelEmbeddingOptions(V, kH).sequence_parallel(sequence_parallel), tp);
      embedding->to(test_support::runtime().device());
      {
        const at::NoGradGuard no_grad;
        embedding->word_embeddings->weight.copy_(own_rows(weight, tp));
      }
      const auto dense = at::embedding(weight, ids.t());
      const auto expected = sequence_parallel ? part(dense, 0, tp) : dense;
      EXPECT_TRUE(test_support::equal(embedding->forward(ids), expected));
      EXPECT_TRUE(test_support::equal(embedding->forward(ids, positions), expected));
      EXPECT_TRUE(
          test_support::equal(embedding->finish(embedding->reduce(embedding->partial(ids)), positions), expected));

      EXPECT_EQ(embedding->tp().get(), tp.get());
      EXPECT_EQ(embedding->sequence_parallel(), sequence_parallel);
      EXPECT_EQ(embedding->hidden_size(), kH);
      const auto shards = parameter_shards(*embedding);
      EXPECT_EQ(shards.size(), 1U);
      EXPECT_EQ(shards.at(0).name, "word_embeddings.weight");
      EXPECT_EQ(shards.at(0).segments[0].name, "word_embeddings.weight");
    }
  }
}

}  // namespace megatron_cpp
