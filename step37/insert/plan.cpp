#include "step37/insert/plan.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <map>
#include <utility>

namespace megatron_cpp::step37 {
namespace {

struct Occurrence {
  int64_t batch;
  int64_t position;
};

std::vector<Occurrence> occurrences_of(int64_t token, std::span<const int64_t> input_ids, int64_t S) {
  std::vector<Occurrence> found;
  const auto look_at = [&](size_t index) {
    if (input_ids[index] != token) return;
    const auto flat = static_cast<int64_t>(index);
    found.push_back({flat / S, flat % S});
  };
  // Start tokens are rare: most blocks are passed over. (x - 1) & ~x has its highest bit set for x = 0 only, and unlike
  // a comparison of 64 bits it is vectorised on every x86.
  constexpr size_t kBlock = 32;
  size_t begin = 0;
  for (; begin + kBlock <= input_ids.size(); begin += kBlock) {
    const int64_t* block = input_ids.data() + begin;
    uint64_t hits = 0;
    for (size_t i = 0; i < kBlock; ++i) {
      const auto difference = static_cast<uint64_t>(block[i]) ^ static_cast<uint64_t>(token);
      hits |= (difference - 1) & ~difference;
    }
    if (hits >> 63 == 0) continue;
    for (size_t i = 0; i < kBlock; ++i) look_at(begin + i);
  }
  for (; begin < input_ids.size(); ++begin) look_at(begin);
  return found;
}

std::string count_text(const InsertGroup& group, const std::vector<Occurrence>& occurrences) {
  return fmt::format("{} images for {} occurrences of start token {}", group.rows.size(), occurrences.size(),
                     group.start_token);
}

/// The batch row a user should look at: of the first occurrence that gets no image, else of the last occurrence.
std::string place_text(size_t num_images, const std::vector<Occurrence>& occurrences) {
  if (occurrences.empty()) return "no batch row has the token";
  if (num_images < occurrences.size()) {
    const auto& first = occurrences[num_images];
    return fmt::format("the first without an image is in batch row {} at position {}", first.batch, first.position);
  }
  return fmt::format("the last occurrence is in batch row {}", occurrences.back().batch);
}

/// The runs of one batch row. They are offered in reverse order of writing, so a run keeps those of its positions that
/// are still free.
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

bool comes_before(const InsertRun& one, const InsertRun& other) {
  return one.batch != other.batch ? one.batch < other.batch : one.position < other.position;
}

/// What is left of `writes`, given in the order of writing, after later ones overwrote earlier ones; sorted.
std::vector<InsertRun> what_remains(const std::vector<InsertRun>& writes, int64_t B) {
  auto sorted = writes;
  std::sort(sorted.begin(), sorted.end(), comes_before);
  const auto overlaps = [](const InsertRun& one, const InsertRun& next) {
    return one.batch == next.batch && one.position + one.length > next.position;
  };
  if (std::adjacent_find(sorted.begin(), sorted.end(), overlaps) == sorted.end()) return sorted;

  std::vector<BatchRow> batch_rows(static_cast<size_t>(B));
  for (auto write = writes.rbegin(); write != writes.rend(); ++write) {
    batch_rows[static_cast<size_t>(write->batch)].offer(*write);
  }
  std::vector<InsertRun> runs;
  for (const auto& batch_row : batch_rows) {
    for (const auto& [position, run] : batch_row.runs()) runs.push_back(run);
  }
  return runs;
}

void check_sizes(std::span<const int64_t> input_ids, int64_t B, int64_t S) {
  int64_t num_ids = 0;
  TORCH_CHECK_VALUE(
      B >= 0 && S >= 0 && !__builtin_mul_overflow(B, S, &num_ids) && static_cast<int64_t>(input_ids.size()) == num_ids,
      input_ids.size(), " input ids are not [", B, ", ", S, "]");
}

/// Prefix sums of the images' rows, from 0.
std::vector<int64_t> begins_of(const std::vector<int64_t>& image_rows) {
  std::vector<int64_t> begins{0};
  for (const int64_t rows : image_rows) {
    int64_t end = 0;
    TORCH_CHECK_VALUE(rows >= 0 && !__builtin_add_overflow(begins.back(), rows, &end), "image ", begins.size() - 1,
                      " has ", rows, " feature rows, after ", begins.back(), " of the images before it");
    begins.push_back(end);
  }
  return begins;
}

}  // namespace

InsertPlan InsertPlan::build(std::span<const int64_t> input_ids, int64_t B, int64_t S,
                             std::span<const InsertGroup> groups, MismatchPolicy policy) {
  check_sizes(input_ids, B, S);
  InsertPlan plan;
  plan.B_ = B;
  plan.S_ = S;
  std::vector<InsertRun> writes;  // in the order of writing
  for (const auto& group : groups) {
    const auto occurrences = occurrences_of(group.start_token, input_ids, S);
    if (occurrences.size() != group.rows.size()) {
      TORCH_CHECK_VALUE(policy == MismatchPolicy::kTruncate, count_text(group, occurrences), ": ",
                        place_text(group.rows.size(), occurrences));
      // Like the reference, no warning if there are no images or no start tokens at all.
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
      int64_t end = 0;
      TORCH_CHECK_VALUE(!__builtin_add_overflow(plan.num_feature_rows(), group.rows[k], &end), "image ", k,
                        " of start token ", group.start_token, " has ", group.rows[k], " feature rows, after ",
                        plan.num_feature_rows(), " of the images before it: their sum doesn't fit in 64 bits");
      plan.image_begins_.push_back(end);
    }
  }
  plan.set_runs(what_remains(writes, B));
  return plan;
}

InsertPlan InsertPlan::from_runs(std::vector<InsertRun> runs, int64_t B, int64_t S,
                                 const std::vector<int64_t>& image_rows) {
  InsertPlan plan;
  plan.B_ = B;
  plan.S_ = S;
  plan.image_rows_ = image_rows;
  plan.image_begins_ = begins_of(image_rows);
  std::sort(runs.begin(), runs.end(), comes_before);
  const InsertRun* before = nullptr;
  for (const auto& run : runs) {
    TORCH_CHECK_VALUE(run.image >= 0 && run.image < plan.num_images(), "a run of image ", run.image, " of ",
                      plan.num_images());
    const auto image = static_cast<size_t>(run.image);
    TORCH_CHECK_VALUE(run.batch >= 0 && run.batch < B && run.position >= 0 && run.length > 0 && run.position < S &&
                          run.length <= S - run.position,
                      "a run of ", run.length, " rows at batch row ", run.batch, ", position ", run.position,
                      " is not inside [", B, ", ", S, "]");
    TORCH_CHECK_VALUE(
        run.feature_row >= plan.image_begins_[image] && run.length <= plan.image_begins_[image + 1] - run.feature_row,
        "a run of ", run.length, " feature rows from ", run.feature_row, " on is not inside image ", run.image);
    TORCH_CHECK_VALUE(
        before == nullptr || before->batch != run.batch || before->position + before->length <= run.position,
        "two runs overlap in batch row ", run.batch, " at position ", run.position);
    before = &run;
  }
  plan.set_runs(std::move(runs));
  return plan;
}

InsertPlan InsertPlan::from_placeholders(std::span<const int64_t> input_ids, int64_t B, int64_t S, int64_t placeholder,
                                         const std::vector<int64_t>& image_rows) {
  check_sizes(input_ids, B, S);
  const auto places = occurrences_of(placeholder, input_ids, S);
  const int64_t num_rows = begins_of(image_rows).back();
  TORCH_CHECK_VALUE(static_cast<int64_t>(places.size()) == num_rows, num_rows, " feature rows for ", places.size(),
                    " placeholders ", placeholder);
  std::vector<InsertRun> runs;
  size_t next = 0;
  for (size_t image = 0; image < image_rows.size(); ++image) {
    for (int64_t row = 0; row < image_rows[image]; ++row, ++next) {
      const auto& [batch, position] = places[next];
      const bool goes_on =
          row > 0 && runs.back().batch == batch && runs.back().position + runs.back().length == position;
      if (goes_on) {
        ++runs.back().length;
      } else {
        runs.push_back({static_cast<int64_t>(image), static_cast<int64_t>(next), batch, position, 1});
      }
    }
  }
  return from_runs(std::move(runs), B, S, image_rows);
}

void InsertPlan::set_runs(std::vector<InsertRun> runs) {
  runs_ = std::move(runs);
  embedding_rows_ = row_indices(runs_, B_).embedding_rows;
  // With S = 0 any B is allowed: allocate nothing of size B unless there are runs.
  if (runs_.empty()) return;
  for (int64_t batch = 0; batch <= B_; ++batch) {
    const auto first = std::lower_bound(runs_.begin(), runs_.end(), batch,
                                        [](const InsertRun& run, int64_t row) { return run.batch < row; });
    batch_begins_.push_back(static_cast<size_t>(first - runs_.begin()));
  }
}

std::vector<InsertRun> InsertPlan::owned_by(int64_t begin, int64_t end) const {
  std::vector<InsertRun> owned;
  if (begin >= end) return owned;
  for (size_t batch = 0; batch + 1 < batch_begins_.size(); ++batch) {
    const auto last = runs_.begin() + static_cast<std::ptrdiff_t>(batch_begins_[batch + 1]);
    auto run = std::partition_point(runs_.begin() + static_cast<std::ptrdiff_t>(batch_begins_[batch]), last,
                                    [&](const InsertRun& r) { return r.position + r.length <= begin; });
    for (; run != last && run->position < end; ++run) {
      auto part = *run;
      part.position = std::max(run->position, begin);
      part.feature_row += part.position - run->position;
      part.length = std::min(run->position + run->length, end) - part.position;
      owned.push_back(part);
    }
  }
  return owned;
}

RowIndices row_indices(std::span<const InsertRun> runs, int64_t B) {
  size_t total = 0;
  for (const auto& run : runs) total += static_cast<size_t>(run.length);
  RowIndices indices;
  indices.embedding_rows.reserve(total);
  indices.feature_rows.reserve(total);
  for (const auto& run : runs) {
    for (int64_t row = 0; row < run.length; ++row) {
      indices.embedding_rows.push_back((run.position + row) * B + run.batch);
      indices.feature_rows.push_back(run.feature_row + row);
    }
  }
  return indices;
}

}  // namespace megatron_cpp::step37
