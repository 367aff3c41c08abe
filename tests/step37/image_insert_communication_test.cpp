// What ImageInsertEmbedding sends and what it leaves undone: collectives and bytes by what is trained, no full buffer,
// and no waiting for the device.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "parallel/recording_backend.h"
#include "tests/step37/image_insert_world.h"
#include "tests/support/operator_watch.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::step37 {
namespace {

using namespace insert_world;
using parallel::CollectiveKind;
using parallel::CommunicationCount;
using namespace test_support;

std::string text(const CommunicationCount& count) {
  std::string result;
  for (int kind = 0; kind < parallel::kNumCollectiveKinds; ++kind) {
    const auto collective = static_cast<CollectiveKind>(kind);
    result += std::string(collective_name(collective)) + " " + std::to_string(count.of(collective)) + ", ";
  }
  return result + std::to_string(count.bytes_sent) + " bytes";
}

/// Counts to expect on t ranks, in float32.
class Expected {
 public:
  explicit Expected(int t) : t_(t) {}
  /// A collective on `elements` in all, by the standard count.
  Expected& add(CollectiveKind kind, int64_t elements) {
    return add_sent(kind, (kind == CollectiveKind::kAllReduce ? 2 : 1) * elements * (t_ - 1) / t_);
  }
  /// A collective in which this rank sends `elements` to others.
  Expected& add_sent(CollectiveKind kind, int64_t elements) {
    if (t_ == 1) return *this;
    ++count_.collectives[static_cast<size_t>(kind)];
    count_.bytes_sent += elements * 4;
    return *this;
  }
  std::string text() const { return step37::text(count_); }

 private:
  int64_t t_;
  CommunicationCount count_;
};

/// How many rows of which sort there are. Owner q has rows [q*S/t, (q+1)*S/t) of the sequence.
struct RowCounts {
  std::vector<int64_t> text_of, images_of;   // rows that an owner has of text and of images
  std::vector<int64_t> made_for;             // rows that an owner has of images that this rank holds
  std::vector<int64_t> owned_from;           // rows that this rank has of images that another holds
  std::vector<int64_t> found_by;             // rows of text that this rank has and whose id is in another's vocabulary
  int64_t text = 0, made = 0;                // over all owners
  int64_t features = 0, held = 0, most = 0;  // feature rows in all, on this rank, on the rank with most
};

/// Painted row by row, as the dense counterpart does it.
RowCounts count_rows(const Scenario& scenario, const Variant& variant, int64_t rank,
                     const std::vector<int64_t>& holders) {
  const int64_t B = scenario.ids.size(0);
  std::vector<int64_t> image_at(static_cast<size_t>(kS * B), -1);
  int64_t first_of_group = 0;
  for (const auto& group : scenario.images) {
    const auto rows = rows_of({group});
    size_t image = 0;
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t p = 0; p < kS; ++p) {
        if (scenario.ids[b][p].item<int64_t>() != group.insert_start_token || image == rows.size()) continue;
        for (int64_t row = p + 1; row <= p + rows[image] && row < kS; ++row) {
          image_at[static_cast<size_t>(row * B + b)] = first_of_group + static_cast<int64_t>(image);
        }
        ++image;
      }
    }
    first_of_group += static_cast<int64_t>(rows.size());
  }
  const auto t = static_cast<size_t>(variant.t);
  RowCounts counts;
  counts.text_of = counts.images_of = counts.made_for = counts.owned_from = counts.found_by =
      std::vector<int64_t>(t, 0);
  const int64_t ids_per_rank = (kV + variant.t - 1) / variant.t;
  for (size_t row = 0; row < image_at.size(); ++row) {
    const size_t owner = row * t / image_at.size();
    if (image_at[row] < 0) {
      ++counts.text_of[owner];
      ++counts.text;
      const int64_t flat = static_cast<int64_t>(row);
      const int64_t id = scenario.ids[flat % B][flat / B].item<int64_t>();
      if (static_cast<int64_t>(owner) == rank) ++counts.found_by[static_cast<size_t>(id / ids_per_rank)];
      continue;
    }
    ++counts.images_of[owner];
    const int64_t holder = holders[static_cast<size_t>(image_at[row])];
    if (holder == rank) {
      ++counts.made_for[owner];
      ++counts.made;
    }
    if (static_cast<int64_t>(owner) == rank) ++counts.owned_from[static_cast<size_t>(holder)];
  }
  std::vector<int64_t> held(t, 0);
  const auto rows = rows_of(scenario.images);
  for (size_t image = 0; image < rows.size(); ++image) {
    counts.features += rows[image];
    held[static_cast<size_t>(holders[image])] += rows[image];
  }
  counts.held = held[static_cast<size_t>(rank)];
  counts.most = *std::max_element(held.begin(), held.end());
  return counts;
}

/// The table of docs/image-insert.md.
class Volumes {
 public:
  Volumes(const Scenario& scenario, const Variant& variant, int64_t rank, const std::vector<int64_t>& holders)
      : variant_(variant),
        rank_(static_cast<size_t>(rank)),
        rows_(count_rows(scenario, variant, rank, holders)),
        M_(kS * scenario.ids.size(0) * kH) {}

  std::string forward(const Trainable& trained, Placement placement) const {
    Expected expected(variant_.t);
    if (placement == Placement::kOnHolders && variant_.column()) {
      expected.add(CollectiveKind::kAllGather, t() * rows_.most * kC);
    }
    if (placement == Placement::kOnHolders && variant_.row()) {
      expected.add_sent(CollectiveKind::kAllToAll, (t() - 1) * rows_.held * kC / t());
    }
    if (!variant_.hidden()) {
      expected.add(sp() ? CollectiveKind::kReduceScatter : CollectiveKind::kAllReduce, M_);
    } else if (variant_.column() || owners_project(trained, placement)) {
      expected.add(sp() ? CollectiveKind::kAllToAll : CollectiveKind::kAllGather, sp() ? M_ / t() : M_);
    } else if (sp()) {
      expected.add_sent(CollectiveKind::kAllToAll,
                        to_others(rows_.text_of) * kH / t() + to_others(rows_.made_for) * kH);
    } else {
      expected.add_sent(CollectiveKind::kAllGather, (t() - 1) * (rows_.text * kH / t() + rows_.made * kH));
    }
    if (!variant_.fused()) {
      expected.add(variant_.row() ? CollectiveKind::kAllReduce : CollectiveKind::kAllGather,
                   gathered_rows(placement) * kH);
    }
    return expected.text();
  }

  std::string backward(const Trainable& trained, Placement placement) const {
    Expected expected(variant_.t);
    if (sp()) {
      if (!variant_.fused()) {
        add_gather_backward(expected, trained, placement);
      } else if (!owners_project(trained, placement)) {
        add_fused_backward(expected, trained);
      }
    }
    if (trained.features) add_features_backward(expected, placement);
    return expected.text();
  }

 private:
  void add_gather_backward(Expected& expected, const Trainable& trained, Placement placement) const {
    if (trained.embedding) expected.add(CollectiveKind::kAllGather, M_);
    if (trained.projector || trained.features) {
      expected.add(variant_.row() ? CollectiveKind::kAllReduce : CollectiveKind::kReduceScatter,
                   gathered_rows(placement) * kH);
    }
  }
  void add_fused_backward(Expected& expected, const Trainable& trained) const {
    const bool images = trained.projector || trained.features;
    if (!trained.embedding && !images) return;
    const int64_t own_text = (t() - 1) * rows_.text_of[rank_];
    const int64_t own_images = (t() - 1) * rows_.images_of[rank_];
    if (variant_.hidden()) {
      expected.add_sent(CollectiveKind::kAllToAll,
                        (trained.embedding ? own_text * kH / t() : 0) + (images ? images_sent_back() : 0));
    } else if (trained.embedding && images) {
      expected.add(CollectiveKind::kAllGather, M_);
    } else if (trained.embedding) {
      expected.add_sent(CollectiveKind::kAllToAll, to_others(rows_.found_by) * kH);
    } else if (variant_.row()) {
      expected.add_sent(CollectiveKind::kAllGather, own_images * kH);
    } else {
      expected.add_sent(CollectiveKind::kAllToAll, images_sent_back());
    }
  }
  void add_features_backward(Expected& expected, Placement placement) const {
    if (placement == Placement::kSliced || variant_.replicated()) return;
    const bool everywhere = placement == Placement::kEverywhere;
    if (variant_.column()) {
      expected.add(everywhere ? CollectiveKind::kAllReduce : CollectiveKind::kReduceScatter,
                   (everywhere ? rows_.features : t() * rows_.most) * kC);
    } else if (everywhere) {
      expected.add(CollectiveKind::kAllGather, rows_.features * kC);
    } else {
      expected.add_sent(CollectiveKind::kAllToAll, (rows_.features - rows_.held) * kC / t());
    }
  }

  int64_t t() const { return variant_.t; }
  bool sp() const { return variant_.sequence_parallel; }
  /// Each rank projects the rows it owns, and nobody needs anything back.
  bool owners_project(const Trainable& trained, Placement placement) const {
    return variant_.replicated() && variant_.fused() && sp() && placement == Placement::kEverywhere &&
           trained.projector && !trained.embedding && !trained.features;
  }
  /// Rows of single ranks are padded to the rank that holds most; the row sharding exchanges them without.
  int64_t gathered_rows(Placement placement) const {
    const bool padded = variant_.replicated() || (variant_.column() && placement == Placement::kOnHolders);
    return padded ? t() * rows_.most : rows_.features;
  }
  /// A row of an image goes to every rank's columns, or whole to the rank that holds the image.
  int64_t images_sent_back() const {
    return variant_.replicated() ? to_others(rows_.owned_from) * kH : (t() - 1) * rows_.images_of[rank_] * kH / t();
  }
  int64_t to_others(const std::vector<int64_t>& rows) const {
    int64_t sum = 0;
    for (size_t peer = 0; peer < rows.size(); ++peer) sum += peer == rank_ ? 0 : rows[peer];
    return sum;
  }

  Variant variant_;
  size_t rank_;
  RowCounts rows_;
  int64_t M_;
};

}  // namespace

// Which parts are trained and where features are decides what is sent, and changes no value.
TEST(ImageInsertCommunication, IsWhatTheDocumentsSayForEveryChoiceOfTrainableParts) {
  const Parameters parameters(1);
  for (const auto& scenario : {two_groups(), overlaps()}) {
    const auto loss_weights = exact_values({kS, scenario.ids.size(0), kH}, 5);
    const auto expected = dense(scenario, parameters, true, loss_weights);
    for_each_variant([&](const Variant& variant) {
      for (const auto& placed : placements(variant, scenario.images)) {
        for (const auto& trainable : kTrainable) {
          SCOPED_TRACE(testing::Message()
                       << scenario.name << ", " << name_of(placed.placement) << ", " << trainable.name());
          const auto layer = make_layer(variant, parameters);
          const Volumes volumes(scenario, variant, layer.rank(), placed.holders);
          layer.set_trainable(trainable);
          const auto images = layer.leaves(scenario.images, placed, trainable.features);

          const auto start = *layer.recorded.count;
          const auto output = layer.forward(scenario.ids, images);
          const auto after_forward = *layer.recorded.count;
          EXPECT_EQ(text(after_forward - start), volumes.forward(trainable, placed.placement));
          EXPECT_TRUE(test_support::equal(output, layer.own_sequence(expected.output)));
          EXPECT_EQ(output.requires_grad(), trainable.any());
          if (trainable.any()) layer.backward(output, loss_weights);
          EXPECT_EQ(text(*layer.recorded.count - after_forward), volumes.backward(trainable, placed.placement));
          EXPECT_TRUE(gradients_are(layer, images, expected, trainable, placed));
        }
      }
    });
  }
}

// Nobody wants a gradient of what is made without recording one: replicated projectors then project as always.
TEST(ImageInsertCommunication, WithoutGradientModeIsThatOfAForwardPass) {
  const Parameters parameters(1);
  const auto scenario = two_groups();
  const auto expected = dense(scenario, parameters, true, exact_values({kS, 2, kH}, 5)).output;
  for_each_variant([&](const Variant& variant) {
    const auto layer = make_layer(variant, parameters);
    const auto holders = on_balanced_holders(scenario.images, variant.t).holders;
    const Volumes volumes(scenario, variant, layer.rank(), holders);
    const at::NoGradGuard no_grad;
    const auto output = layer.forward(scenario.ids, scenario.images);
    EXPECT_EQ(text(*layer.recorded.count), volumes.forward({}, Placement::kEverywhere));
    EXPECT_TRUE(test_support::equal(output, layer.own_sequence(expected)));
  });
}

// The point of the fusion: an image costs what text costs.
TEST(ImageInsertCommunication, FusedInsertSendsWhatTextAloneSends) {
  const Parameters parameters(1);
  const auto scenario = two_groups();
  const auto loss_weights = exact_values({kS, 2, kH}, 5);
  for_each_variant([&](const Variant& variant) {
    // Whole rows of a replicated projector are wider than the columns of text that they replace.
    if (!variant.fused() || (variant.hidden() && variant.replicated())) return;
    const auto layer = make_layer(variant, parameters, {.bias = false});
    auto sent = [&](const std::vector<ImageForInsert>& images) {
      const auto start = *layer.recorded.count;
      const auto output = layer.forward(scenario.ids, images);
      const auto after_forward = *layer.recorded.count;
      layer.backward(output, loss_weights);
      return text(after_forward - start) + "; " + text(*layer.recorded.count - after_forward);
    };
    const auto text_only = sent({});
    EXPECT_EQ(sent(layer.leaves(scenario.images, {}, false)), text_only);
    if (variant.replicated()) {
      EXPECT_EQ(sent(layer.leaves(scenario.images)), text_only);
    }
    if (variant.row()) {
      EXPECT_EQ(sent(layer.leaves(scenario.images, {Placement::kSliced, {}, false})), text_only);
    }
  });
}

// With the hidden-parallel embedding under sequence parallelism no rank ever has [S, B, H], in whatever shape.
TEST(ImageInsertCommunication, HiddenParallelNeedsNoFullBuffer) {
  const Parameters parameters(1);
  // Few feature rows: what a collective on them stages for t ranks is smaller than [S, B, H].
  const Scenario scenario{"small images",
                          make_ids(2, {{kPatch, 0, 5}, {kImage, 1, 10}, {kImage, 1, 20}}),
                          {group_of(kPatch, features(1, {1, 3})), group_of(kImage, features(2, {2, 2}))}};
  const auto loss_weights = exact_values({kS, 2, kH}, 5);
  constexpr int64_t kFullBytes = kS * 2 * kH * 4;
  for_each_variant([&](const Variant& variant) {
    if (!variant.sequence_parallel || variant.t == 1) return;
    for (const auto& placed : placements(variant, scenario.images)) {
      for (const auto& trainable : kTrainable) {
        SCOPED_TRACE(testing::Message() << name_of(placed.placement) << ", " << trainable.name());
        const auto layer = make_layer(variant, parameters);
        layer.set_trainable(trainable);
        const auto images = layer.leaves(scenario.images, placed, trainable.features);
        const auto own_weights = on_device(layer.own_sequence(loss_weights)).clone();
        const test_support::OperatorWatch watch;
        const auto output = layer.forward(scenario.ids, images);
        if (trainable.any()) (output * own_weights).sum().backward();
        if (variant.hidden()) {
          EXPECT_LT(watch.largest_bytes(), kFullBytes);
        } else {
          EXPECT_GE(watch.largest_bytes(), kFullBytes);  // the watch sees one where there is one
        }
      }
    }
  });
}

// Nothing in a step may wait for a GPU. The CPU has no such wait, but the operators that would are the same ones: those
// that bring a value to the host. (A copy between devices can't be told apart here, where there is but one.)
TEST(ImageInsertCommunication, ReadsNoTensorBackToTheHost) {
  const Parameters parameters(1);
  const auto scenario = two_groups();
  const auto loss_weights = exact_values({kS, 2, kH}, 5);
  const std::set<std::string> waiting{
      "aten::item",  "aten::_local_scalar_dense", "aten::nonzero",  "aten::masked_select", "aten::is_nonzero",
      "aten::equal", "aten::unique_dim",          "aten::_unique2", "aten::nonzero_numpy"};
  for_each_variant([&](const Variant& variant) {
    for (const auto& placed : placements(variant, scenario.images)) {
      for (const auto& trainable : kTrainable) {
        SCOPED_TRACE(testing::Message() << name_of(placed.placement) << ", " << trainable.name());
        const auto layer = make_layer(variant, parameters);
        layer.set_trainable(trainable);
        const auto images = layer.leaves(scenario.images, placed, trainable.features);
        const auto own_weights = on_device(layer.own_sequence(loss_weights)).clone();
        const auto plan = layer.insert->make_plan(scenario.ids, images);
        const test_support::OperatorWatch watch;
        const auto output = layer.forward(scenario.ids, images, plan);
        if (trainable.any()) (output * own_weights).sum().backward();
        EXPECT_GT(watch.counts().size(), 3U);
        for (const auto& name : waiting) EXPECT_EQ(watch.count(name), 0) << name;
      }
    }
  });
}

// While the host made lists in backward, a GPU would have nothing to do.
TEST(ImageInsertCommunication, MakesItsListsOfRowsInForward) {
  const Parameters parameters(1);
  const auto scenario = two_groups();
  const auto loss_weights = exact_values({kS, 2, kH}, 5);
  for_each_variant([&](const Variant& variant) {
    for (const auto& placed : placements(variant, scenario.images)) {
      for (const auto& trainable : kTrainable) {
        if (!trainable.any()) continue;
        SCOPED_TRACE(testing::Message() << name_of(placed.placement) << ", " << trainable.name());
        const auto layer = make_layer(variant, parameters);
        layer.set_trainable(trainable);
        const auto images = layer.leaves(scenario.images, placed, trainable.features);
        const auto own_weights = on_device(layer.own_sequence(loss_weights)).clone();
        const auto output = layer.forward(scenario.ids, images);
        const test_support::OperatorWatch watch;
        (output * own_weights).sum().backward();
        EXPECT_EQ(watch.new_lists(), 0);
      }
    }
  });
}

}  // namespace megatron_cpp::step37
