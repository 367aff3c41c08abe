// ImageInsertEmbedding on random cases: every legal choice of sizes, shardings, images and trained parts, against the
// dense counterpart, bit for bit. rapidcheck draws the cases and makes a failing one smaller.
//
// Every rank draws the same cases, from one seed, and takes the verdict of all ranks for its own: all shrink in step.
// rapidcheck's variable RC_PARAMS chooses others ("seed=1 max_success=10000"), or the one that it says failed
// ("reproduce=..."), on as many ranks as before.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <mpi.h>
#include <rapidcheck.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <ostream>
#include <sstream>
#include <string>
#include <vector>

#include "parallel/shard.h"
#include "tests/step37/image_insert_world.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::step37 {
namespace {

using namespace insert_world;
using test_support::exact_values;

constexpr const char* kDefaultParams = "seed=20260101 max_success=2000";

// ---- A case ----

/// A feature tensor: [L, C] of one image or [N, L, C] of N.
struct Entry {
  int64_t N;  ///< -1: one image without a dimension of its own
  int64_t L;
  int64_t num_images() const { return N < 0 ? 1 : N; }
};

struct Group {
  int64_t token = 0;
  bool as_list = true;  ///< else its one entry is passed as it is
  std::vector<Entry> entries;
};

enum class Assignment { kBalanced, kDrawn, kOnOne };

struct Case {
  Variant variant;
  Sizes sizes;
  int64_t S = 1, B = 1;
  std::vector<Place> places;
  std::vector<Group> groups;
  MismatchPolicy on_mismatch = MismatchPolicy::kError;
  Trainable trainable;
  Placement placement = Placement::kEverywhere;
  Assignment assignment = Assignment::kBalanced;
  std::vector<int64_t> holders;  ///< of each image, if they are given
  bool bias = false, accumulates = false, words_accumulate = false, plan_ahead = false;
  int64_t values = 0;  ///< what exact values begin with
};

std::ostream& operator<<(std::ostream& stream, const Case& drawn) {
  stream << drawn.variant.name() << ", V " << drawn.sizes.V << ", H " << drawn.sizes.H << ", C " << drawn.sizes.C
         << ", S " << drawn.S << ", B " << drawn.B << ", bias " << drawn.bias << ", accumulates " << drawn.accumulates
         << " (words " << drawn.words_accumulate << "), plan ahead " << drawn.plan_ahead << ", truncates "
         << (drawn.on_mismatch == MismatchPolicy::kTruncate) << ", values " << drawn.values << ", "
         << drawn.trainable.name() << ", " << name_of(drawn.placement) << ", assignment "
         << static_cast<int>(drawn.assignment) << ", holders " << at::IntArrayRef(drawn.holders) << ", places";
  for (const auto& place : drawn.places) {
    stream << " " << place.token << "@(" << place.batch << ", " << place.position << ")";
  }
  for (const auto& group : drawn.groups) {
    stream << ", group of " << group.token << (group.as_list ? " [" : " tensor [");
    for (const auto& entry : group.entries) stream << " " << entry.N << "x" << entry.L;
    stream << " ]";
  }
  return stream;
}

/// [B, S] ids in which start tokens are at their places only.
at::Tensor ids_of(const Case& drawn) {
  std::vector<int64_t> others;
  for (int64_t id = 0; id < drawn.sizes.V; ++id) {
    const auto is_id = [&](const Group& group) { return group.token == id; };
    if (std::none_of(drawn.groups.begin(), drawn.groups.end(), is_id)) others.push_back(id);
  }
  const auto number = (exact_values({drawn.B, drawn.S}, drawn.values) * 8).to(at::kLong).add(32);
  auto ids = at::tensor(others, at::kLong).take(number.remainder(static_cast<int64_t>(others.size())));
  for (const auto& place : drawn.places) ids[place.batch][place.position] = place.token;
  return ids;
}

Scenario scenario_of(const Case& drawn) {
  Scenario scenario{"random", ids_of(drawn), {}, drawn.on_mismatch};
  int64_t seed = drawn.values + 100;
  for (const auto& group : drawn.groups) {
    std::vector<at::Tensor> tensors;
    for (const auto& entry : group.entries) {
      auto shape = entry.N < 0 ? std::vector<int64_t>{entry.L} : std::vector<int64_t>{entry.N, entry.L};
      tensors.push_back(insert_world::features(seed++, shape, drawn.sizes.C));
    }
    scenario.images.push_back(group.as_list ? insert_world::group_of(group.token, tensors)
                                            : insert_world::group_of(group.token, tensors.front()));
  }
  return scenario;
}

Placed placed_of(const Case& drawn, const Scenario& scenario) {
  if (drawn.placement != Placement::kOnHolders) return {drawn.placement, {}, false};
  if (drawn.assignment == Assignment::kBalanced) {
    return insert_world::on_balanced_holders(scenario.images, drawn.variant.t);
  }
  return {Placement::kOnHolders, drawn.holders, true};
}

// ---- Drawing one ----

/// From [least, most], whatever rapidcheck's size; shrinks towards `least`.
int64_t draw(int64_t least, int64_t most) {
  return *rc::gen::resize(rc::kNominalSize, rc::gen::inRange<int64_t>(least, most + 1));
}
bool one_in(int64_t k) { return draw(0, k - 1) == k - 1; }
/// A multiple of `step` of at most `most`.
int64_t draw_multiple(int64_t step, int64_t most) { return step * draw(1, most / step); }

template <class Values>
auto pick(const Values& values) {
  return values[static_cast<size_t>(draw(0, static_cast<int64_t>(std::size(values)) - 1))];
}

Variant draw_variant() {
  auto sizes = test_support::divisors_of_world();
  sizes.insert(sizes.end(), 2, sizes.back());  // the large groups more often
  return pick(insert_world::variants(pick(sizes)));
}

void draw_places(Case& drawn) {
  const int64_t num_groups = draw(0, 3);
  for (int64_t i = 0; i < num_groups; ++i) {
    drawn.groups.push_back({draw(0, drawn.sizes.V - 2), true, {}});  // some id is left for the text
  }
  if (num_groups == 0) return;
  const int64_t num_places = draw(0, 6);
  for (int64_t i = 0; i < num_places; ++i) {
    // The last position has no row after it, and is more often drawn than by chance.
    const int64_t position = one_in(8) ? drawn.S - 1 : draw(0, drawn.S - 1);
    drawn.places.push_back({pick(drawn.groups).token, draw(0, drawn.B - 1), position});
  }
}

/// `num_images` images as one tensor or as a list of tensors of one or several.
void draw_entries(Group& group, int64_t num_images) {
  group.as_list = !one_in(3);
  if (!group.as_list) {
    group.entries = {{num_images, draw(0, 9)}};
    return;
  }
  while (num_images > 0) {
    const Entry entry{one_in(2) ? draw(0, std::min<int64_t>(num_images, 3)) : -1, draw(0, 9)};
    group.entries.push_back(entry);
    num_images -= entry.num_images();
  }
}

void draw_images(Case& drawn) {
  const auto ids = ids_of(drawn);
  bool all_match = true;
  int64_t num_images = 0;
  for (auto& group : drawn.groups) {
    const int64_t occurrences = ids.eq(group.token).sum().item<int64_t>();
    const int64_t wanted = one_in(4) ? draw(0, occurrences + 2) : occurrences;
    draw_entries(group, wanted);
    all_match = all_match && wanted == occurrences;
    num_images += wanted;
  }
  drawn.on_mismatch = all_match ? MismatchPolicy::kError : MismatchPolicy::kTruncate;
  const int64_t t = drawn.variant.t;
  const int64_t the_one = draw(0, t - 1);
  for (int64_t i = 0; i < num_images; ++i) {
    drawn.holders.push_back(drawn.assignment == Assignment::kOnOne ? the_one : draw(0, t - 1));
  }
}

Case draw_case() {
  Case drawn;
  drawn.variant = draw_variant();
  const int64_t t = drawn.variant.t;
  const bool splits_H = drawn.variant.column() || drawn.variant.hidden();
  drawn.sizes = {draw(2, 30), draw_multiple(splits_H ? t : 1, 12), draw_multiple(drawn.variant.row() ? t : 1, 9)};
  drawn.S = draw_multiple(drawn.variant.sequence_parallel ? t : 1, 20);
  drawn.B = draw(1, 3);
  drawn.values = draw(0, 1000);
  drawn.trainable = pick(kTrainable);
  std::vector<Placement> placements{Placement::kEverywhere, Placement::kOnHolders};
  if (drawn.variant.row()) placements.push_back(Placement::kSliced);
  drawn.placement = pick(placements);
  drawn.assignment = pick(std::vector{Assignment::kBalanced, Assignment::kDrawn, Assignment::kOnOne});
  drawn.bias = one_in(2);
  drawn.accumulates = one_in(4);
  drawn.words_accumulate = one_in(4);
  drawn.plan_ahead = one_in(2);
  draw_places(drawn);
  draw_images(drawn);
  return drawn;
}

// ---- What must hold of it ----

Results scaled(Results results, double factor) {
  for (auto* gradient : {&results.words_gradient, &results.weight_gradient, &results.bias_gradient}) {
    *gradient = *gradient * factor;
  }
  results.feature_gradients =
      insert_world::changed(results.feature_gradients, [&](const at::Tensor& tensor) { return tensor * factor; });
  return results;
}

/// What is wrong on this rank; "" if nothing.
std::string problem_of(const Case& drawn) {
  const auto scenario = scenario_of(drawn);
  const auto placed = placed_of(drawn, scenario);
  const Parameters parameters(drawn.values + 1, drawn.sizes);
  const auto loss_weights = exact_values({drawn.S, drawn.B, drawn.sizes.H}, drawn.values + 5);
  auto expected = dense(scenario, parameters, drawn.bias, loss_weights);

  const auto layer = make_layer(drawn.variant, parameters,
                                {.on_mismatch = drawn.on_mismatch,
                                 .bias = drawn.bias,
                                 .accumulate_into_grad = drawn.accumulates,
                                 .words_accumulate_into_grad = drawn.words_accumulate});
  layer.set_trainable(drawn.trainable);
  const auto images = layer.leaves(scenario.images, placed, drawn.trainable.features);
  auto trainable = drawn.trainable;  // what takes part
  if (insert_world::tensors_of(images).empty()) trainable.features = false;
  // Without a group the projector takes part or doesn't, with a gradient of zero.
  const bool groups = !images.empty();
  if (!groups) trainable.projector = false;

  std::string problems;
  const auto note = [&](const std::string& what, const testing::AssertionResult& result) {
    if (!result) problems += what + " " + result.message() + "\n";
  };
  const int passes = drawn.accumulates || drawn.words_accumulate ? 2 : 1;
  for (int pass = 0; pass < passes; ++pass) {
    const auto output = drawn.plan_ahead
                            ? layer.forward(scenario.ids, images, layer.insert->make_plan(scenario.ids, images))
                            : layer.forward(scenario.ids, images);
    note("output", test_support::equal(output, layer.own_sequence(expected.output)));
    if (groups && output.requires_grad() != trainable.any()) problems += "output.requires_grad is wrong\n";
    if (output.requires_grad()) layer.backward(output, loss_weights);
  }
  expected = scaled(expected, passes);
  if (groups) {
    note("gradients", gradients_are(layer, images, expected, trainable, placed));
    return problems;
  }
  const auto words_gradient = insert_world::gradient_of(layer.words());
  note("words", test_support::equal(words_gradient, trainable.embedding ? layer.own_words(expected.words_gradient)
                                                                        : at::zeros_like(words_gradient)));
  note("weight", test_support::equal(insert_world::gradient_of(layer.weight()), at::zeros_like(layer.weight())));
  return problems;
}

// ---- Verdicts ----

/// The worst of the ranks' verdicts, on every rank. On a communicator of its own: where one rank has thrown, the
/// others' next message is another.
class Verdicts {
 public:
  enum Verdict { kRight, kWrong, kOutOfStep };

  Verdicts() { MPI_Comm_dup(MPI_COMM_WORLD, &communicator_); }
  ~Verdicts() { MPI_Comm_free(&communicator_); }
  Verdicts(const Verdicts&) = delete;
  Verdicts& operator=(const Verdicts&) = delete;

  Verdict worst_of(Verdict own) const {
    int verdict = own;
    MPI_Allreduce(MPI_IN_PLACE, &verdict, 1, MPI_INT, MPI_MAX, communicator_);
    return static_cast<Verdict>(verdict);
  }

 private:
  MPI_Comm communicator_ = MPI_COMM_NULL;
};

/// Checks a case and throws rapidcheck's failure on every rank if it is wrong on any.
class Checker {
 public:
  void check(const Case& drawn) {
    // Once ranks have waited for each other in vain, collectives that nobody finished are left. No smaller case can be
    // tried; "right" keeps the case that did it.
    if (out_of_step_) return;
    auto own = Verdicts::kRight;
    std::string problem;
    try {
      problem = problem_of(drawn);
      if (!problem.empty()) own = Verdicts::kWrong;
    } catch (const c10::DistBackendError& error) {
      own = Verdicts::kOutOfStep;
      problem = error.what_without_backtrace();
    } catch (const c10::Error& error) {
      own = Verdicts::kWrong;
      problem = error.what_without_backtrace();
    } catch (const std::exception& error) {
      own = Verdicts::kWrong;
      problem = error.what();
    }
    const auto worst = verdicts_.worst_of(own);
    out_of_step_ = worst == Verdicts::kOutOfStep;
    if (first_problem_.empty()) first_problem_ = problem;
    if (worst != Verdicts::kRight) RC_FAIL(problem.empty() ? "wrong on another rank" : problem);
  }

  /// Of the case as it was drawn, on this rank.
  const std::string& first_problem() const { return first_problem_; }

 private:
  Verdicts verdicts_;
  bool out_of_step_ = false;
  std::string first_problem_;
};

// ---- What was drawn ----

std::string layout_of(const Variant& variant) {
  return std::string(variant.hidden() ? "hidden" : "vocabulary") + (variant.column() ? ", column, "
                                                                    : variant.row()  ? ", row, "
                                                                                     : ", replicated, ");
}

/// How often each sort of case occurred.
class Cover {
 public:
  void count(const Case& drawn) {
    const auto& variant = drawn.variant;
    ++counts_[variant.name()];
    const auto layout = layout_of(variant);
    ++counts_[layout + name_of(drawn.placement)];
    if (variant.fused() && variant.sequence_parallel) ++counts_[layout + drawn.trainable.name()];
    if (drawn.placement == Placement::kOnHolders) {
      ++counts_["assignment " + std::to_string(static_cast<int>(drawn.assignment))];
    }
    count_if("no group", drawn.groups.empty());
    count_if("bias", drawn.bias);
    count_if("accumulates", drawn.accumulates && drawn.trainable.projector);
    count_if("words accumulate", drawn.words_accumulate && drawn.trainable.embedding);
    count_if("plan ahead", drawn.plan_ahead);
    count_if("truncates", drawn.on_mismatch == MismatchPolicy::kTruncate);
    count_images(drawn);
  }
  void expect(const std::string& name, int64_t least) const {
    const auto found = counts_.find(name);
    EXPECT_GE(found == counts_.end() ? 0 : found->second, least) << name;
  }

 private:
  void count_if(const std::string& name, bool condition) { counts_[name] += condition ? 1 : 0; }

  void count_images(const Case& drawn) {
    const auto ids = ids_of(drawn);
    std::vector<bool> taken(static_cast<size_t>(drawn.B * drawn.S), false);
    bool overlaps = false, cut = false, at_end = false, no_rows = false, more = false, fewer = false, twice = false;
    for (const auto& group : drawn.groups) {
      std::vector<int64_t> rows;
      for (const auto& entry : group.entries) {
        count_if(entry.N < 0 ? "[L, C] in a list" : group.as_list ? "[N, L, C] in a list" : "[N, L, C]", true);
        rows.insert(rows.end(), static_cast<size_t>(entry.num_images()), entry.L);
      }
      size_t image = 0;
      for (int64_t b = 0; b < drawn.B; ++b) {
        for (int64_t p = 0; p < drawn.S; ++p) {
          if (ids[b][p].item<int64_t>() != group.token) continue;
          fewer = fewer || image == rows.size();
          if (image == rows.size()) continue;
          at_end = at_end || p == drawn.S - 1;
          no_rows = no_rows || rows[image] == 0;
          cut = cut || p + rows[image] >= drawn.S;
          for (int64_t row = p + 1; row <= p + rows[image] && row < drawn.S; ++row) {
            const auto position = static_cast<size_t>(b * drawn.S + row);
            overlaps = overlaps || taken[position];
            taken[position] = true;
          }
          ++image;
        }
      }
      more = more || image < rows.size();
      const auto same = [&](const Group& other) { return other.token == group.token; };
      twice = twice || std::count_if(drawn.groups.begin(), drawn.groups.end(), same) > 1;
    }
    count_if("overlaps", overlaps);
    count_if("cut at the end", cut);
    count_if("token at the end", at_end);
    count_if("image without rows", no_rows);
    count_if("more images than places", more);
    count_if("more places than images", fewer);
    count_if("token of two groups", twice);
  }

  std::map<std::string, int64_t> counts_;
};

void expect_every_sort(const Cover& cover, int64_t cases) {
  for (const int t : test_support::divisors_of_world()) {
    const auto all = insert_world::variants(t);
    for (const auto& variant : all) cover.expect(variant.name(), cases / 250);
  }
  for (const auto& variant : insert_world::variants(1)) {
    const auto layout = layout_of(variant);
    cover.expect(layout + name_of(Placement::kEverywhere), cases / 100);
    cover.expect(layout + name_of(Placement::kOnHolders), cases / 100);
    if (variant.row()) cover.expect(layout + name_of(Placement::kSliced), cases / 100);
    for (const auto& trainable : kTrainable) cover.expect(layout + trainable.name(), cases / 1000);
  }
  for (const auto* name :
       {"no group", "bias", "accumulates", "words accumulate", "plan ahead", "truncates", "[L, C] in a list",
        "[N, L, C] in a list", "[N, L, C]", "overlaps", "cut at the end", "token at the end", "image without rows",
        "more images than places", "more places than images", "token of two groups", "assignment 0", "assignment 1",
        "assignment 2"}) {
    cover.expect(name, cases / 50);
  }
}

}  // namespace

TEST(ImageInsertProperty, EveryCaseEqualsTheDenseOne) {
  test_support::Warnings warnings;
  setenv("RC_PARAMS", kDefaultParams, /*overwrite=*/0);  // rapidcheck reads and prints it before its first case
  const rc::detail::TestMetadata metadata{"ImageInsertProperty/EveryCaseEqualsTheDenseOne", ""};
  auto params = rc::detail::configuration().testParams;
  MPI_Bcast(&params.seed, 1, MPI_UINT64_T, 0, MPI_COMM_WORLD);  // without a seed in RC_PARAMS every rank has its own
  Checker checker;
  Cover cover;
  const auto result = rc::detail::checkTestable(
      [&] {
        const auto drawn = *rc::gen::exec(draw_case);
        checker.check(drawn);
        cover.count(drawn);
      },
      metadata, params);
  if (!result.is<rc::detail::SuccessResult>()) {
    std::ostringstream text;
    rc::detail::printResultMessage(result, text);
    FAIL() << text.str() << "\nfirst: " << checker.first_problem() << "\nof seed " << params.seed << " ("
           << std::getenv("RC_PARAMS") << ") on " << test_support::runtime().size() << " ranks";
  }
  if (rc::detail::configuration().reproduce.empty()) {
    expect_every_sort(cover, params.maxSuccess);
  }
}

}  // namespace megatron_cpp::step37
