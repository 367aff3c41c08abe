// The check of users' own embeddings: passes right ones, and names what is wrong with wrong ones.
#include "megatron_cpp/testing/check_parallel_embedding.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "examples/other_vlm/round_robin_embedding.h"
#include "megatron_cpp/tensor_parallel/hidden_parallel_embedding.h"
#include "megatron_cpp/tensor_parallel/vocab_parallel_embedding.h"
#include "parallel/agree.h"
#include "parallel/collectives.h"
#include "tests/support/test_world.h"

namespace megatron_cpp {
namespace {

using at::Tensor;

template <class Embedding, class... More>
std::shared_ptr<ParallelEmbedding> make(const ParallelEmbeddingOptions& options, const parallel::GroupPtr& tp,
                                        const More&... more) {
  auto embedding = std::make_shared<Embedding>(options, tp, more...);
  embedding->to(test_support::runtime().device());
  return embedding;
}

/// One sentence a line, after it was compared between the ranks.
std::string violations(const MakeEmbedding& maker, const parallel::GroupPtr& tp) {
  std::string lines;
  for (const auto& sentence : check_parallel_embedding(maker, tp)) lines += sentence + "\n";
  EXPECT_EQ(lines, parallel::broadcast_text(lines, 0, tp));
  return lines;
}

void expect_conforms(const MakeEmbedding& maker) {
  for (const int t : test_support::divisors_of_world()) EXPECT_EQ(violations(maker, test_support::groups(t).tp), "");
}

/// Expects exactly one violation over the whole world, which contains all `texts`; none on fewer than `least_t` ranks.
void expect_violation(int least_t, const std::vector<std::string>& texts, const MakeEmbedding& maker) {
  const auto found = violations(maker, test_support::world_tp());
  const bool shows = test_support::runtime().size() >= least_t;
  EXPECT_EQ(std::count(found.begin(), found.end(), '\n'), shows ? 1 : 0) << texts[0] << "\n" << found;
  for (const auto& text : texts) EXPECT_EQ(found.find(text) != std::string::npos, shows) << text << "\n" << found;
}

class Spoilt;

/// What a Spoilt does instead of a right embedding, or to its answer.
struct Spoiling {
  std::function<Tensor(Spoilt& self)> partial = {};
  std::function<void(const Spoilt& self, std::vector<int64_t>& ranks)> holders = {};
  std::function<void(const Spoilt& self, Box& box)> segment = {};
  std::function<Part(const Spoilt& self)> layout = {};
};

/// A right embedding, spoilt at one place.
class Spoilt : public VocabParallelEmbeddingImpl {
 public:
  Spoilt(const ParallelEmbeddingOptions& options, const parallel::GroupPtr& tp, Spoiling spoiling)
      : VocabParallelEmbeddingImpl(options, tp), spoiling_(std::move(spoiling)) {}

  Tensor ids, rows;  ///< what partial() is asked for
  Tensor right() { return VocabParallelEmbeddingImpl::partial(ids, rows); }
  Tensor right(const Tensor& other_ids, const Tensor& other_rows) {
    right();  // for its checks
    return VocabParallelEmbeddingImpl::partial(other_ids, other_rows);
  }
  /// With `hook` before its backward.
  Tensor right(const std::function<void()>& hook) {
    auto partial = right();
    if (partial.requires_grad()) partial.register_hook([hook](const Tensor& /*gradient*/) { hook(); });
    return partial;
  }
  /// `tensor` [S, B, ..] with zeros in rows left out, without telling autograd.
  Tensor masked(const Tensor& tensor) {
    if (rows.defined()) tensor.detach().flatten(0, 1).index_fill_(0, rows.to(tensor.device()), 0);
    return tensor;
  }
  /// [S, B, 1]: 1 in rows that other ranks find and that aren't left out.
  Tensor others() {
    right();  // for its checks
    const auto flags = at::tensor(holders(ids)).ne(tp()->getRank()).view({ids.size(1), ids.size(0), 1});
    return masked(flags.to(weight.options().requires_grad(false)));
  }
  bool is(int rank) const { return tp()->getRank() == rank; }
  bool is_last() const { return is(tp()->getSize() - 1); }

  Tensor partial(const Tensor& input_ids, const Tensor& rows_left_out) override {
    ids = input_ids;
    rows = rows_left_out;
    return spoiling_.partial ? spoiling_.partial(*this) : right();
  }
  std::vector<int64_t> holders(const Tensor& input_ids) const override {
    auto ranks = VocabParallelEmbeddingImpl::holders(input_ids);
    if (spoiling_.holders) spoiling_.holders(*this, ranks);
    return ranks;
  }
  Part layout() const override { return spoiling_.layout ? spoiling_.layout(*this) : Part::kSummand; }
  std::vector<ParameterShard> own_parameters() const override {
    auto shards = VocabParallelEmbeddingImpl::own_parameters();
    if (spoiling_.segment) spoiling_.segment(*this, shards[0].segments[0].box);
    return shards;
  }

 private:
  Spoiling spoiling_;
};

MakeEmbedding spoilt(const Spoiling& spoiling) {
  return [spoiling](const auto& options, const auto& tp) { return make<Spoilt>(options, tp, spoiling); };
}
void expect_wrong(int least_t, const std::vector<std::string>& texts, const std::function<Tensor(Spoilt&)>& partial) {
  expect_violation(least_t, texts, spoilt({.partial = partial}));
}

/// For ids 0, 1, 2, ...
struct ReturnsAViewOfTheTable : HiddenParallelEmbeddingImpl {
  using HiddenParallelEmbeddingImpl::HiddenParallelEmbeddingImpl;
  Tensor partial(const Tensor& ids, const Tensor& rows) override {
    const auto right = HiddenParallelEmbeddingImpl::partial(ids, rows);
    return at::equal(ids, at::arange(ids.size(1)).unsqueeze(0)) ? weight.narrow(0, 0, ids.size(1)).unsqueeze(1) : right;
  }
};

struct ListsASegmentTwice : VocabParallelEmbeddingImpl {
  using VocabParallelEmbeddingImpl::VocabParallelEmbeddingImpl;
  std::vector<ParameterShard> own_parameters() const override {
    auto shards = VocabParallelEmbeddingImpl::own_parameters();
    shards[0].segments.push_back(shards[0].segments[0]);
    return shards;
  }
};

}  // namespace

TEST(CheckParallelEmbedding, PassesRightOnes) {
  expect_conforms(make<VocabParallelEmbeddingImpl>);
  expect_conforms(make<HiddenParallelEmbeddingImpl>);
  expect_conforms(make<RoundRobinEmbedding>);
  expect_conforms(spoilt({.partial = [](Spoilt& self) {  // masks by multiplication, in backward, too
    const auto all = self.right(self.ids, {});
    return all * self.masked(at::ones_like(all.detach()));
  }}));
}

TEST(CheckParallelEmbedding, NamesWrongPartials) {
  const int t = test_support::runtime().size();
  const auto S = std::to_string(3 * t);
  expect_wrong(1, {std::to_string(2 * t) + " rows left out: partial(): it is", "expected 0"},
               [](Spoilt& self) { return self.right(self.ids, {}); });
  expect_wrong(2, {"0 rows left out: partial(): it is 1 in row", "expected 0"},
               [](Spoilt& self) { return self.others() + self.right(); });
  expect_wrong(1, {"0 rows left out: partial(): it is"},
               [](Spoilt& self) { return self.right(self.ids.sub(1).clamp_min(0), self.rows); });
  const auto kept = std::make_shared<std::pair<Tensor, Tensor>>();  // ids, partial
  expect_wrong(1, {"partial(): its memory is that of another partial"}, [kept](Spoilt& self) {
    if (!self.right().requires_grad() || !self.ids.is_same(kept->first)) *kept = {self.ids, self.right()};
    return kept->second;
  });
  expect_violation(1, {"partial(): its memory is", "or the weight's"}, make<ReturnsAViewOfTheTable>);
  expect_wrong(1, {"BFloat16, V", "partial(): it is float on", "expected c10::BFloat16 on"},
               [](Spoilt& self) { return self.right().to(at::kFloat); });
  expect_wrong(1, {"partial(): it has shape [2, " + S + ", ", "expected [" + S + ", 2, "},
               [](Spoilt& self) { return self.right().transpose(0, 1).contiguous(); });
  expect_wrong(1, {"partial(): it is undefined or isn't contiguous"},
               [](Spoilt& self) { return self.right().transpose(1, 2).contiguous().transpose(1, 2); });
  expect_wrong(1, {"partial(): it has no gradient function"}, [](Spoilt& self) {
    const auto right = self.right();
    return right.eq(0).all().item<bool>() ? right.detach() : right;
  });
  expect_wrong(1, {"partial(): it trains a frozen weight"}, [](Spoilt& self) { return self.right().requires_grad_(); });
  expect_wrong(2, {"communication: ", " collectives beside that of reduce()"}, [](Spoilt& self) {
    parallel::all_reduce(self.weight.detach(), self.tp());
    return self.right();
  });
  expect_wrong(1, {"c10::ValueError that names id -1: nothing was thrown"}, [](Spoilt& self) {
    self.ids = self.ids.clamp_min(0);
    return self.right();
  });
  expect_wrong(1, {"c10::ValueError that names row to leave out ", ": bad row"}, [](Spoilt& self) {
    TORCH_CHECK_VALUE(!self.rows.defined() || self.rows.lt(self.ids.numel()).all().item<bool>(), "bad row");
    return self.right();
  });
}

TEST(CheckParallelEmbedding, NamesWrongFinders) {
  expect_violation(2, {"holders(): the list is 1 in row 0, column 0, expected 0"},
                   spoilt({.holders = [](auto& self, auto& ranks) {
                     for (auto& rank : ranks) rank = (rank + 1) % self.tp()->getSize();
                   }}));
  expect_violation(1, {"ids [2, ", "holders(): the list has shape [", "expected ["},
                   spoilt({.holders = [](auto& /*self*/, auto& ranks) { ranks.resize(ranks.size() / 2); }}));
  expect_violation(
      2, {"ranks disagree: the length of holders() is 0 on rank 0"},
      spoilt({.holders = [](auto& self, auto& ranks) { ranks.resize(self.is_last() ? ranks.size() : 0); }}));
}

TEST(CheckParallelEmbedding, NamesWrongGradients) {
  const std::string what = "backward: the weight's gradient after pass ";
  expect_wrong(1, {what + "1 of 2 is "}, [](Spoilt& self) { return self.masked(self.right(self.ids, {})); });
  expect_wrong(2, {what + "1 of 2 is "}, [](Spoilt& self) {
    const auto others = self.others() * self.weight[0];
    return self.right() + others - others.detach();
  });
  expect_wrong(1, {what + "2 of 2 is "}, [](Spoilt& self) {
    return self.right([weight = self.weight] {
      if (weight.grad().defined()) weight.grad().zero_();
    });
  });
  expect_wrong(1, {what + "2 of 2 isn't where it was before"}, [](Spoilt& self) {
    return self.right([weight = self.weight] {
      if (weight.grad().defined()) weight.mutable_grad() = weight.grad().clone();
    });
  });
}

TEST(CheckParallelEmbedding, NamesWrongSetUps) {
  expect_violation(1, {"sequence_parallel false", "options() are others than"}, [](auto options, const auto& tp) {
    return make<VocabParallelEmbeddingImpl>(options.sequence_parallel(true), tp);
  });
  expect_violation(1, {"tp() is another group than make was given"}, [](const auto& options, const auto& /*tp*/) {
    return make<HiddenParallelEmbeddingImpl>(options, test_support::world_tp());
  });
  const std::string count = "own_parameters(): the number of segments with an element is ";
  expect_violation(1, {count + "0 in row 3, column 0, expected 1"},
                   spoilt({.segment = [](auto& self, auto& box) { box.length[0] -= self.is(0); }}));
  expect_violation(2, {count + "2 in row 3, column 0, expected 1"},
                   spoilt({.segment = [](auto& self, auto& box) { box.begin[0] -= self.is(1); }}));
  expect_violation(1, {count + "2 in row 0, column 0, expected 1"}, make<ListsASegmentTwice>);
  expect_violation(1, {"set-up: own_parameters(): [", "isn't a part of weight"},
                   spoilt({.segment = [](auto& self, auto& box) { box.length[0] += self.is_last(); }}));
  expect_violation(2, {"ranks disagree: layout() is 0 on rank 0 and 1 on rank"},
                   spoilt({.layout = [](const Spoilt& self) { return Part(self.is_last()); }}));
}

// Here a rank that went on, or didn't, would hang the others.
TEST(CheckParallelEmbedding, SurvivesWhatOneRankThrows) {
  const int t = test_support::runtime().size();
  const auto of_last = t == 1 ? "" : " (rank " + std::to_string(t - 1) + " of " + std::to_string(t) + ")";
  const auto throw_if = [](bool last, const Tensor& right = {}) {
    if (last) throw std::runtime_error("not today");
    return right;
  };
  expect_wrong(1, {"partial(): not today" + of_last},
               [=](Spoilt& self) { return throw_if(self.is_last(), self.right()); });
  expect_wrong(1, {"backward: not today" + of_last},
               [=](Spoilt& self) { return self.right([=, last = self.is_last()] { throw_if(last); }); });
  const auto make_but_on_last = [](const std::function<void()>& on_last) {
    return [=](const ParallelEmbeddingOptions& options, const parallel::GroupPtr& tp) {
      if (tp->getRank() < tp->getSize() - 1) return make<RoundRobinEmbedding>(options, tp);
      on_last();
      return std::shared_ptr<ParallelEmbedding>();
    };
  };
  expect_violation(1, {"set-up: not today" + of_last}, make_but_on_last([=] { throw_if(true); }));
  expect_violation(1, {"set-up: make returned no embedding" + of_last}, make_but_on_last([] {}));
}

}  // namespace megatron_cpp
