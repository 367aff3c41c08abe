// The check of users' own embeddings: passes right ones, and names what is wrong with wrong ones.
#include "megatron_cpp/conformance/embedding_conformance.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "megatron_cpp/tensor_parallel/hidden_parallel_embedding.h"
#include "megatron_cpp/tensor_parallel/vocab_parallel_embedding.h"
#include "parallel/agree.h"
#include "parallel/collectives.h"
#include "tests/support/test_world.h"

namespace {

using megatron::HiddenParallelEmbeddingImpl;
using megatron::MakeEmbedding;
using megatron::ParallelEmbedding;
using megatron::ParallelEmbeddingOptions;
using megatron::ParameterShard;
using megatron::PartialLayout;
using megatron::VocabParallelEmbeddingImpl;
using test_support::groups;

/// An embedding as a user would write it: ids are dealt like cards, rank r of t holds those with id % t == r.
class RoundRobinEmbedding : public ParallelEmbedding {
 public:
  RoundRobinEmbedding(const ParallelEmbeddingOptions& options, const parallel::GroupPtr& group)
      : ParallelEmbedding(options, group), t_(group->getSize()), rank_(group->getRank()) {
    const int64_t num_ids = (options.vocabulary_size() - rank_ + t_ - 1) / t_;
    weight = register_parameter("weight", at::zeros({num_ids, options.hidden_size()}));
  }

  at::Tensor partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out = {}) override {
    const auto ids = input_ids.t().reshape({-1});
    check_range("token id", ids, options().vocabulary_size());
    auto found = ids.remainder(t_).eq(rank_);
    if (rows_left_out.defined()) {
      check_range("row to leave out", rows_left_out, ids.numel());
      found.index_fill_(0, rows_left_out, 0);
    }
    const auto rows = found.nonzero().view({-1});
    const auto words = weight.index_select(0, ids.index_select(0, rows).floor_divide(t_).to(weight.device()));
    return at::zeros({ids.numel(), hidden_size()}, words.options())
        .index_copy(0, rows.to(weight.device()), words)
        .view({input_ids.size(1), input_ids.size(0), hidden_size()});
  }

  PartialLayout layout() const override { return PartialLayout::kSummand; }

  std::vector<int64_t> finders(const at::Tensor& input_ids) const override {
    const auto ranks = input_ids.t().remainder(t_).contiguous();
    return {ranks.const_data_ptr<int64_t>(), ranks.const_data_ptr<int64_t>() + ranks.numel()};
  }

  std::vector<ParameterShard> own_parameters() const override {
    const std::vector<int64_t> table{options().vocabulary_size(), hidden_size()};
    ParameterShard shard;
    shard.name = "weight";
    shard.parameter = weight;
    shard.domain = megatron::GradientDomain::kSharded;
    for (int64_t row = 0; row < weight.size(0); ++row) {
      shard.segments.push_back(
          megatron::ParameterSegment::rows("weight", table, /*dim=*/0, row * t_ + rank_, row, /*length=*/1));
    }
    shard.initial_value = megatron::InitialValue::normal(options().init_std());
    return {std::move(shard)};
  }

 private:
  static void check_range(const char* what, const at::Tensor& numbers, int64_t end) {
    const auto wrong = numbers.masked_select(numbers.lt(0).logical_or(numbers.ge(end)));
    TORCH_CHECK_VALUE(wrong.numel() == 0, what, " ", wrong[0].item<int64_t>(), " is outside [0, ", end, ")");
  }
  int64_t t_, rank_;
};

template <class Embedding>
std::shared_ptr<ParallelEmbedding> make(const ParallelEmbeddingOptions& options, const parallel::GroupPtr& tp) {
  auto embedding = std::make_shared<Embedding>(options, tp);
  embedding->to(test_support::runtime().device());
  return embedding;
}

/// One sentence a line, after it was compared between the ranks.
std::string violations(const MakeEmbedding& make_embedding, const parallel::GroupPtr& tp) {
  std::string lines;
  for (const auto& sentence : megatron::check_parallel_embedding(make_embedding, tp)) lines += sentence + "\n";
  EXPECT_EQ(lines, parallel::broadcast_text(lines, 0, tp));
  return lines;
}

void expect_conforms(const MakeEmbedding& make_embedding) {
  for (const int t : test_support::divisors_of_world()) EXPECT_EQ(violations(make_embedding, groups(t).tp), "");
}

/// Expects exactly one violation over the whole world, which contains all `texts`. On fewer than `least_t` ranks the
/// mistake can't show.
void expect_violation(const MakeEmbedding& make_embedding, const std::vector<std::string>& texts, int least_t = 1) {
  const auto found = violations(make_embedding, test_support::world_tp());
  if (test_support::runtime().size() < least_t) {
    EXPECT_EQ(found, "");
    return;
  }
  EXPECT_EQ(std::count(found.begin(), found.end(), '\n'), 1) << found;
  for (const auto& text : texts) EXPECT_NE(found.find(text), std::string::npos) << text << " isn't in\n" << found;
}

/// A right embedding, to be spoilt at one place.
class Spoilt : public VocabParallelEmbeddingImpl {
 public:
  using VocabParallelEmbeddingImpl::VocabParallelEmbeddingImpl;

 protected:
  at::Tensor right_partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out) {
    return VocabParallelEmbeddingImpl::partial(input_ids, rows_left_out);
  }
  bool is_last_rank() const { return tp()->getRank() == tp()->getSize() - 1; }
};

struct FillsRowsLeftOut : Spoilt {
  using Spoilt::Spoilt;
  at::Tensor partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out) override {
    right_partial(input_ids, rows_left_out);  // for its checks
    return right_partial(input_ids, {});
  }
};

struct FillsOthersRows : Spoilt {
  using Spoilt::Spoilt;
  at::Tensor partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out) override {
    auto right = right_partial(input_ids, rows_left_out);
    auto others = at::tensor(finders(input_ids)).ne(tp()->getRank());
    if (rows_left_out.defined()) others.index_fill_(0, rows_left_out, 0);
    return right + others.to(right.options().requires_grad(false)).view({right.size(0), right.size(1), 1});
  }
};

struct ReturnsWhatItKeeps : HiddenParallelEmbeddingImpl {
  using HiddenParallelEmbeddingImpl::HiddenParallelEmbeddingImpl;
  at::Tensor partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out) override {
    auto right = HiddenParallelEmbeddingImpl::partial(input_ids, rows_left_out);
    if (right.requires_grad() && input_ids.is_same(ids_)) return kept_;
    ids_ = input_ids;
    kept_ = right;
    return right;
  }
  at::Tensor ids_, kept_;
};

struct ReturnsFloat32 : Spoilt {
  using Spoilt::Spoilt;
  at::Tensor partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out) override {
    return right_partial(input_ids, rows_left_out).to(at::kFloat);
  }
};

struct ReturnsBatchFirst : Spoilt {
  using Spoilt::Spoilt;
  at::Tensor partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out) override {
    return right_partial(input_ids, rows_left_out).transpose(0, 1).contiguous();
  }
};

struct ReturnsATransposedView : Spoilt {
  using Spoilt::Spoilt;
  at::Tensor partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out) override {
    return right_partial(input_ids, rows_left_out).transpose(1, 2).contiguous().transpose(1, 2);
  }
};

struct NamesOtherFinders : Spoilt {
  using Spoilt::Spoilt;
  std::vector<int64_t> finders(const at::Tensor& input_ids) const override {
    auto ranks = VocabParallelEmbeddingImpl::finders(input_ids);
    for (auto& rank : ranks) rank = (rank + 1) % tp()->getSize();
    return ranks;
  }
};

struct NamesFindersOfOneBatchRow : Spoilt {
  using Spoilt::Spoilt;
  std::vector<int64_t> finders(const at::Tensor& input_ids) const override {
    return VocabParallelEmbeddingImpl::finders(input_ids.narrow(0, 0, 1));
  }
};

struct NamesFindersOnOneRankOnly : Spoilt {
  using Spoilt::Spoilt;
  std::vector<int64_t> finders(const at::Tensor& input_ids) const override {
    return is_last_rank() ? VocabParallelEmbeddingImpl::finders(input_ids) : std::vector<int64_t>();
  }
};

/// Masks by multiplication, in forward and so in backward: 0 * NaN is NaN.
struct MultipliesRowsLeftOutByZero : Spoilt {
  using Spoilt::Spoilt;
  at::Tensor partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out) override {
    auto right = right_partial(input_ids, {});
    auto kept = at::ones({input_ids.numel()}, right.options().requires_grad(false));
    if (rows_left_out.defined()) {
      right_partial(input_ids, rows_left_out);  // for its checks
      kept.index_fill_(0, rows_left_out.to(kept.device()), 0);
    }
    return right * kept.view({right.size(0), right.size(1), 1});
  }
};

struct OverwritesTheGradient : Spoilt {
  using Spoilt::Spoilt;
  at::Tensor partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out) override {
    auto right = right_partial(input_ids, rows_left_out);
    if (right.requires_grad()) {
      right.register_hook([table = weight](const at::Tensor& /*gradient*/) {
        if (table.grad().defined()) table.grad().zero_();
      });
    }
    return right;
  }
};

struct ReplacesTheGradient : Spoilt {
  using Spoilt::Spoilt;
  at::Tensor partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out) override {
    auto right = right_partial(input_ids, rows_left_out);
    if (right.requires_grad()) {
      right.register_hook([table = weight](const at::Tensor& /*gradient*/) {
        if (table.grad().defined()) table.mutable_grad() = table.grad().clone();
      });
    }
    return right;
  }
};

struct ReturnsPlainZerosWhereItFindsNothing : Spoilt {
  using Spoilt::Spoilt;
  at::Tensor partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out) override {
    auto right = right_partial(input_ids, rows_left_out);
    return right.eq(0).all().item<bool>() ? right.detach() : right;
  }
};

struct OwnsLess : Spoilt {
  using Spoilt::Spoilt;
  std::vector<ParameterShard> own_parameters() const override {
    auto shards = VocabParallelEmbeddingImpl::own_parameters();
    if (tp()->getRank() == 0) shards[0].segments[0].box.length[0] -= 1;
    return shards;
  }
};

struct OwnsWhatOthersOwn : Spoilt {
  using Spoilt::Spoilt;
  std::vector<ParameterShard> own_parameters() const override {
    auto shards = VocabParallelEmbeddingImpl::own_parameters();
    if (tp()->getRank() == 1) shards[0].segments[0].box.begin[0] -= 1;
    return shards;
  }
};

struct OwnsMoreThanThereIs : Spoilt {
  using Spoilt::Spoilt;
  std::vector<ParameterShard> own_parameters() const override {
    auto shards = VocabParallelEmbeddingImpl::own_parameters();
    if (is_last_rank()) shards[0].segments[0].box.length[0] += 1;
    return shards;
  }
};

struct AcceptsAnyId : Spoilt {
  using Spoilt::Spoilt;
  at::Tensor partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out) override {
    return right_partial(input_ids.clamp_min(0), rows_left_out);
  }
};

struct RefusesWithoutTheNumber : Spoilt {
  using Spoilt::Spoilt;
  at::Tensor partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out) override {
    TORCH_CHECK_VALUE(!rows_left_out.defined() || rows_left_out.lt(input_ids.numel()).all().item<bool>(), "bad row");
    return right_partial(input_ids, rows_left_out);
  }
};

struct ThrowsOnOneRank : Spoilt {
  using Spoilt::Spoilt;
  at::Tensor partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out) override {
    auto right = right_partial(input_ids, rows_left_out);
    if (is_last_rank()) throw std::runtime_error("not today");
    return right;
  }
};

struct ThrowsOnOneRankInBackward : Spoilt {
  using Spoilt::Spoilt;
  at::Tensor partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out) override {
    auto right = right_partial(input_ids, rows_left_out);
    if (is_last_rank() && right.requires_grad()) {
      right.register_hook([](const at::Tensor& /*gradient*/) { throw std::runtime_error("not today"); });
    }
    return right;
  }
};

struct Communicates : Spoilt {
  using Spoilt::Spoilt;
  at::Tensor partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out) override {
    auto right = right_partial(input_ids, rows_left_out);
    parallel::all_reduce(right.detach(), tp());
    return right;
  }
};

struct IsColumnsOnOneRank : Spoilt {
  using Spoilt::Spoilt;
  PartialLayout layout() const override { return is_last_rank() ? PartialLayout::kColumns : PartialLayout::kSummand; }
};

}  // namespace

TEST(EmbeddingConformance, OfThisLibrarysEmbeddings) {
  expect_conforms(make<VocabParallelEmbeddingImpl>);
  expect_conforms(make<HiddenParallelEmbeddingImpl>);
}

TEST(EmbeddingConformance, OfAUsersOwn) { expect_conforms(make<RoundRobinEmbedding>); }

TEST(EmbeddingConformance, NamesWrongPartials) {
  const auto sequence = std::to_string(4 * test_support::runtime().size());
  expect_violation(make<FillsRowsLeftOut>, {"partial's rows left out", "rows left out: some", "expected 0"});
  expect_violation(make<FillsOthersRows>, {"partial's rows of ids that are other ranks'", "expected 0"}, 2);
  expect_violation(make<ReturnsWhatItKeeps>, {"partial's memory is that of another partial"});
  expect_violation(make<ReturnsFloat32>, {"bfloat16, V", "partial's dtype is Float, expected BFloat16"});
  expect_violation(make<ReturnsBatchFirst>,
                   {"partial's shape is [1, " + sequence + ", ", "expected [" + sequence + ", 1, "});
  expect_violation(make<ReturnsATransposedView>, {"partial isn't contiguous"});
  expect_violation(make<ReturnsPlainZerosWhereItFindsNothing>, {"partial has no gradient function"});
  expect_violation(make<Communicates>, {"partial or finders took part in 2 collectives, expected none"}, 2);
}

TEST(EmbeddingConformance, NamesWrongFinders) {
  expect_violation(make<NamesOtherFinders>, {"finders give row 0, id 0, to rank 1"}, 2);
  expect_violation(make<NamesFindersOfOneBatchRow>, {"B 2", "finders are", "expected S*B = "});
  expect_violation(make<NamesFindersOnOneRankOnly>, {"finders is [", "on rank 0"}, 2);
}

TEST(EmbeddingConformance, NamesWrongGradients) {
  expect_violation(make<MultipliesRowsLeftOutByZero>,
                   {"rows left out: some", "after backward pass 1 of 2 is nan at [", "were NaN"});
  expect_violation(make<OverwritesTheGradient>, {"the weight's gradient after backward pass 2 of 2 is"});
  expect_violation(make<ReplacesTheGradient>, {"after backward pass 2 of 2 isn't where it was before"});
}

TEST(EmbeddingConformance, NamesWrongOwnParameters) {
  expect_violation(make<OwnsLess>, {"own_parameters() leave out element [3, 0] of the table"});
  expect_violation(make<OwnsWhatOthersOwn>,
                   {"own_parameters() have element [3, 0] of the table", "which is in 2 segments"}, 2);
  expect_violation(make<OwnsMoreThanThereIs>, {"own_parameters() have a segment of \"weight\"", "isn't a part of"});
  expect_violation(make<IsColumnsOnOneRank>, {"layout() is [1] here and [0] on rank 0"}, 2);
}

TEST(EmbeddingConformance, NamesWhatIsNotRefused) {
  expect_violation(make<AcceptsAnyId>, {"id -1 must be a c10::ValueError", "nothing was thrown"});
  expect_violation(make<RefusesWithoutTheNumber>,
                   {"row to leave out ", "must be a c10::ValueError", "a c10::ValueError says: bad row"});
}

// Here a rank that went on, or didn't, would hang the others.
TEST(EmbeddingConformance, SurvivesWhatOneRankThrows) {
  const int t = test_support::runtime().size();
  const auto of_last = ": rank " + std::to_string(t - 1) + ": ";
  const auto of_one = " (1 of " + std::to_string(t) + " ranks; ";
  expect_violation(make<ThrowsOnOneRank>, {of_last + "partial threw not today" + of_one});
  expect_violation(make<ThrowsOnOneRankInBackward>, {of_last + "backward threw not today" + of_one});
  expect_violation(
      [t](const ParallelEmbeddingOptions& options, const parallel::GroupPtr& tp) {
        if (tp->getRank() == t - 1) throw std::runtime_error("no memory");
        return make<RoundRobinEmbedding>(options, tp);
      },
      {of_last + "making it threw no memory" + of_one});
  expect_violation(
      [t](const ParallelEmbeddingOptions& options, const parallel::GroupPtr& tp) {
        return tp->getRank() == t - 1 ? nullptr : make<RoundRobinEmbedding>(options, tp);
      },
      {of_last + "make returned no embedding" + of_one});
}

TEST(EmbeddingConformance, NamesOptionsAndGroupsThatAreNotTheCallers) {
  expect_violation(
      [](ParallelEmbeddingOptions options, const parallel::GroupPtr& tp) {
        return make<VocabParallelEmbeddingImpl>(options.sequence_parallel(true), tp);
      },
      {"sequence_parallel 0", "options() say", "which isn't what make was given"});
  expect_violation(
      [](const ParallelEmbeddingOptions& options, const parallel::GroupPtr& /*tp*/) {
        return make<HiddenParallelEmbeddingImpl>(options, test_support::world_tp());
      },
      {"tp() is another group than the one given to make"});
}
