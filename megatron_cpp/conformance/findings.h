// What each rank finds wrong with code under examination, told to all ranks.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/StringUtil.h>

#include <cstddef>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "parallel/agree.h"
#include "parallel/group.h"

namespace megatron::internal {

/// Collects what this rank finds wrong, case by case. The cases are the same on every rank; what is found need not be.
class Findings {
 public:
  explicit Findings(parallel::GroupPtr tp);

  /// What is examined from here on.
  void begin_case(std::string text) {
    cases_.push_back(std::move(text));
    clean_ = true;
  }
  /// `subject` is what is wrong, and named once; the text goes on from it.
  template <class... Text>
  void expect(bool ok, const std::string& subject, const Text&... text) {
    if (ok) return;
    own_.push_back({cases_.size() - 1, subject, c10::str(text...)});
    clean_ = false;
  }
  /// Runs code of the user's, whose exception is a finding.
  template <class Action>
  void attempt(const std::string& subject, const Action& action) {
    try {
      action();
    } catch (const std::exception& error) {
      expect(false, subject + " threw", parallel::error_text(error));
    } catch (...) {
      expect(false, subject + " threw", "what is no std::exception");
    }
  }
  /// Whether this rank found nothing wrong in this case so far.
  bool clean() const { return clean_; }
  /// Whether no rank did. Collective.
  bool clean_everywhere() const;
  /// Expects `values` [k] int64, of one k, to be the same on every rank. Collective.
  void expect_same(const std::string& subject, const at::Tensor& values);
  /// One sentence a subject: the first case that shows it, the lowest rank it shows on there and what that rank found,
  /// on how many ranks in that case, and in how many cases. The same on every rank. Collective.
  std::vector<std::string> sentences() const;

 private:
  struct Finding {
    size_t case_number;
    std::string subject;
    std::string text;
  };
  std::vector<Finding> of_rank(int rank) const;

  parallel::GroupPtr tp_;
  std::vector<std::string> cases_;
  std::vector<Finding> own_;
  bool clean_ = true;
};

}  // namespace megatron::internal
