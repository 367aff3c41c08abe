#include "megatron_cpp/conformance/embedding_conformance.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <exception>
#include <limits>
#include <utility>

#include "megatron_cpp/conformance/embedding_candidate.h"
#include "megatron_cpp/conformance/findings.h"
#include "parallel/agree.h"
#include "parallel/recording_backend.h"

namespace megatron {
namespace {

using internal::Candidate;
using internal::Findings;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

/// Where two tensors of one shape first differ; any tensors of other values.
std::string difference(const at::Tensor& got, const at::Tensor& expected) {
  const auto first = got.ne(expected).nonzero()[0].contiguous();
  const std::vector<int64_t> place(first.const_data_ptr<int64_t>(), first.const_data_ptr<int64_t>() + first.numel());
  const auto value = [&](at::Tensor tensor) {
    for (const int64_t index : place) tensor = tensor.select(0, index);
    return tensor.item<double>();
  };
  return c10::str("is ", value(got), " at ", c10::IntArrayRef(place), ", expected ", value(expected));
}

/// What is asked of a candidate.
struct Case {
  std::string text;
  at::Tensor ids;       ///< [B, S]
  at::Tensor left_out;  ///< [k] flat rows, or undefined

  /// [S*B]
  at::Tensor id_of_row() const { return ids.t().reshape({-1}); }
  at::Tensor is_left_out() const {
    auto flags = at::zeros({ids.numel()}, at::kBool);
    return left_out.defined() ? flags.index_fill_(0, left_out, 1) : flags;
  }
  at::Tensor without_left_out(const at::Tensor& rows) const { return rows.masked_fill(is_left_out().unsqueeze(1), 0); }
};

std::vector<Case> make_cases(const Candidate& candidate) {
  const auto& owners = candidate.owners;
  const auto ids_of_one = owners.eq(owners.max()).nonzero().view({-1});
  std::vector<Case> cases;
  for (const int64_t B : {1, 2}) {
    const int64_t num_rows = candidate.S() * B;
    const auto count = at::arange(num_rows, at::kLong);
    const std::vector<std::pair<std::string, at::Tensor>> ids{
        {"all", count.remainder(candidate.V())},
        {"repeated", candidate.V() - 1 - count.floor_divide(3)},
        {"one rank's", ids_of_one.index_select(0, count.remainder(ids_of_one.numel()))}};
    const std::vector<std::pair<std::string, at::Tensor>> left_out{
        {"none", B == 1 ? at::Tensor() : at::empty({0}, at::kLong)},
        {"some", at::arange(1, num_rows, 3, at::kLong).flip(0)},  // in no particular order
        {"all", count}};
    for (const auto& [which_ids, values] : ids) {
      for (const auto& [which_rows, rows] : left_out) {
        cases.push_back({c10::str(candidate.setting, ", S ", candidate.S(), ", B ", B, ", ids: ", which_ids,
                                  ", rows left out: ", which_rows),
                         values.view({B, candidate.S()}), rows});
      }
    }
  }
  return cases;
}

/// A partial's rows [S*B, W], on the CPU, against the rank's part of the truth.
void check_rows(const Candidate& candidate, const Case& asked, at::Tensor rows, Findings& findings) {
  const bool summand = candidate.layout == PartialLayout::kSummand;
  // Of columns, rows left out may hold anything.
  if (!summand) rows = asked.without_left_out(rows);
  const auto own_part = candidate.own_columns(summand ? candidate.own_table : candidate.table);
  const auto expected = asked.without_left_out(own_part.index_select(0, asked.id_of_row()));
  if (at::equal(rows, expected)) return;
  const auto row = rows.ne(expected).any(1).nonzero()[0].item<int64_t>();
  std::string subject = "partial's rows";
  if (asked.is_left_out()[row].item<bool>()) {
    subject += " left out";
  } else if (expected[row].eq(0).all().item<bool>()) {
    subject += " of ids that are other ranks'";
  }
  findings.expect(false, subject, "of id ", asked.id_of_row()[row].item<int64_t>(), ": [row, column] ",
                  difference(rows, expected));
}

/// Whether a partial may be written to without changing anything else.
void check_memory(const Candidate& candidate, at::Tensor partial, const at::Tensor& other, Findings& findings) {
  const std::string subject = "partial's memory";
  auto weight = candidate.embedding->weight.detach();
  const auto weight_before = weight.clone();
  other.detach().fill_(1);
  findings.attempt("writing to partial", [&] { partial.fill_(kNan); });
  findings.expect(other.detach().eq(1).all().item<bool>(), subject, "is that of another partial of the same ids");
  findings.expect(at::equal(weight, weight_before), subject, "is the weight's");
  weight.copy_(weight_before);
}

/// @return  the partial's values, if nothing is found.
at::Tensor check_partial(const Candidate& candidate, const Case& asked, Findings& findings) {
  auto& embedding = *candidate.embedding;
  const std::vector<int64_t> shape{candidate.S(), asked.ids.size(0), candidate.W()};
  const auto partial = embedding.partial(asked.ids, asked.left_out);
  findings.expect(partial.defined(), "partial", "is undefined");
  if (!findings.clean()) return {};
  findings.expect(partial.sizes() == shape, "partial's shape", "is ", partial.sizes(), ", expected ",
                  c10::IntArrayRef(shape));
  findings.expect(partial.scalar_type() == embedding.weight.scalar_type(), "partial's dtype", "is ",
                  partial.scalar_type(), ", expected ", embedding.weight.scalar_type());
  findings.expect(partial.device() == embedding.weight.device(), "partial's device", "is ", partial.device(),
                  ", expected ", embedding.weight.device());
  findings.expect(partial.is_contiguous(), "partial", "isn't contiguous");
  findings.expect(partial.requires_grad(), "partial", "has no gradient function, although the weight is trained");
  if (!findings.clean()) return {};
  const auto other = embedding.partial(asked.ids, asked.left_out);
  const auto values = other.detach().clone();
  check_memory(candidate, partial, other, findings);
  check_rows(candidate, asked, values.cpu().view({-1, candidate.W()}), findings);
  return values;
}

/// @return  [S*B] ranks, -1 where the embedding doesn't say.
at::Tensor check_finders(const Candidate& candidate, const Case& asked, const at::Tensor& partial, Findings& findings) {
  const int64_t num_rows = asked.ids.numel();
  auto nobody = at::full({num_rows}, -1, at::kLong);
  const auto ranks = candidate.embedding->finders(asked.ids);
  if (ranks.empty()) return nobody;
  const auto length = static_cast<int64_t>(ranks.size());
  findings.expect(length == num_rows, "finders", "are ", length, ", expected S*B = ", num_rows);
  if (length != num_rows) return nobody;
  const auto finders = at::tensor(ranks, at::kLong);
  const auto outside = finders.lt(0).logical_or(finders.ge(candidate.t)).nonzero();
  findings.expect(outside.numel() == 0, "finders", "are ", c10::IntArrayRef(ranks), ", expected ranks in [0, ",
                  candidate.t, ")");
  if (candidate.layout == PartialLayout::kColumns || !findings.clean()) return finders;
  const auto found_here = partial.cpu().view({num_rows, -1}).ne(0).any(1);
  const auto wrong = found_here.logical_and(finders.ne(candidate.rank)).nonzero();
  if (wrong.numel() == 0) return finders;
  const auto row = wrong[0].item<int64_t>();
  findings.expect(false, "finders", "give row ", row, ", id ", asked.id_of_row()[row].item<int64_t>(), ", to rank ",
                  ranks[static_cast<size_t>(row)], ", but this rank's partial holds it");
  return finders;
}

/// Collective.
void check_reduce(const Candidate& candidate, const Case& asked, at::Tensor partial, Findings& findings) {
  const auto& embedding = *candidate.embedding;
  if (asked.left_out.defined()) {
    partial.view({-1, candidate.W()}).index_fill_(0, asked.left_out.to(partial.device()), 0);
  }
  const auto reduced = embedding.reduce(partial).detach().cpu();
  auto expected = asked.without_left_out(candidate.table.index_select(0, asked.id_of_row()))
                      .view({candidate.S(), asked.ids.size(0), candidate.H()});
  if (embedding.sequence_parallel()) expected = expected.chunk(candidate.t)[static_cast<size_t>(candidate.rank)];
  findings.expect(reduced.sizes() == expected.sizes(), "reduce's shape", "is ", reduced.sizes(), ", expected ",
                  expected.sizes());
  if (reduced.sizes() != expected.sizes() || at::equal(reduced, expected)) return;
  findings.expect(false, "reduce(partial)", difference(reduced, expected));
}

/// Small integers of both signs that differ by place and pass; their sums are exact in bfloat16.
at::Tensor make_gradient(int64_t num_rows, int64_t H, int64_t pass) {
  const auto mixed = (at::arange(num_rows * H, at::kLong) * 40503 + pass * 9973).bitwise_right_shift(8);
  return mixed.remainder(7).sub(3).view({num_rows, H});
}

/// Two backward passes, with gradients that are NaN wherever they must not be read.
void check_backward(const Candidate& candidate, const Case& asked, const at::Tensor& finders, Findings& findings) {
  auto& embedding = *candidate.embedding;
  auto& weight = embedding.weight;
  weight.mutable_grad().reset();
  auto others = finders.ge(0).logical_and(finders.ne(candidate.rank));
  if (candidate.layout == PartialLayout::kColumns) others.zero_();  // every rank finds its columns
  const auto unread = asked.is_left_out().logical_or(others).unsqueeze(1);
  auto whole = at::zeros_like(candidate.table);
  for (const int64_t pass : {1, 2}) {
    const auto rows = make_gradient(asked.ids.numel(), candidate.H(), pass).to(whole.scalar_type());
    whole.index_add_(0, asked.id_of_row(), asked.without_left_out(rows));
    const auto partial = embedding.partial(asked.ids, asked.left_out);
    if (asked.left_out.defined()) {  // whoever left them out fills them
      partial.detach().view({-1, candidate.W()}).index_fill_(0, asked.left_out.to(partial.device()), 1);
    }
    const void* memory = weight.grad().defined() ? weight.grad().data_ptr() : nullptr;
    partial.backward(candidate.own_columns(rows.masked_fill(unread, kNan)).to(weight.device()).view_as(partial));
    const std::string subject = c10::str("the weight's gradient after backward pass ", pass, " of 2");
    const auto expected = candidate.part_of(whole);
    const auto got = weight.grad().defined() ? weight.grad().cpu() : at::zeros_like(expected);
    if (!at::equal(got, expected)) {
      const char* nan_rows = others.any().item<bool>() ? "left out or that others find" : "left out";
      const auto reason = c10::str("; rows of the output's gradient that were ", nan_rows, " were NaN");
      findings.expect(false, subject, difference(got, expected), got.isnan().any().item<bool>() ? reason : "");
      return;
    }
    findings.expect(memory == nullptr || weight.grad().data_ptr() == memory, subject, "isn't where it was before");
  }
}

/// Collective.
void check_case(const Candidate& candidate, const Case& asked, Findings& findings) {
  findings.begin_case(asked.text);
  const auto sent_before = *candidate.sent;
  at::Tensor partial;
  at::Tensor finders;
  findings.attempt("partial", [&] { partial = check_partial(candidate, asked, findings); });
  if (findings.clean()) {
    findings.attempt("finders", [&] { finders = check_finders(candidate, asked, partial, findings); });
  }
  const auto check_silent = [&](const parallel::CommunicationCount& before, const std::string& subject) {
    const auto collectives = (*candidate.sent - before).total();
    findings.expect(collectives == 0, subject, "took part in ", collectives, " collectives, expected none");
  };
  check_silent(sent_before, "partial or finders");
  if (!findings.clean_everywhere()) return;
  findings.expect_same("finders", finders);
  check_reduce(candidate, asked, partial, findings);
  const auto sent_by_reduce = *candidate.sent;
  findings.attempt("backward", [&] { check_backward(candidate, asked, finders, findings); });
  check_silent(sent_by_reduce, "backward");
}

/// Ids and rows that aren't there, and a weight that isn't trained.
void check_refusals(const Candidate& candidate, Findings& findings) {
  auto& embedding = *candidate.embedding;
  findings.begin_case(candidate.setting);
  const auto expect_refusal = [&](const std::string& what, int64_t number, const at::Tensor& ids,
                                  const at::Tensor& left_out) {
    std::string outcome = "nothing was thrown";
    try {
      embedding.partial(ids, left_out);
    } catch (const c10::ValueError& error) {
      outcome = c10::str("a c10::ValueError says: ", error.what_without_backtrace());
      if (outcome.find(std::to_string(number)) != std::string::npos) return;
    } catch (const std::exception& error) {
      outcome = c10::str("another exception says: ", parallel::error_text(error));
    } catch (...) {
      outcome = "what was thrown is no std::exception";
    }
    findings.expect(false, c10::str(what, " ", number), "must be a c10::ValueError with this number, but ", outcome);
  };
  const auto ids = at::zeros({2, candidate.S()}, at::kLong);
  for (const int64_t wrong : {candidate.V(), int64_t{-1}}) {
    auto with_wrong = ids.clone();
    with_wrong[1][2] = wrong;
    expect_refusal("id", wrong, with_wrong, {});
  }
  expect_refusal("row to leave out", ids.numel(), ids, at::full({1}, ids.numel(), at::kLong));
  embedding.weight.requires_grad_(false);
  findings.attempt("partial", [&] {
    findings.expect(!embedding.partial(ids).requires_grad(), "partial",
                    "has a gradient of a weight that isn't trained");
  });
  embedding.weight.requires_grad_(true);
}

}  // namespace

std::vector<std::string> check_parallel_embedding(const MakeEmbedding& make, const parallel::GroupPtr& tp) {
  Findings findings(tp);
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    for (const bool sequence_parallel : {false, true}) {
      for (const bool accumulate_into_grad : {false, true}) {
        const auto candidate =
            internal::make_candidate(make, sequence_parallel, accumulate_into_grad, dtype, tp, findings);
        if (!candidate) continue;
        for (const auto& asked : make_cases(*candidate)) check_case(*candidate, asked, findings);
        check_refusals(*candidate, findings);
      }
    }
  }
  return findings.sentences();
}

}  // namespace megatron
