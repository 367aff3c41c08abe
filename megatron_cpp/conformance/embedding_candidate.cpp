#include "megatron_cpp/conformance/embedding_candidate.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "parallel/collectives.h"

namespace megatron::internal {
namespace {

constexpr uint64_t kSeed = 3;

void check_set_up(const Candidate& candidate, const ParallelEmbeddingOptions& asked, at::ScalarType dtype,
                  const parallel::GroupPtr& group, Findings& findings) {
  findings.expect(candidate.embedding != nullptr, "make", "returned no embedding");
  if (!findings.clean()) return;
  auto& embedding = *candidate.embedding;
  const auto& own = embedding.options();
  findings.expect(embedding.tp() == group, "tp()", "is another group than the one given to make");
  findings.expect(own.vocabulary_size() == asked.vocabulary_size() && own.hidden_size() == asked.hidden_size() &&
                      own.sequence_parallel() == asked.sequence_parallel(),
                  "options()", "say V ", own.vocabulary_size(), ", H ", own.hidden_size(), ", sequence_parallel ",
                  own.sequence_parallel(), ", which isn't what make was given");
  const auto parameters = embedding.parameters();
  findings.expect(std::any_of(parameters.begin(), parameters.end(),
                              [&](const at::Tensor& parameter) { return parameter.is_same(embedding.weight); }),
                  "weight", "isn't one of the module's parameters");
  if (!findings.clean()) return;
  embedding.to(dtype);
  findings.expect(embedding.weight.dim() == 2 && embedding.weight.requires_grad(), "weight", "of sizes ",
                  embedding.weight.sizes(), " isn't a trainable matrix");
}

/// The shard of the weight, whose segments are parts of the table and of the weight, if nothing is found.
ParameterShard check_own_parameters(const Candidate& candidate, Findings& findings) {
  const std::string subject = "own_parameters()";
  const auto& weight = candidate.embedding->weight;
  ParameterShard own;
  for (auto& shard : parameter_shards(*candidate.embedding)) {
    if (shard.parameter.is_same(weight)) own = std::move(shard);
  }
  findings.expect(own.parameter.defined() && own.parameter.is_same(weight), subject,
                  "don't have this embedding's weight");
  findings.expect(own.domain == GradientDomain::kSharded, subject, "give the weight a domain other than kSharded");
  if (!findings.clean()) return own;
  const std::vector<int64_t> whole{candidate.V(), candidate.H()};
  auto held = at::zeros(weight.sizes(), at::kInt);
  for (const auto& segment : own.segments) {
    const Box local{segment.local_begin, segment.box.length};
    const bool fits = segment.name == "weight" && segment.global_shape == whole && segment.box.is_in(whole) &&
                      local.is_in(weight.sizes().vec());
    findings.expect(fits, subject, "have a segment of \"", segment.name, "\" ", c10::IntArrayRef(segment.global_shape),
                    ", box ", segment.box.text(), ", local_begin ", c10::IntArrayRef(segment.local_begin),
                    ", which isn't a part of \"weight\" ", c10::IntArrayRef(whole), " that fits into ", weight.sizes());
    if (fits) segment.in_local(held).add_(1);
  }
  findings.expect(held.le(1).all().item<bool>(), subject, "have segments that share elements of the weight");
  return own;
}

/// Over the ranks, the segments are the table. Sets `owners`. Collective.
void check_coverage(Candidate& candidate, Findings& findings) {
  const std::string subject = "own_parameters()";
  auto held = at::zeros({1, candidate.V(), candidate.H()}, at::kInt);
  for (const auto& segment : candidate.shard.segments) {
    segment.in_global(held[0]).add_(1);
  }
  const auto by_rank = parallel::all_gather(held, candidate.embedding->tp());
  candidate.owners = by_rank.select(2, 0).argmax(0);
  const auto counts = by_rank.sum(0);
  const auto wrong = counts.ne(1).nonzero();
  if (wrong.size(0) == 0) return;
  const auto v = wrong[0][0].item<int64_t>();
  const auto h = wrong[0][1].item<int64_t>();
  const auto times = counts[v][h].item<int64_t>();
  const auto where = c10::str("element [", v, ", ", h, "] of the table [", candidate.V(), ", ", candidate.H(), "]");
  findings.expect(times > 0, subject, "leave out ", where, ", as those of every rank do");
  findings.expect(times == 0 || held[0][v][h].item<int>() == 0, subject, "have ", where, ", which is in ", times,
                  " segments over the ranks");
}

}  // namespace

at::Tensor Candidate::own_columns(const at::Tensor& whole) const {
  return layout == PartialLayout::kSummand ? whole : whole.narrow(-1, W() * rank, W());
}

at::Tensor Candidate::part_of(const at::Tensor& whole) const {
  auto part = at::zeros(shard.parameter.sizes(), whole.options());
  for (const auto& segment : shard.segments) {
    segment.in_local(part).copy_(segment.in_global(whole));
  }
  return part;
}

std::optional<Candidate> make_candidate(const MakeEmbedding& make, bool sequence_parallel, bool accumulate_into_grad,
                                        at::ScalarType dtype, const parallel::GroupPtr& tp, Findings& findings) {
  const auto recorded = parallel::record(tp);
  Candidate candidate;
  candidate.sent = recorded.count;
  candidate.rank = tp->getRank();
  candidate.t = tp->getSize();
  const auto options = ParallelEmbeddingOptions(candidate.V(), candidate.H())
                           .sequence_parallel(sequence_parallel)
                           .accumulate_into_grad(accumulate_into_grad);
  candidate.setting =
      c10::str(dtype == at::kFloat ? "float32" : "bfloat16", ", V ", candidate.V(), ", H ", candidate.H(),
               ", sequence_parallel ", sequence_parallel, ", accumulate_into_grad ", accumulate_into_grad);
  findings.begin_case(candidate.setting);
  findings.attempt("making it", [&] {
    candidate.embedding = make(options, recorded.group);
    check_set_up(candidate, options, dtype, recorded.group, findings);
    if (!findings.clean()) return;
    candidate.layout = candidate.embedding->layout();
    candidate.shard = check_own_parameters(candidate, findings);
  });
  if (!findings.clean_everywhere()) return std::nullopt;
  findings.expect_same("layout()", at::full({1}, static_cast<int64_t>(candidate.layout)));
  findings.expect_same("the weight's device type",
                       at::full({1}, static_cast<int64_t>(candidate.embedding->weight.device().type())));
  check_coverage(candidate, findings);
  if (!findings.clean_everywhere()) return std::nullopt;

  candidate.table = at::empty({candidate.V(), candidate.H()}, at::TensorOptions(dtype));
  const auto normal = InitialValue::normal(1);
  candidate.shard.initial_value = normal;
  initialize_parameters({candidate.shard}, kSeed);
  initialize_parameters({replicated_parameter("weight", candidate.table, GradientDomain::kReplicated, normal, true)},
                        kSeed);
  candidate.own_table = at::zeros_like(candidate.table);
  for (const auto& segment : candidate.shard.segments) {
    segment.in_global(candidate.own_table).copy_(segment.in_global(candidate.table));
  }
  return candidate;
}

}  // namespace megatron::internal
