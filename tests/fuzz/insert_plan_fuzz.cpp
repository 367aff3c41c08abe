// The input is a plan's arguments, as numbers: policy, B, S, groups with their start token and the rows of each image,
// then ids. The plan is compared with a painter that writes image rows one by one.
#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "step37/insert/plan.h"
#include "tests/fuzz/fuzz.h"

namespace megatron_cpp {
namespace {

using step37::InsertGroup;
using step37::InsertPlan;
using step37::InsertRun;
using step37::MismatchPolicy;

constexpr std::array<int64_t, 6> kTokens = {7, 128000, 0, -1, std::numeric_limits<int64_t>::min(), 1LL << 32};

struct Input {
  MismatchPolicy policy = MismatchPolicy::kError;
  int64_t B = 0;
  int64_t S = 0;
  std::vector<InsertGroup> groups;
  std::vector<int64_t> ids;
};

int64_t read_token(fuzz::Numbers& numbers) { return kTokens.at(static_cast<size_t>(numbers.below(kTokens.size()))); }

Input read_input(fuzz::Numbers numbers) {
  Input input;
  const auto flags = numbers.byte();
  input.policy = flags % 2 == 0 ? MismatchPolicy::kTruncate : MismatchPolicy::kError;
  input.B = numbers.mostly_below(5);
  input.S = numbers.mostly_below(80);
  input.groups.resize(static_cast<size_t>(numbers.below(5)));
  for (auto& group : input.groups) {
    group.start_token = read_token(numbers);
    group.rows.resize(static_cast<size_t>(numbers.below(8)));
    for (auto& rows : group.rows) rows = numbers.mostly_below(24);
  }
  // As many ids as [B, S] has, but for sizes that nobody could have ids for.
  const bool is_small = input.B >= 0 && input.S >= 0 && input.B < 80 && input.S < 80;
  const auto num_ids = is_small ? input.B * input.S + (flags >= 0xf0 ? 1 : 0) : numbers.below(3);
  for (int64_t i = 0; i < num_ids; ++i) {
    // Start tokens are rare: any other byte is an id that starts nothing.
    const auto id = numbers.byte();
    input.ids.push_back(id < static_cast<int64_t>(kTokens.size()) ? kTokens[static_cast<size_t>(id)] : 1000 + id);
  }
  return input;
}

size_t num_occurrences(const Input& input, const InsertGroup& group) {
  return static_cast<size_t>(std::count(input.ids.begin(), input.ids.end(), group.start_token));
}

/// Whether B * S is the number of ids, without multiplying.
bool has_size(const Input& input) {
  const auto num_ids = static_cast<int64_t>(input.ids.size());
  if (input.B < 0 || input.S < 0) return false;
  if (input.B == 0 || input.S == 0) return num_ids == 0;
  return num_ids % input.B == 0 && num_ids / input.B == input.S;
}

bool is_valid(const Input& input) {
  if (!has_size(input)) return false;
  int64_t rows_left = std::numeric_limits<int64_t>::max();
  for (const auto& group : input.groups) {
    if (input.policy == MismatchPolicy::kError && num_occurrences(input, group) != group.rows.size()) return false;
    for (const int64_t rows : group.rows) {
      if (rows < 0 || rows > rows_left) return false;
      rows_left -= rows;
    }
  }
  return true;
}

/// [B, S], row by row: the feature row that ends there, or -1.
std::vector<int64_t> paint(const Input& input) {
  std::vector<int64_t> source(input.ids.size(), -1);
  int64_t feature_row = 0;
  for (const auto& group : input.groups) {
    std::vector<int64_t> begins;
    for (const int64_t rows : group.rows) {
      begins.push_back(feature_row);
      feature_row += rows;
    }
    size_t image = 0;
    for (size_t at = 0; at < input.ids.size() && image < group.rows.size(); ++at) {
      if (input.ids[at] != group.start_token) continue;
      const auto S = static_cast<size_t>(input.S);
      const auto row_end = (at / S + 1) * S;
      int64_t row = 0;
      for (size_t s = at + 1; s < row_end && row < group.rows[image]; ++s, ++row) source[s] = begins[image] + row;
      ++image;
    }
  }
  return source;
}

/// The same picture from runs; each is in its image, and no two overlap.
std::vector<int64_t> paint(const std::vector<InsertRun>& runs, const InsertPlan& plan) {
  std::vector<int64_t> source(static_cast<size_t>(plan.B() * plan.S()), -1);
  for (const auto& run : runs) {
    FUZZ_CHECK(run.length > 0 && run.batch >= 0 && run.batch < plan.B() && run.position >= 0);
    FUZZ_CHECK(run.position + run.length <= plan.S());
    const auto image = static_cast<size_t>(run.image);
    FUZZ_CHECK(run.feature_row >= plan.image_begins().at(image));
    FUZZ_CHECK(run.feature_row + run.length <= plan.image_begins().at(image + 1));
    for (int64_t row = 0; row < run.length; ++row) {
      auto& place = source.at(static_cast<size_t>(run.batch * plan.S() + run.position + row));
      FUZZ_CHECK(place == -1, "two runs end at position ", run.position + row);
      place = run.feature_row + row;
    }
  }
  return source;
}

/// The parts of t ranks are the whole.
void check_owned(const InsertPlan& plan, int64_t t, const std::vector<int64_t>& expected) {
  std::vector<InsertRun> owned;
  for (int64_t rank = 0; rank < t; ++rank) {
    // Uneven parts too: the last rank has what is left.
    const int64_t begin = rank * (plan.S() / t);
    const int64_t end = rank + 1 == t ? plan.S() : begin + plan.S() / t;
    for (const auto& run : plan.owned_by(begin, end)) {
      FUZZ_CHECK(run.position >= begin && run.position + run.length <= end, "rank ", rank, " of ", t);
      owned.push_back(run);
    }
  }
  FUZZ_CHECK(paint(owned, plan) == expected, t, " ranks");
}

void check_row_indices(const InsertPlan& plan, const std::vector<int64_t>& expected) {
  const auto indices = step37::row_indices(plan.runs(), plan.B());
  auto source = std::vector<int64_t>(expected.size(), -1);
  for (size_t i = 0; i < indices.embedding_rows.size(); ++i) {
    const int64_t s = indices.embedding_rows[i] / plan.B();
    const int64_t b = indices.embedding_rows[i] % plan.B();
    source.at(static_cast<size_t>(b * plan.S() + s)) = indices.feature_rows.at(i);
  }
  FUZZ_CHECK(source == expected);
}

size_t expected_warnings(const Input& input) {
  return static_cast<size_t>(std::count_if(input.groups.begin(), input.groups.end(), [&](const InsertGroup& group) {
    const auto occurrences = num_occurrences(input, group);
    return occurrences != group.rows.size() && occurrences > 0 && !group.rows.empty();
  }));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto input = read_input(fuzz::Numbers(data, size));
  InsertPlan plan;
  const auto reason =
      fuzz::refusal([&] { plan = InsertPlan::build(input.ids, input.B, input.S, input.groups, input.policy); });
  FUZZ_CHECK(reason.has_value() == !is_valid(input), reason.value_or("not refused"));
  if (reason) return 0;
  FUZZ_CHECK(plan.warnings().size() == expected_warnings(input));
  const auto comes_before = [](const InsertRun& one, const InsertRun& other) {
    return std::pair(one.batch, one.position) < std::pair(other.batch, other.position);
  };
  FUZZ_CHECK(std::is_sorted(plan.runs().begin(), plan.runs().end(), comes_before));
  const auto expected = paint(input);
  FUZZ_CHECK(paint(plan.runs(), plan) == expected);
  for (int64_t t = 1; t <= 4; ++t) check_owned(plan, t, expected);
  check_row_indices(plan, expected);
  return 0;
}

}  // namespace megatron_cpp
