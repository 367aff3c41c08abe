#include "megatron_cpp/testing/check_parallel_embedding.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <set>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "parallel/agree.h"
#include "parallel/collectives.h"
#include "parallel/recording_backend.h"

namespace megatron_cpp {
namespace {

/// An embedding, its inputs, the expected values (on the CPU), and the faults found.
struct Check {
  parallel::GroupPtr tp;
  std::vector<std::string> sentences = {};
  std::set<std::string> broken = {};      ///< subjects that have a sentence
  std::string text = {};                  ///< sizes and options
  parallel::RecordedGroup recorded = {};  ///< the embedding's group
  std::shared_ptr<ParallelEmbedding> embedding = {};
  bool columns = false;                         ///< its layout is kColumns
  std::vector<ParameterSegment> segments = {};  ///< of its weight
  at::Tensor held = {};                         ///< [V, H], how many of the segments hold an element
  at::Tensor owners = {};                       ///< [V, 1], the rank that holds the whole row of an id, or -1
  at::Tensor table = {};                        ///< [V, H]
  at::Tensor ids = {};                          ///< [B, S]
  at::Tensor left_out = {};                     ///< [k] flat rows, or undefined

  /// Whether `check` succeeds on every rank; if not, adds a sentence about `subject`. Collective.
  bool holds(const std::string& subject, const std::function<void()>& check) {
    try {
      parallel::agree_on(check, tp);
      return true;
    } catch (const parallel::AgreedError& error) {
      if (broken.insert(subject).second) sentences.push_back(fmt::format("{}: {}: {}", text, subject, error.what()));
      return false;
    }
  }
  at::Tensor partial() const { return embedding->partial(ids, left_out); }
  /// The expected rows [S, B, H] of a table, zero where left out.
  at::Tensor look_up(const at::Tensor& whole) const {
    const auto rows = at::embedding(whole, ids.t());
    return left_out.defined() ? rows.flatten(0, 1).index_fill(0, left_out, 0).view_as(rows) : rows;
  }
  /// This rank's share of dimension `dim` if `shared`, otherwise all of `whole`.
  at::Tensor own(bool shared, int64_t dim, const at::Tensor& whole) const {
    return shared ? whole.chunk(tp->getSize(), dim)[static_cast<size_t>(tp->getRank())] : whole;
  }
};

/// Throws unless both are equal, naming the first row (flat number) that differs.
void expect_equal(const std::string& what, const at::Tensor& got, const at::Tensor& expected) {
  TORCH_CHECK_VALUE(got.sizes() == expected.sizes(), what, " has shape ", got.sizes(), ", expected ", expected.sizes());
  if (at::equal(got, expected)) return;
  const auto place = got.ne(expected).flatten(0, -2).nonzero()[0];
  const auto value = [&](const at::Tensor& of) { return of.flatten(0, -2)[place[0]][place[1]].item<double>(); };
  TORCH_CHECK_VALUE(false, what, " is ", value(got), " in row ", place[0].item<int64_t>(), ", column ",
                    place[1].item<int64_t>(), ", expected ", value(expected));
}

/// Makes the embedding, and reads which part of the table it holds.
void set_up(Check& check, const MakeEmbedding& make, const ParallelEmbeddingOptions& asked, at::ScalarType dtype) {
  check.embedding = make(asked, check.recorded.group);
  TORCH_CHECK_VALUE(check.embedding != nullptr, "make returned no embedding");
  check.embedding->to(dtype);
  check.columns = check.embedding->layout() == Part::kColumns;
  const auto& own = check.embedding->options();
  const auto& weight = check.embedding->weight;
  TORCH_CHECK_VALUE(check.embedding->tp() == check.recorded.group, "tp() is another group than make was given");
  TORCH_CHECK_VALUE(own.vocabulary_size() == asked.vocabulary_size() && own.hidden_size() == asked.hidden_size() &&
                        own.sequence_parallel() == asked.sequence_parallel(),
                    "options() are others than make was given");
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.requires_grad() && weight.dtype() == dtype, "weight ", weight.sizes(),
                    " ", weight.dtype(), " isn't a trainable matrix among the module's parameters");
  for (const auto& shard : parameter_shards(*check.embedding)) {
    if (shard.parameter.is_same(weight) && shard.domain == GradientDomain::kSharded) check.segments = shard.segments;
  }
  const auto table = check.held.sizes().vec();
  for (const auto& segment : check.segments) {
    TORCH_CHECK_VALUE(segment.name == "weight" && segment.global_shape == table && segment.box.is_in(table) &&
                          (Box{segment.local_begin, segment.box.length}).is_in(weight.sizes().vec()),
                      "own_parameters(): ", segment.box.text(), " of ", segment.name, " isn't a part of weight ",
                      check.held.sizes(), " that fits into ", weight.sizes());
    segment.in_global(check.held).add_(1);
  }
}

/// Throws unless the ranks together hold each element once, in one layout and device type. Sets owners. Collective.
void compare_ranks(Check& check) {
  const auto rows = parallel::all_gather(check.held.unsqueeze(0), check.tp);  // [t, V, H]
  const auto device = static_cast<int64_t>(check.embedding->weight.device().type());
  parallel::check_equal({{"layout()", check.columns ? 1 : 0}, {"the weight's device type", device}}, check.tp);
  expect_equal("own_parameters(): the number of segments with an element", rows.sum(0), at::ones_like(check.held));
  const auto whole = rows.ne(0).all(-1);
  check.owners = at::where(whole.any(0), whole.to(at::kInt).argmax(0), -1).unsqueeze(1);
}

/// @return  the partial's values [S, B, W], on the CPU, zero in rows left out.
at::Tensor check_partial(const Check& check) {
  const auto& weight = check.embedding->weight;
  const auto partial = check.partial();
  TORCH_CHECK_VALUE(partial.defined() && partial.is_contiguous(), "it is undefined or isn't contiguous");
  TORCH_CHECK_VALUE(partial.dtype() == weight.dtype() && partial.device() == weight.device(), "it is ", partial.dtype(),
                    " on ", partial.device(), ", expected ", weight.dtype(), " on ", weight.device());
  TORCH_CHECK_VALUE(partial.requires_grad(), "it has no gradient function, although the weight is trained");
  TORCH_CHECK_VALUE(!partial.is_alias_of(weight) && !partial.is_alias_of(check.partial().fill_(1)),
                    "its memory is that of another partial of the same ids, or the weight's");
  const auto values = partial.detach().cpu();
  // In columns, rows left out are undefined.
  if (check.columns && check.left_out.defined()) values.flatten(0, 1).index_fill_(0, check.left_out, 0);
  expect_equal("it", values, check.own(check.columns, -1, check.look_up(check.table * check.held)));
  return values;
}

/// Two backward passes, with gradients in all rows, as reduce() gives them.
void check_backward(const Check& check) {
  auto& weight = check.embedding->weight;
  weight.mutable_grad().reset();
  const auto table = check.table.clone().requires_grad_();
  for (const int64_t pass : {1, 2}) {
    const auto truth = check.look_up(table);
    // Small integers of both signs that differ by place and pass: their sums are exact in bfloat16.
    const auto numbers = (at::arange(truth.numel(), at::kLong) * 40503 + pass * 9973).bitwise_right_shift(8);
    const auto gradient = numbers.remainder(7).sub(3).view(truth.sizes()).to(truth.scalar_type());
    truth.backward(gradient);
    auto expected = at::zeros(weight.sizes(), table.grad().options());
    for (const auto& segment : check.segments) segment.in_local(expected).copy_(segment.in_global(table.grad()));
    const auto before = weight.grad();
    const auto partial = check.partial();
    partial.detach().fill_(1);  // an insert may write into it
    partial.backward(check.own(check.columns, -1, gradient).to(weight.device()));
    const auto what = fmt::format("the weight's gradient after pass {} of 2", pass);
    expect_equal(what, weight.grad().defined() ? weight.grad().cpu() : at::zeros_like(expected), expected);
    TORCH_CHECK_VALUE(!before.defined() || before.is_alias_of(weight.grad()), what, " isn't where it was before");
  }
}

/// Collective.
void check_case(Check& check) {
  const auto before = *check.recorded.count;
  auto& embedding = *check.embedding;
  at::Tensor partial;
  std::vector<int64_t> holders;
  if (!check.holds("partial()", [&] { partial = check_partial(check); })) return;
  check.holds("holders()", [&] {
    holders = embedding.holders(check.ids);
    if (holders.empty() || check.columns) return;
    expect_equal("the list", at::tensor(holders).unsqueeze(1), check.owners.index_select(0, check.ids.t().flatten()));
  });
  check.holds("reduce() or holders()", [&] {
    const auto reduced = embedding.reduce(partial.to(embedding.weight.device())).cpu();
    parallel::check_equal({{"the length of holders()", static_cast<int64_t>(holders.size())}}, check.tp);
    expect_equal("reduce()", reduced, check.own(embedding.sequence_parallel(), 0, check.look_up(check.table)));
  });
  check.holds("backward", [&] { check_backward(check); });
  const auto sent = (*check.recorded.count - before).total() - (check.tp->getSize() > 1 ? 1 : 0);
  check.holds("communication", [&] { TORCH_CHECK_VALUE(sent == 0, sent, " collectives beside that of reduce()"); });
}

void check_setting(Check& check, const MakeEmbedding& make, at::ScalarType dtype, bool sequence, bool accumulate) {
  const int64_t t = check.tp->getSize(), V = 3 * t + 1, H = 2 * t, S = 3 * t;
  const auto setting = fmt::format("{}, V {}, H {}, sequence_parallel {}, accumulate_into_grad {}",
                                   c10::toString(dtype), V, H, sequence, accumulate);
  const auto options = ParallelEmbeddingOptions(V, H).sequence_parallel(sequence).accumulate_into_grad(accumulate);
  check.text = setting;
  check.recorded = parallel::record(check.tp);
  check.held = at::zeros({V, H}, at::kInt);
  check.segments.clear();
  if (!check.holds("set-up", [&] { set_up(check, make, options, dtype); })) return;
  if (!check.holds("set-up", [&] { compare_ranks(check); })) return;
  // Values that bfloat16 can hold, none of them 0; zero where the weight is padding.
  check.table = at::arange(V * H, at::kLong).remainder(251).add(1).view({V, H}).to(dtype);
  auto weight = check.embedding->weight.detach().zero_();
  for (const auto& segment : check.segments) segment.in_local(weight).copy_(segment.in_global(check.table));

  const auto expect_refusal = [&](const char* what, int64_t number, const at::Tensor& ids, const at::Tensor& rows) {
    check.holds(fmt::format("c10::ValueError that names {} {}", what, number), [&] {
      std::string error = "nothing was thrown";
      try {
        check.embedding->partial(ids, rows);
      } catch (const c10::ValueError& thrown) {
        error = parallel::error_text(thrown);
      }
      TORCH_CHECK_VALUE(error.find(std::to_string(number)) != std::string::npos, error);
    });
  };
  const auto range = at::arange(S).view({1, S});
  expect_refusal("id", V, range + 2, {});
  expect_refusal("id", -1, range - 1, {});
  expect_refusal("row to leave out", S, range, at::full({1}, S, at::kLong));
  for (const auto& ids : {at::arange(2 * S).remainder(V).view({2, S}), range, at::full_like(range, V - 1)}) {
    const auto rows = at::arange(ids.numel());
    for (const auto& left_out : {rows.slice(0, 0, 0), rows.slice(0, 1, {}, 3).flip(0), rows, at::Tensor()}) {
      check.text = fmt::format("{}, ids [{}, {}] from {} to {}, {} rows left out", setting, ids.size(0), S,
                               ids.min().item<int64_t>(), ids.max().item<int64_t>(), left_out.numel());
      check.ids = ids;
      check.left_out = left_out;
      check_case(check);
    }
  }
  check.embedding->weight.requires_grad_(false);
  check.holds("partial()", [&] { TORCH_CHECK_VALUE(!check.partial().requires_grad(), "it trains a frozen weight"); });
}

}  // namespace

std::vector<std::string> check_parallel_embedding(const MakeEmbedding& make, const parallel::GroupPtr& tp) {
  Check check{tp};
  for (const bool sequence : {false, true}) {
    for (const bool accumulate : {false, true}) check_setting(check, make, at::kFloat, sequence, accumulate);
  }
  check_setting(check, make, at::kBFloat16, true, true);
  return check.sentences;
}

}  // namespace megatron_cpp
