#include "step37/insert_plan.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <map>

namespace step37 {
namespace {

struct Occurrence {
  int64_t batch;
  int64_t position;
};

std::vector<Occurrence> occurrences_of(int64_t token, std::span<const int64_t> input_ids, int64_t S) {
  std::vector<Occurrence> found;
  for (auto at = input_ids.begin(); (at = std::find(at, input_ids.end(), token)) != input_ids.end(); ++at) {
    const int64_t index = at - input_ids.begin();
    found.push_back({index / S, index % S});
  }
  return found;
}

std::string count_text(const InsertGroup& group, const std::vector<Occurrence>& occurrences) {
  return std::to_string(group.rows.size()) + " images for " + std::to_string(occurrences.size()) +
         " occurrences of start token " + std::to_string(group.start_token);
}

/// The batch row a user should look at: of the first occurrence that gets no image, else of the last occurrence.
std::string place_text(size_t num_images, const std::vector<Occurrence>& occurrences) {
  if (occurrences.empty()) return "no batch row has the token";
  if (num_images < occurrences.size()) {
    const auto& first = occurrences[num_images];
    return "the first without an image is in batch row " + std::to_string(first.batch) + " at position " +
           std::to_string(first.position);
  }
  return "the last occurrence is in batch row " + std::to_string(occurrences.back().batch);
}

/// Rows of one batch row that are taken already, by their first position. Runs are offered last writer first, so what
/// is free is theirs.
class BatchRow {
 public:
  void offer(const InsertRun& run) {
    int64_t position = run.position;
    const int64_t end = run.position + run.length;
    auto next = taken_.upper_bound(position);
    if (next != taken_.begin()) {
      const auto& before = std::prev(next)->second;
      position = std::max(position, before.position + before.length);
    }
    while (position < end) {
      const int64_t free_until = next == taken_.end() ? end : std::min(end, next->first);
      if (free_until > position) {
        auto part = run;
        part.feature_row += position - run.position;
        part.position = position;
        part.length = free_until - position;
        taken_.emplace_hint(next, position, part);
      }
      if (next == taken_.end()) break;
      position = std::max(position, next->first + next->second.length);
      ++next;
    }
  }
  const std::map<int64_t, InsertRun>& runs() const { return taken_; }

 private:
  std::map<int64_t, InsertRun> taken_;
};

}  // namespace

InsertPlan InsertPlan::build(std::span<const int64_t> input_ids, int64_t B, int64_t S,
                             std::span<const InsertGroup> groups, MismatchPolicy policy) {
  TORCH_CHECK_VALUE(B >= 0 && S >= 0 && static_cast<int64_t>(input_ids.size()) == B * S, input_ids.size(),
                    " input ids are not [", B, ", ", S, "]");
  InsertPlan plan;
  plan.B_ = B;
  plan.S_ = S;
  std::vector<InsertRun> writes;  // in the order of writing
  for (const auto& group : groups) {
    const auto occurrences = occurrences_of(group.start_token, input_ids, S);
    if (occurrences.size() != group.rows.size()) {
      TORCH_CHECK_VALUE(policy == MismatchPolicy::kTruncate, count_text(group, occurrences), ": ",
                        place_text(group.rows.size(), occurrences));
      // The reference is silent where one of the two is missing altogether.
      if (!occurrences.empty() && !group.rows.empty()) {
        plan.warnings_.push_back(count_text(group, occurrences) + ": inserting the overlap");
      }
    }
    for (size_t k = 0; k < group.rows.size(); ++k) {
      TORCH_CHECK_VALUE(group.rows[k] >= 0, "image ", k, " of start token ", group.start_token, " has ", group.rows[k],
                        " feature rows");
      if (k < occurrences.size()) {
        const auto& [batch, position] = occurrences[k];
        const int64_t length = std::min(group.rows[k], S - (position + 1));
        if (length > 0) writes.push_back({plan.num_images(), plan.num_feature_rows(), batch, position + 1, length});
      }
      plan.image_rows_.push_back(group.rows[k]);
      plan.image_begins_.push_back(plan.image_begins_.back() + group.rows[k]);
    }
  }
  std::vector<BatchRow> batch_rows(static_cast<size_t>(B));
  for (auto write = writes.rbegin(); write != writes.rend(); ++write) {
    batch_rows[static_cast<size_t>(write->batch)].offer(*write);
  }
  for (const auto& batch_row : batch_rows) {
    for (const auto& [position, run] : batch_row.runs()) plan.runs_.push_back(run);
  }
  return plan;
}

std::vector<InsertRun> InsertPlan::owned_by(int64_t begin, int64_t end) const {
  std::vector<InsertRun> owned;
  for (auto run : runs_) {
    const int64_t first = std::max(run.position, begin);
    const int64_t last = std::min(run.position + run.length, end);
    if (first >= last) continue;
    run.feature_row += first - run.position;
    run.position = first;
    run.length = last - first;
    owned.push_back(run);
  }
  return owned;
}

RowIndices row_indices(std::span<const InsertRun> runs, int64_t B) {
  RowIndices indices;
  for (const auto& run : runs) {
    for (int64_t row = 0; row < run.length; ++row) {
      indices.embedding_rows.push_back((run.position + row) * B + run.batch);
      indices.feature_rows.push_back(run.feature_row + row);
    }
  }
  return indices;
}

}  // namespace step37
