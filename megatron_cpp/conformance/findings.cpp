#include "megatron_cpp/conformance/findings.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <map>
#include <set>
#include <sstream>

#include "parallel/collectives.h"

namespace megatron::internal {
namespace {

/// All findings on one subject: the first of them, the ranks that share it, the cases with any.
struct Summary {
  size_t first_case = std::numeric_limits<size_t>::max();
  std::string text;
  std::set<int> ranks;
  std::set<size_t> cases;
};

c10::IntArrayRef list(const at::Tensor& values) {
  return {values.const_data_ptr<int64_t>(), static_cast<size_t>(values.numel())};
}

}  // namespace

Findings::Findings(parallel::GroupPtr tp) : tp_(std::move(tp)) {}

bool Findings::clean_everywhere() const {
  const auto clean = parallel::all_reduce(at::full({1}, clean_ ? 1 : 0, at::kInt), tp_, parallel::Reduction::kMin);
  return clean.item<int>() == 1;
}

void Findings::expect_same(const std::string& subject, const at::Tensor& values) {
  const auto of_rank_0 = parallel::broadcast(values, 0, tp_);
  expect(at::equal(values, of_rank_0), subject, "is ", list(values), " here and ", list(of_rank_0), " on rank 0");
}

std::vector<Findings::Finding> Findings::of_rank(int rank) const {
  std::ostringstream own;
  for (const auto& finding : own_) {
    auto line = finding.text;
    std::replace(line.begin(), line.end(), '\n', ' ');
    own << finding.case_number << '\t' << finding.subject << '\t' << line << '\n';
  }
  std::istringstream theirs(parallel::broadcast_text(own.str(), rank, tp_));
  std::vector<Finding> findings;
  for (std::string number, subject, text;
       std::getline(theirs, number, '\t') && std::getline(theirs, subject, '\t') && std::getline(theirs, text);) {
    findings.push_back({std::stoul(number), subject, text});
  }
  return findings;
}

std::vector<std::string> Findings::sentences() const {
  std::map<std::string, Summary> by_subject;
  for (int rank = 0; rank < tp_->getSize(); ++rank) {
    for (const auto& finding : of_rank(rank)) {
      auto& summary = by_subject[finding.subject];
      summary.cases.insert(finding.case_number);
      if (finding.case_number < summary.first_case) {
        summary.first_case = finding.case_number;
        summary.text = finding.text;
        summary.ranks.clear();
      }
      if (finding.case_number == summary.first_case) summary.ranks.insert(rank);
    }
  }
  std::multimap<size_t, std::string> in_order;
  for (const auto& [subject, summary] : by_subject) {
    in_order.emplace(summary.first_case,
                     c10::str(cases_[summary.first_case], ": rank ", *summary.ranks.begin(), ": ", subject, " ",
                              summary.text, " (", summary.ranks.size(), " of ", tp_->getSize(), " ranks; ",
                              summary.cases.size(), summary.cases.size() == 1 ? " case)" : " cases)"));
  }
  std::vector<std::string> sentences;
  for (auto& [case_number, sentence] : in_order) sentences.push_back(std::move(sentence));
  return sentences;
}

}  // namespace megatron::internal
