// InsertPlan against a painter that writes image rows one by one, in the order of writing.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <limits>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "megatron_cpp/checkpoint/safetensors.h"
#include "step37/insert/plan.h"
#include "tests/support/environment.h"
#include "tests/support/errors.h"

namespace megatron_cpp::step37 {
namespace {

using test_support::value_error;

struct Ids {
  int64_t B = 0;
  int64_t S = 0;
  std::vector<int64_t> values;  // [B, S], row by row
};

InsertPlan build(const Ids& ids, const std::vector<InsertGroup>& groups,
                 MismatchPolicy policy = MismatchPolicy::kError) {
  return InsertPlan::build(ids.values, ids.B, ids.S, groups, policy);
}

/// [B, S], row by row: the feature row that ends there, or -1.
std::vector<int64_t> paint(const Ids& ids, const std::vector<InsertGroup>& groups) {
  std::vector<int64_t> source(ids.values.size(), -1);
  int64_t feature_row = 0;
  for (const auto& group : groups) {
    size_t image = 0;
    std::vector<int64_t> begins;
    for (const int64_t rows : group.rows) {
      begins.push_back(feature_row);
      feature_row += rows;
    }
    for (int64_t b = 0; b < ids.B; ++b) {
      for (int64_t p = 0; p < ids.S; ++p) {
        if (ids.values[static_cast<size_t>(b * ids.S + p)] != group.start_token || image == group.rows.size()) continue;
        for (int64_t row = 0; row < group.rows[image] && p + 1 + row < ids.S; ++row) {
          source[static_cast<size_t>(b * ids.S + p + 1 + row)] = begins[image] + row;
        }
        ++image;
      }
    }
  }
  return source;
}

std::vector<int64_t> expand(const std::vector<InsertRun>& runs, int64_t B, int64_t S) {
  std::vector<int64_t> source(static_cast<size_t>(B * S), -1);
  for (const auto& run : runs) {
    for (int64_t row = 0; row < run.length; ++row) {
      source.at(static_cast<size_t>(run.batch * S + run.position + row)) = run.feature_row + row;
    }
  }
  return source;
}

/// By batch row and position, none empty, none overlapping, each inside its image and its batch row.
void expect_well_formed(const std::vector<InsertRun>& runs, const InsertPlan& plan) {
  for (size_t i = 0; i < runs.size(); ++i) {
    const auto& run = runs[i];
    EXPECT_GT(run.length, 0);
    EXPECT_GE(run.position, 0);
    EXPECT_LE(run.position + run.length, plan.S());
    ASSERT_GE(run.image, 0);
    ASSERT_LT(run.image, plan.num_images());
    EXPECT_GE(run.feature_row, plan.image_begins()[static_cast<size_t>(run.image)]);
    EXPECT_LE(run.feature_row + run.length, plan.image_begins()[static_cast<size_t>(run.image) + 1]);
    if (i == 0) continue;
    const auto& before = runs[i - 1];
    EXPECT_TRUE(before.batch < run.batch ||
                (before.batch == run.batch && before.position + before.length <= run.position));
  }
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  /// Of [0, end).
  int64_t below(int64_t end) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(end)); }

 private:
  std::mt19937_64 engine_;  // its values are the same everywhere, a std distribution's are not
};

struct RandomCase {
  Ids ids;
  std::vector<InsertGroup> groups;
};

/// Start tokens 0, 1 and 2 among others; one to four groups, so that a token is often used twice; images from no row to
/// more than S; with `matching` each group has an image for every occurrence, otherwise up to two more or fewer.
RandomCase random_case(uint64_t seed, bool matching) {
  Random random(seed);
  RandomCase made;
  made.ids.B = 1 + random.below(4);
  made.ids.S = 1 + random.below(40);
  const int64_t rare = 4 + random.below(30);
  for (int64_t i = 0; i < made.ids.B * made.ids.S; ++i) made.ids.values.push_back(random.below(rare));
  const int64_t longest = 1 + random.below(random.below(2) == 0 ? 5 : made.ids.S + 4);
  for (int64_t g = 1 + random.below(4); g > 0; --g) {
    InsertGroup group{random.below(3), {}};
    int64_t images = std::count(made.ids.values.begin(), made.ids.values.end(), group.start_token);
    if (!matching) images = std::max<int64_t>(0, images + random.below(5) - 2);
    for (; images > 0; --images) group.rows.push_back(random.below(longest + 1));
    made.groups.push_back(group);
  }
  return made;
}

}  // namespace

TEST(InsertPlan, EqualsThePainterOnRandomCases) {
  int64_t num_runs = 0;
  for (uint64_t seed = 0; seed < 800; ++seed) {
    const bool matching = seed % 2 == 0;
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    const auto [ids, groups] = random_case(seed, matching);
    const auto plan = build(ids, groups, matching ? MismatchPolicy::kError : MismatchPolicy::kTruncate);
    EXPECT_EQ(plan.B(), ids.B);
    EXPECT_EQ(plan.S(), ids.S);
    const auto painted = paint(ids, groups);
    EXPECT_EQ(expand(plan.runs(), ids.B, ids.S), painted);
    expect_well_formed(plan.runs(), plan);
    num_runs += static_cast<int64_t>(plan.runs().size());

    std::vector<int64_t> rows;
    std::vector<int64_t> begins{0};
    for (const auto& group : groups) {
      for (const int64_t image_rows : group.rows) {
        rows.push_back(image_rows);
        begins.push_back(begins.back() + image_rows);
      }
    }
    EXPECT_EQ(plan.image_rows(), rows);
    EXPECT_EQ(plan.image_begins(), begins);
    EXPECT_EQ(plan.num_images(), static_cast<int64_t>(rows.size()));
    EXPECT_EQ(plan.num_feature_rows(), begins.back());
    if (matching) {
      EXPECT_TRUE(plan.warnings().empty());
    }
  }
  EXPECT_GT(num_runs, 2000);  // the cases are worth something
}

TEST(InsertPlan, PartsOwnTheirRowsAndTogetherAll) {
  for (uint64_t seed = 1000; seed < 1100; ++seed) {
    const auto [ids, groups] = random_case(seed, false);
    const auto plan = build(ids, groups, MismatchPolicy::kTruncate);
    const auto painted = paint(ids, groups);
    for (int64_t t = 1; t <= 8; ++t) {
      SCOPED_TRACE(testing::Message() << "seed " << seed << ", t " << t);
      for (int64_t r = 0; r < t; ++r) {
        const int64_t begin = r * ids.S / t;  // uneven where S isn't divisible
        const int64_t end = (r + 1) * ids.S / t;
        const auto own = plan.owned_by(begin, end);
        expect_well_formed(own, plan);
        auto expected = painted;
        for (int64_t i = 0; i < ids.B * ids.S; ++i) {
          if (i % ids.S < begin || i % ids.S >= end) expected[static_cast<size_t>(i)] = -1;
        }
        EXPECT_EQ(expand(own, ids.B, ids.S), expected);
      }
    }
    EXPECT_EQ(plan.owned_by(0, ids.S), plan.runs());
    EXPECT_TRUE(plan.owned_by(ids.S / 2, ids.S / 2).empty());
  }
}

TEST(RowIndices, AreFlatRowsAndFeatureRowsInTheOrderOfTheRuns) {
  const std::vector<InsertRun> runs{{0, 10, 2, 4, 2}, {1, 3, 0, 5, 1}};
  const auto indices = row_indices(runs, 3);
  EXPECT_EQ(indices.embedding_rows, (std::vector<int64_t>{14, 17, 15}));
  EXPECT_EQ(indices.feature_rows, (std::vector<int64_t>{10, 11, 3}));

  const auto none = row_indices({}, 3);
  EXPECT_TRUE(none.embedding_rows.empty());
  EXPECT_TRUE(none.feature_rows.empty());

  for (uint64_t seed = 2000; seed < 2100; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    const auto [ids, groups] = random_case(seed, true);
    const auto plan = build(ids, groups);
    const auto all = row_indices(plan.runs(), ids.B);
    std::vector<int64_t> source(ids.values.size(), -1);
    ASSERT_EQ(all.embedding_rows.size(), all.feature_rows.size());
    for (size_t i = 0; i < all.embedding_rows.size(); ++i) {
      const int64_t row = all.embedding_rows[i];
      source.at(static_cast<size_t>(row % ids.B * ids.S + row / ids.B)) = all.feature_rows[i];
    }
    EXPECT_EQ(source, paint(ids, groups));
  }
}

TEST(InsertPlan, CutsAtTheEndAndLeavesOutWhatHasNoRow) {
  const Ids ids{2,
                5,
                {7, 0, 0, 0, 7,  // an image of two rows; one whose rows would begin at S
                 0, 7, 7, 7, 0}};
  const auto plan = build(ids, {{7, {2, 3, 9, 0, 4}}});
  EXPECT_EQ(plan.runs(), (std::vector<InsertRun>{{0, 0, 0, 1, 2}, {2, 5, 1, 2, 2}, {4, 14, 1, 4, 1}}));
  EXPECT_EQ(plan.num_images(), 5);
  EXPECT_EQ(plan.num_feature_rows(), 18);
}

TEST(InsertPlan, LaterImagesAndGroupsWin) {
  const Ids ids{1, 8, {7, 0, 7, 8, 0, 0, 0, 0}};
  // Of the first image, the second leaves the rows at 1 and 2; the second group takes 4 and 5 of the second image.
  EXPECT_EQ(build(ids, {{7, {3, 5}}, {8, {2}}}).runs(),
            (std::vector<InsertRun>{{0, 0, 0, 1, 2}, {1, 3, 0, 3, 1}, {2, 8, 0, 4, 2}, {1, 6, 0, 6, 2}}));
  EXPECT_EQ(expand(build(ids, {{8, {2}}, {7, {3, 5}}}).runs(), 1, 8), (std::vector<int64_t>{-1, 2, 3, 5, 6, 7, 8, 9}));
  // The same token in two groups: the second begins with the first occurrence again.
  EXPECT_EQ(expand(build(ids, {{7, {3, 3}}, {7, {1, 2}}}).runs(), 1, 8),
            (std::vector<int64_t>{-1, 6, 1, 7, 8, 5, -1, -1}));
}

TEST(InsertPlan, NothingToInsert) {
  EXPECT_TRUE(build({2, 2, {1, 2, 3, 4}}, {}).runs().empty());
  EXPECT_EQ(build({2, 2, {1, 2, 3, 4}}, {}).num_feature_rows(), 0);
  EXPECT_TRUE(build({2, 2, {1, 2, 3, 4}}, {{9, {}}}).runs().empty());
  EXPECT_TRUE(build({0, 0, {}}, {{9, {}}}).runs().empty());
  EXPECT_TRUE(build({1, 2, {9, 1}}, {{9, {0}}}).runs().empty());
  EXPECT_TRUE(InsertPlan().runs().empty());
  EXPECT_EQ(InsertPlan().num_images(), 0);
}

TEST(InsertPlan, RefusesCountsThatDiffer) {
  const Ids ids{2, 4, {7, 1, 1, 7, 1, 7, 1, 1}};
  EXPECT_EQ(value_error([&] {
              build(ids, {{7, {1, 1}}});
            }),
            "2 images for 3 occurrences of start token 7: the first without an image is in batch row 1 at position 1");
  EXPECT_EQ(value_error([&] {
              build(ids, {{7, {}}});
            }),
            "0 images for 3 occurrences of start token 7: the first without an image is in batch row 0 at position 0");
  EXPECT_EQ(value_error([&] {
              build(ids, {{7, {1, 1, 1, 1}}});
            }),
            "4 images for 3 occurrences of start token 7: the last occurrence is in batch row 1");
  EXPECT_EQ(value_error([&] {
              build(ids, {{7, {1, 1, 1}}, {8, {2}}});
            }),
            "1 images for 0 occurrences of start token 8: no batch row has the token");
}

TEST(InsertPlan, TruncatesWithAWarning) {
  const Ids ids{2, 4, {7, 1, 1, 7, 1, 7, 1, 1}};
  const auto fewer = build(ids, {{7, {1, 2}}}, MismatchPolicy::kTruncate);
  EXPECT_EQ(fewer.runs(), (std::vector<InsertRun>{{0, 0, 0, 1, 1}}));
  EXPECT_EQ(fewer.warnings(),
            (std::vector<std::string>{"2 images for 3 occurrences of start token 7: inserting the overlap"}));
  const auto more = build(ids, {{7, {1, 1, 1, 5, 5}}, {1, {2}}}, MismatchPolicy::kTruncate);
  EXPECT_EQ(more.num_feature_rows(), 15);
  EXPECT_EQ(expand(more.runs(), 2, 4), (std::vector<int64_t>{-1, 0, 13, 14, -1, -1, 2, -1}));
  EXPECT_EQ(more.warnings(),
            (std::vector<std::string>{"5 images for 3 occurrences of start token 7: inserting the overlap",
                                      "1 images for 5 occurrences of start token 1: inserting the overlap"}));
  // The reference is silent where there is nothing to pair.
  EXPECT_TRUE(build(ids, {{7, {}}}, MismatchPolicy::kTruncate).warnings().empty());
  const auto orphans = build(ids, {{8, {3, 4}}}, MismatchPolicy::kTruncate);
  EXPECT_TRUE(orphans.warnings().empty());
  EXPECT_TRUE(orphans.runs().empty());
  EXPECT_EQ(orphans.num_feature_rows(), 7);
}

TEST(InsertPlan, RefusesSizesThatDoNotFit) {
  for (const auto policy : {MismatchPolicy::kError, MismatchPolicy::kTruncate}) {
    EXPECT_EQ(value_error([&] { build({2, 3, {1, 2, 3, 4, 5}}, {}, policy); }), "5 input ids are not [2, 3]");
    EXPECT_EQ(value_error([&] { build({-1, -2, {1, 2}}, {}, policy); }), "2 input ids are not [-1, -2]");
    EXPECT_EQ(value_error([&] {
                build({1, 3, {7, 7, 1}}, {{7, {1, -2}}}, policy);
              }),
              "image 1 of start token 7 has -2 feature rows");
    constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
    EXPECT_EQ(value_error([&] {
                build({1, 3, {7, 7, 1}}, {{7, {kMax, 1}}}, policy);
              }),
              "image 1 of start token 7 has 1 feature rows, after 9223372036854775807 of the images before it: their "
              "sum doesn't fit in 64 "
              "bits");
    EXPECT_EQ(value_error([&] {
                build({1LL << 32, 1LL << 32, {}}, {}, policy);
              }),
              "0 input ids are not [4294967296, 4294967296]");
  }
}

TEST(InsertPlan, FromItsOwnRunsIsTheSame) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    const auto [ids, groups] = random_case(seed, /*matching=*/false);
    const auto plan = build(ids, groups, MismatchPolicy::kTruncate);
    auto runs = plan.runs();
    std::reverse(runs.begin(), runs.end());
    const auto again = InsertPlan::from_runs(runs, ids.B, ids.S, plan.image_rows());
    EXPECT_EQ(again.runs(), plan.runs());
    EXPECT_EQ(again.embedding_rows(), row_indices(plan.runs(), ids.B).embedding_rows);
    EXPECT_EQ(again.image_begins(), plan.image_begins());
    EXPECT_EQ(again.owned_by(1, ids.S), plan.owned_by(1, ids.S));
  }
}

TEST(InsertPlan, RefusesRunsThatDoNotFit) {
  const auto refusal = [](std::vector<InsertRun> runs, std::vector<int64_t> image_rows = {3, 4}) {
    return value_error([&] { InsertPlan::from_runs(std::move(runs), 2, 6, image_rows); });
  };
  EXPECT_EQ(refusal({{2, 0, 0, 0, 1}}), "a run of image 2 of 2");
  EXPECT_EQ(refusal({{0, 0, 2, 0, 1}}), "a run of 1 rows at batch row 2, position 0 is not inside [2, 6]");
  EXPECT_EQ(refusal({{0, 0, 1, 4, 3}}), "a run of 3 rows at batch row 1, position 4 is not inside [2, 6]");
  EXPECT_EQ(refusal({{0, 0, 1, 4, 0}}), "a run of 0 rows at batch row 1, position 4 is not inside [2, 6]");
  EXPECT_EQ(refusal({{0, 1, 0, 0, 3}}), "a run of 3 feature rows from 1 on is not inside image 0");
  EXPECT_EQ(refusal({{1, 2, 0, 0, 3}}), "a run of 3 feature rows from 2 on is not inside image 1");
  EXPECT_EQ(refusal({{1, 3, 0, 2, 4}, {0, 0, 0, 0, 3}}), "two runs overlap in batch row 0 at position 2");
  EXPECT_EQ(refusal({}, {1, -1}), "image 1 has -1 feature rows, after 1 of the images before it");
  EXPECT_EQ(refusal({}, {1, std::numeric_limits<int64_t>::max()}),
            "image 1 has 9223372036854775807 feature rows, after 1 of the images before it");
}

// Placeholders of two images that touch, and of one that goes on in the next batch row.
TEST(InsertPlan, OfPlaceholdersTakesOneRowEach) {
  const std::vector<int64_t> ids{9, 9, 9, 1, 9, 9, 2, 9};
  const auto plan = InsertPlan::from_placeholders(ids, 2, 4, 9, {2, 0, 1, 3});
  const std::vector<InsertRun> expected{{0, 0, 0, 0, 2}, {2, 2, 0, 2, 1}, {3, 3, 1, 0, 2}, {3, 5, 1, 3, 1}};
  EXPECT_EQ(plan.runs(), expected);
  EXPECT_EQ(plan.num_feature_rows(), 6);
  EXPECT_EQ(value_error([&] {
              InsertPlan::from_placeholders(ids, 2, 4, 9, {2, 3});
            }),
            "5 feature rows for 6 placeholders 9");
  EXPECT_EQ(value_error([&] { InsertPlan::from_placeholders(ids, 2, 3, 9, {2}); }), "8 input ids are not [2, 3]");
  EXPECT_TRUE(InsertPlan::from_placeholders(ids, 2, 4, 7, {}).runs().empty());
}

TEST(InsertPlan, EqualsTheGoldenCases) {
  int num_cases = 0;
  for (const auto& entry : std::filesystem::directory_iterator(test_support::cases() / "embed")) {
    if (entry.path().extension() != ".safetensors") continue;
    SCOPED_TRACE(entry.path().filename().string());
    ++num_cases;
    const SafetensorsFile file(entry.path());
    const auto ids = file.read("input_ids");
    std::vector<InsertGroup> groups;
    for (int g = 0; file.contains("group" + std::to_string(g) + ".insert_start_token"); ++g) {
      const auto name = "group" + std::to_string(g);
      InsertGroup group{file.read(name + ".insert_start_token").item<int64_t>(), {}};
      auto add = [&](const std::vector<int64_t>& shape) {
        group.rows.insert(group.rows.end(), shape.size() == 3 ? static_cast<size_t>(shape[0]) : 1, shape.end()[-2]);
      };
      const auto whole = name + ".image_features";
      if (file.contains(whole)) add(file.entries().at(whole).shape);
      for (int i = 0; file.contains(whole + "." + std::to_string(i)); ++i) {
        add(file.entries().at(whole + "." + std::to_string(i)).shape);
      }
      groups.push_back(group);
    }
    const auto plan = InsertPlan::build({ids.const_data_ptr<int64_t>(), static_cast<size_t>(ids.numel())}, ids.size(0),
                                        ids.size(1), groups, MismatchPolicy::kTruncate);
    const auto source = expand(plan.runs(), plan.B(), plan.S());
    const auto expected = file.read("expected.row_source").t().contiguous();
    const auto* rows = expected.const_data_ptr<int64_t>();
    EXPECT_EQ(source, std::vector<int64_t>(rows, rows + expected.numel()));
    EXPECT_EQ(plan.warnings().empty(), file.metadata().at("warned") == "[]");
  }
  EXPECT_GE(num_cases, 17);
}

}  // namespace megatron_cpp::step37
