#include "benchmarks/image_insert/scale.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>
#include <string>

#include "benchmarks/image_insert/ways.h"
#include "benchmarks/support.h"
#include "megatron_cpp/optimizer/gradient_buffer.h"
#include "parallel/recording_backend.h"
#include "parallel/rehearsal_backend.h"
#include "parallel/shard.h"
#include "step37/insert/plan.h"

namespace megatron_cpp::benchmark_image_insert {
namespace {

using nlohmann::ordered_json;
using step37::InsertGroup;
using step37::InsertPlan;
using step37::MismatchPolicy;

struct PlanInput {
  int64_t B;
  int64_t S;
  std::vector<int64_t> ids;
  std::vector<InsertGroup> groups;
};

/// `num_images` start tokens in all, evenly over the batch, every third one a patch's.
PlanInput make_input(int64_t B, int64_t S, int64_t num_images) {
  PlanInput input{B, S, std::vector<int64_t>(static_cast<size_t>(B * S), 7), {{1, {}}, {2, {}}}};
  const int64_t distance = B * S / num_images;
  for (int64_t image = 0; image < num_images; ++image) {
    const bool patch = image % 3 == 0;
    input.ids[static_cast<size_t>(image * distance)] = patch ? 1 : 2;
    input.groups[patch ? 0 : 1].rows.push_back(patch ? 81 : 169);
  }
  return input;
}

/// Least and median milliseconds of an action on this rank alone.
template <class Action>
ordered_json time(const Action& action) {
  std::vector<double> times;
  for (int i = 0; i < 51; ++i) {
    const auto start = benchmarks::Clock::now();
    action();
    times.push_back(benchmarks::milliseconds_since(start));
  }
  return benchmarks::min_and_median(times);
}

double largest_over_mean(const std::vector<int64_t>& values) {
  const auto sum = std::accumulate(values.begin(), values.end(), int64_t{0});
  return static_cast<double>(*std::max_element(values.begin(), values.end())) * static_cast<double>(values.size()) /
         static_cast<double>(sum);
}

/// How evenly image rows are spread: of the ranks that own them in the sequence, and of those that hold whole images.
ordered_json balance(const InsertPlan& plan, int t) {
  std::vector<int64_t> owned;
  for (int rank = 0; rank < t; ++rank) {
    const auto rows = parallel::even_shard(plan.S(), t, rank, "sequence length");
    int64_t sum = 0;
    for (const auto& run : plan.owned_by(rows.begin, rows.end)) sum += run.length;
    owned.push_back(sum);
  }
  std::vector<int64_t> held(static_cast<size_t>(t), 0);
  const auto holders = parallel::balanced_assignment(plan.image_rows(), t);
  for (size_t image = 0; image < holders.size(); ++image) {
    held[static_cast<size_t>(holders[image])] += plan.image_rows()[image];
  }
  return {{"tp", t},
          {"owned_rows_largest_over_mean", largest_over_mean(owned)},
          {"held_rows_largest_over_mean", largest_over_mean(held)}};
}

/// The released model's sizes over kScale, so that a rehearsal is small; every count is linear in H and C together.
constexpr int64_t kScale = 32;

Sizes rehearsal_sizes() {
  Sizes sizes;
  sizes.sequence = 8192;
  sizes.hidden /= kScale;
  sizes.channels /= kScale;
  return sizes;
}

struct Volume {
  int64_t largest = 0;
  int64_t sum = 0;
};

/// What GradientBuffer sends once per optimizer step for the word embedding's and the projector's gradients.
std::vector<ordered_json> rehearse_gradient_reduction() {
  std::vector<ordered_json> results;
  const auto sizes = rehearsal_sizes();
  for (const int t : {1, 8, 64}) {
    for (const int dp : {1, 64, 4096}) {
      for (const auto sharding : {step37::ProjectorSharding::kColumn, step37::ProjectorSharding::kReplicated}) {
        const auto tp = parallel::record(parallel::make_rehearsal_group(t - 1, t));
        const auto replicas = parallel::record(parallel::make_rehearsal_group(dp - 1, dp));
        const auto both = parallel::record(parallel::make_rehearsal_group(t * dp - 1, t * dp));
        const LanguageModelEmbedding embedding(ParallelEmbeddingOptions(sizes.vocabulary, sizes.hidden), tp.group);
        const step37::ImageInsertEmbedding insert(
            embedding, step37::ImageInsertEmbeddingOptions(sizes.channels, sizes.hidden).projector_sharding(sharding));
        auto parameters = parameter_shards(*embedding);
        for (auto& shard : parameter_shards(*insert)) parameters.push_back(std::move(shard));
        GradientBuffer buffer(parameters,
                              {.grid = {}, .world = {}, .tp = tp.group, .dp = replicas.group, .tp_dp = both.group});
        buffer.reduce();
        results.push_back(
            {{"rehearsal", "gradient_reduction"},
             {"tp", t},
             {"dp", dp},
             {"projector_sharding", sharding == step37::ProjectorSharding::kColumn ? "column" : "replicated"},
             {"dtype", "float32"},
             {"bytes_per_rank", (replicas.count->bytes_sent + both.count->bytes_sent) * kScale}});
      }
    }
  }
  return results;
}

}  // namespace

std::vector<ordered_json> rehearse_plans() {
  std::vector<ordered_json> results;
  for (const int64_t B : {1, 4}) {
    for (const int64_t S : {65536, 131072, 262144}) {
      const int64_t num_images = 1500 * S / 262144;
      const auto input = make_input(B, S, num_images);
      InsertPlan plan;
      const auto build = time([&] { plan = InsertPlan::build(input.ids, B, S, input.groups, MismatchPolicy::kError); });
      size_t runs = 0;
      const auto owned = time([&] { runs += plan.owned_by(S / 64 * 31, S / 64 * 32).size(); });
      ordered_json balances = ordered_json::array();
      for (const int t : {2, 8, 64}) balances.push_back(balance(plan, t));
      results.push_back({{"rehearsal", "plan"},
                         {"batch", B},
                         {"sequence", S},
                         {"images", num_images},
                         {"build_ms", build},
                         {"build_ns_per_token", build.at("median").get<double>() * 1e6 / static_cast<double>(B * S)},
                         {"owned_by_one_of_64_ms", owned},
                         {"balance", std::move(balances)}});
    }
  }
  return results;
}

std::vector<ordered_json> rehearse_volumes() {
  std::vector<ordered_json> results;
  const auto sizes = rehearsal_sizes();
  for (const int t : {2, 4, 8, 16, 32, 64}) {
    std::vector<Way> names;  // of the last rank's ways: all ranks have the same
    std::vector<Volume> volumes;
    for (int rank = 0; rank < t; ++rank) {
      const auto recorded = parallel::record(parallel::make_rehearsal_group(rank, t));
      const auto batch = make_batch(sizes, at::kFloat);
      auto ways = vocab_ways(sizes, batch, /*all_shardings=*/true, recorded.group);
      for (auto& way : hidden_ways(sizes, batch, /*all_shardings=*/true, recorded.group)) {
        ways.push_back(std::move(way));
      }
      volumes.resize(ways.size());
      for (size_t i = 0; i < ways.size(); ++i) {
        const auto before = *recorded.count;
        ways[i].step();
        const auto sent = *recorded.count - before;
        volumes[i].largest = std::max(volumes[i].largest, sent.bytes_sent * kScale);
        volumes[i].sum += sent.bytes_sent * kScale;
      }
      names = std::move(ways);
    }
    for (size_t i = 0; i < names.size(); ++i) {
      if (names[i].name == "projector_gemm") continue;
      results.push_back({{"rehearsal", "volume"},
                         {"way", names[i].name},
                         {"tp", t},
                         {"sequence", sizes.sequence},
                         {"projector_sharding", names[i].projector_sharding},
                         {"features", names[i].features_trained ? "trained" : "frozen"},
                         {"dtype", "float32"},
                         {"bytes_per_rank", volumes[i].largest},
                         {"mean_bytes_per_rank", volumes[i].sum / t}});
    }
  }
  for (auto& volume : rehearse_gradient_reduction()) results.push_back(std::move(volume));
  return results;
}

}  // namespace megatron_cpp::benchmark_image_insert
