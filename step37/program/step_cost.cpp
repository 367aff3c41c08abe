#include "step37/program/step_cost.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <map>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "megatron_cpp/optimizer/flat_layout.h"
#include "megatron_cpp/optimizer/gradient_buffer.h"
#include "megatron_cpp/tensor_parallel/vocab_parallel_embedding.h"

namespace megatron_cpp::step37 {
namespace {

using Kind = parallel::CollectiveKind;
constexpr int64_t kFloat = 4;  // bytes of what is float32 in any precision
constexpr int64_t kInt64 = 8;
constexpr int64_t kDouble = 8;

/// The numbers that bytes and memory of one micro-batch on a rank depend on, by the letters of docs/parallelism.md.
struct Sizes {
  Sizes(const Step37Config& config, const parallel::RankGrid& grid, const StepShape& shape)
      : e(shape.element_bytes.parameter),
        t(grid.tp),
        S(shape.sequence_length * shape.micro_batch_size),
        s(config.execution.sequence_parallel ? S / t : S),
        H(config.text.hidden_size),
        V(padded_vocabulary_size(config.text.vocabulary_size, grid.tp)),
        chunk(std::min(config.execution.loss_chunk, S)),
        C(config.vision.output_dim()),
        images(shape.images_per_pack * shape.micro_batch_size),
        patches(images * patches_of(config.vision)),
        rows(images * config.vision.feature_rows(config.vision.image_size, config.vision.image_size)),
        trains_text(!config.freeze_language_model),
        trains_features(!config.freeze_vision_model),
        trains_projected(!config.freeze_projector || !config.freeze_vision_model),
        recomputes_tower(config.recompute_tower && trains_features),
        runs_tower(shape.runs_tower),
        splits_tower(config.mm_encoder_tp_mode == MmEncoderTpMode::kWeights),
        tower_images(splits_tower ? images : (images + t - 1) / t) {}

  static int64_t patches_of(const VisionConfig& vision) {
    const int64_t side = vision.image_size / vision.patch_size;
    return side * side;
  }

  int64_t e;  ///< bytes of an element of an activation
  int64_t t;
  int64_t S;  ///< positions of a micro-batch, its packs one behind the other
  int64_t s;  ///< rows of the sequence that a rank has between tensor-parallel layers
  int64_t H;
  int64_t V;      ///< padded
  int64_t chunk;  ///< positions of which a loss makes logits at a time; 0: all
  int64_t C;
  int64_t images;   ///< of a micro-batch
  int64_t patches;  ///< of its images
  int64_t rows;     ///< of features of a micro-batch
  bool trains_text;
  bool trains_features;
  bool trains_projected;
  bool recomputes_tower;
  bool runs_tower;
  bool splits_tower;     ///< MmEncoderTpMode::kWeights: every rank has all features
  int64_t tower_images;  ///< that the fullest rank's tower runs on
};

/// Adds up what a rank sends.
class TrafficSum {
 public:
  explicit TrafficSum(const parallel::RankGrid& grid) : grid_(grid) {}

  /// One collective as parallel::observe counts it: `bytes` are of the full tensor, and of what the rank hands in for
  /// an all-to-all.
  void add(Kind kind, std::string_view group, int64_t bytes, int64_t times = 1) {
    const int64_t size = extent_of(group, grid_).size;
    send(kind, group, bytes * (size - 1) / size * (kind == Kind::kAllReduce ? 2 : 1) * times);
  }
  /// Bytes that are sent to other ranks.
  void send(Kind kind, std::string_view group, int64_t bytes) {
    if (bytes > 0) sums_[{kind, group, of_experts}] += bytes * repeat;
  }
  std::vector<Traffic> result() const {
    std::vector<Traffic> traffic;
    for (const auto& [key, bytes] : sums_) {
      traffic.push_back({std::get<0>(key), std::get<1>(key), bytes, std::get<2>(key)});
    }
    return traffic;
  }

  int64_t repeat = 1;       ///< what is added from now on happens so many times
  bool of_experts = false;  ///< and is this

 private:
  const parallel::RankGrid& grid_;
  std::map<std::tuple<Kind, std::string_view, bool>, int64_t> sums_;
};

/// A column-parallel linear, a row-parallel one behind it, forward and backward: attention, MLP, shared expert.
void add_linear_pair(const Sizes& n, bool sequence_parallel, TrafficSum& sum) {
  const int64_t M = n.S * n.H * n.e;
  if (sequence_parallel) {
    // Backward gathers the first one's input again if its weight is trained.
    sum.add(Kind::kAllGather, "tp", M, n.trains_text ? 3 : 2);
    sum.add(Kind::kReduceScatter, "tp", M, 2);
  } else {
    sum.add(Kind::kAllReduce, "tp", M, 2);
  }
}

/// Their forward pass alone, when it is computed again.
void add_linear_pair_again(const Sizes& n, bool sequence_parallel, TrafficSum& sum) {
  const int64_t M = n.S * n.H * n.e;
  if (sequence_parallel) {
    sum.add(Kind::kAllGather, "tp", M);
    sum.add(Kind::kReduceScatter, "tp", M);
  } else {
    sum.add(Kind::kAllReduce, "tp", M);
  }
}

/// C(E - E/ep, K) / C(E, K): how likely it is that a token has no expert on a given expert-parallel rank.
double share_of_absent_tokens(const MoEConfig& moe, int64_t ep) {
  const int64_t elsewhere = moe.num_experts - moe.num_experts / ep;
  double share = 1.0;
  for (int64_t k = 0; k < moe.router_topk; ++k) {
    share *= static_cast<double>(std::max<int64_t>(elsewhere - k, 0)) / static_cast<double>(moe.num_experts - k);
  }
  return share;
}

/// Rows that a rank sends to the expert-parallel ranks of its group, itself included: each token once to every rank
/// that has at least one of its experts.
int64_t dispatched_rows(const Sizes& n, const MoEConfig& moe, const parallel::RankGrid& grid) {
  const int64_t own = n.S / n.t;
  const auto copies = static_cast<double>(own * grid.ep);
  return static_cast<int64_t>(copies * (1.0 - share_of_absent_tokens(moe, grid.ep)));
}

/// Forward and backward of the routed experts of one layer: counts, rows with their routing weights and expert numbers
/// over ep, then over etp, and the outputs back.
void add_experts(const Sizes& n, const MoEConfig& moe, const parallel::RankGrid& grid, bool sequence_parallel,
                 TrafficSum& sum) {
  // The layer takes its rows of the sequence, and gathers the outputs; backward the other way round.
  if (!sequence_parallel) sum.add(Kind::kAllGather, "tp", n.S * n.H * n.e, 2);
  const int64_t ep = grid.ep;
  const int64_t etp = grid.expert_tp();
  if (ep * etp == 1) return;
  sum.of_experts = true;
  sum.add(Kind::kAllGather, "etp_ep", ep * etp * (moe.num_experts + ep) * kInt64);
  const int64_t m = ep > 1 ? dispatched_rows(n, moe, grid) : n.S / n.t;
  const int64_t hidden = m * n.H * n.e;
  const int64_t routing = m * 2 * moe.router_topk * kFloat;
  if (ep > 1) {
    sum.add(Kind::kAllToAll, "ep", hidden, 4);
    sum.add(Kind::kAllToAll, "ep", routing, 2);
  }
  if (etp > 1) {
    // Each is the other's backward. The reduce-scatter of shares that may differ is an all-to-all.
    sum.send(Kind::kAllGather, "etp", (etp - 1) * (2 * hidden + routing));
    sum.send(ep > 1 ? Kind::kAllToAll : Kind::kReduceScatter, "etp", (etp - 1) * (2 * hidden + routing));
  }
  sum.of_experts = false;
}

/// Their forward pass alone, when it is computed again: with the counts that it got the first time.
void add_experts_again(const Sizes& n, const MoEConfig& moe, const parallel::RankGrid& grid, TrafficSum& sum) {
  const int64_t ep = grid.ep;
  const int64_t etp = grid.expert_tp();
  sum.of_experts = true;
  const int64_t m = ep > 1 ? dispatched_rows(n, moe, grid) : n.S / n.t;
  const int64_t hidden = m * n.H * n.e;
  const int64_t routing = m * 2 * moe.router_topk * kFloat;
  sum.add(Kind::kAllToAll, "ep", hidden, 2);
  sum.add(Kind::kAllToAll, "ep", routing);
  sum.send(Kind::kAllGather, "etp", (etp - 1) * (hidden + routing));
  sum.send(ep > 1 ? Kind::kAllToAll : Kind::kReduceScatter, "etp", (etp - 1) * hidden);
  sum.of_experts = false;
}

int64_t num_expert_layers(const TransformerConfig& text) {
  return std::count_if(text.layers.begin(), text.layers.end(), [](const auto& layer) { return layer.has_experts; });
}

/// The blocks of a tower that is split: the outputs of attention and mlp forward, gradients of their inputs backward.
void add_split_tower(const Step37Config& config, const Sizes& n, TrafficSum& sum) {
  const int64_t activations = n.patches * config.vision.width * n.e;
  const int64_t passes = 1 + (n.trains_features ? 1 : 0) + (n.recomputes_tower ? 1 : 0);
  sum.add(Kind::kAllReduce, "tp", activations, 2 * config.vision.layers * passes);
}

/// Brings features from where the tower ran to where they are projected, and their gradients back.
void add_features(ProjectorSharding sharding, const Sizes& n, TrafficSum& sum) {
  const int64_t features = n.rows * n.C * n.e;
  if (n.splits_tower) {  // every rank has them
    if (n.trains_features) {
      sum.add(sharding == ProjectorSharding::kRow ? Kind::kAllGather : Kind::kAllReduce, "tp", features);
    }
    return;
  }
  if (sharding == ProjectorSharding::kColumn) {
    sum.add(Kind::kAllGather, "tp", features);
    if (n.trains_features) sum.add(Kind::kReduceScatter, "tp", features);
  }
  if (sharding == ProjectorSharding::kRow) sum.add(Kind::kAllToAll, "tp", features / n.t, n.trains_features ? 2 : 1);
}

/// Word embedding and image insert (docs/image-insert.md).
void add_insert(const Step37Config& config, const Sizes& n, TrafficSum& sum) {
  const bool sp = config.execution.sequence_parallel;
  const int64_t M = n.S * n.H * n.e;
  const int64_t image_rows = n.rows * n.H * n.e;
  const bool by_columns = config.execution.embedding_sharding == EmbeddingSharding::kHidden;
  const bool gathers = config.exchange == InsertExchange::kAllGather;
  const auto sharding = config.projector_sharding;
  if (by_columns) {
    sp ? sum.add(Kind::kAllToAll, "tp", M / n.t) : sum.add(Kind::kAllGather, "tp", M);
  } else {
    sum.add(sp ? Kind::kReduceScatter : Kind::kAllReduce, "tp", M);
  }
  // Where only a replicated projector trains, each rank projects the rows that it owns.
  const bool owners_project = n.splits_tower && sharding == ProjectorSharding::kReplicated && !n.trains_features;
  const bool needs_both = n.trains_text && (n.trains_projected || n.images == 0);
  if (sp && (needs_both || (gathers && n.trains_text))) {
    by_columns ? sum.add(Kind::kAllToAll, "tp", M / n.t) : sum.add(Kind::kAllGather, "tp", M);
  } else if (sp && n.trains_text) {
    sum.add(Kind::kAllToAll, "tp", (M - image_rows) / n.t);
  } else if (sp && !gathers && sharding == ProjectorSharding::kRow) {
    sum.send(Kind::kAllGather, "tp", (n.t - 1) * image_rows / n.t);
  } else if (sp && !gathers && !owners_project) {
    sum.add(Kind::kAllToAll, "tp", image_rows / n.t);
  }
  if (gathers && sharding == ProjectorSharding::kRow) {
    sum.add(Kind::kAllReduce, "tp", image_rows, sp && n.trains_projected ? 2 : 1);
  } else if (gathers) {
    sum.add(Kind::kAllGather, "tp", image_rows);
    if (sp && n.trains_projected) sum.add(Kind::kReduceScatter, "tp", image_rows);
  }
  add_features(sharding, n, sum);
}

/// An output layer with its cross entropy.
void add_output(const Sizes& n, bool sequence_parallel, TrafficSum& sum) {
  const int64_t M = n.S * n.H * n.e;
  if (sequence_parallel) {
    sum.add(Kind::kAllGather, "tp", M, n.trains_text && n.chunk == 0 ? 2 : 1);
    sum.add(Kind::kReduceScatter, "tp", M);
  } else {
    sum.add(Kind::kAllReduce, "tp", M);
  }
  // Cross entropy: the maxima, then the sums of the exponentials and the logits of the targets.
  const auto add_statistics = [&](int64_t positions, int64_t times) {
    sum.add(Kind::kAllReduce, "tp", positions * kFloat, times);
    sum.add(Kind::kAllReduce, "tp", 2 * positions * kFloat, times);
  };
  const int64_t chunk = n.chunk > 0 ? n.chunk : n.S;
  add_statistics(chunk, n.S / chunk);
  add_statistics(n.S % chunk, 1);
}

/// The layers of multi-token prediction that are trained.
std::vector<LayerConfig> trained_mtp_layers(const Step37Config& config) {
  return config.trains_mtp() ? config.text.mtp_layers : std::vector<LayerConfig>{};
}

void add_micro_batch(const Step37Config& config, const Sizes& n, const parallel::RankGrid& grid, TrafficSum& sum) {
  const bool sp = config.execution.sequence_parallel;
  const auto& moe = config.text.moe;
  const auto add_layer = [&](const LayerConfig& layer) {
    add_linear_pair(n, sp, sum);  // attention
    if (layer.has_experts) add_experts(n, *moe, grid, sp, sum);
    const bool has_mlp = !layer.has_experts || moe->shared_expert_ffn_hidden_size > 0;
    if (has_mlp) add_linear_pair(n, sp, sum);
    const auto& again = config.execution.recomputed;
    if (again.layers) add_linear_pair_again(n, sp, sum);
    if (again.layers && layer.has_experts && !sp) sum.add(Kind::kAllGather, "tp", n.S * n.H * n.e);
    if ((again.layers || again.experts) && layer.has_experts) add_experts_again(n, *moe, grid, sum);
    if ((again.layers || again.mlp) && has_mlp) add_linear_pair_again(n, sp, sum);
  };
  if (n.splits_tower && n.runs_tower) add_split_tower(config, n, sum);
  add_insert(config, n, sum);
  for (const auto& layer : config.text.layers) add_layer(layer);
  if (moe && !router_loss_names(*moe).empty()) {
    const int64_t sums = 2 * moe->num_experts + moe->group_balance_groups + 2;
    sum.add(Kind::kAllReduce, "tp", num_expert_layers(config.text) * sums * kDouble);
  }
  add_output(n, sp, sum);
  for (const auto& layer : trained_mtp_layers(config)) {
    if (sp && n.t > 1) sum.send(Kind::kAllToAll, "tp", 2 * n.H * n.e);  // a row of the embeddings, and back
    add_layer(layer);
    add_output(n, sp, sum);
  }
}

/// Those of GradientBuffer that are summed over one group.
struct Bucket {
  std::string_view group;  ///< that gradients are summed over
  int64_t ranks = 1;       ///< of it
  bool is_divided = false;
  int64_t own = 0;        ///< elements that the optimizer updates, on the rank with most
  int64_t numel = 0;      ///< with padding
  int64_t at_a_time = 0;  ///< elements that are reduced together, at most
  int64_t slice() const { return numel / ranks; }
};

/// The kind of a parameter's bucket: edp's groups are those of dp or tp_dp if these have the same ranks.
std::string_view kind_of_bucket(std::string_view summed_over, const parallel::RankGrid& grid) {
  if (summed_over != "edp") return summed_over;
  if (grid.edp() == grid.dp) return "dp";
  return grid.edp() == grid.tp * grid.dp ? "tp_dp" : "edp";
}

std::vector<Bucket> buckets_of(const std::vector<TensorGroup>& tensors, const parallel::RankGrid& grid,
                               const StepShape& shape) {
  std::vector<Bucket> buckets;
  for (const auto& tensor : tensors) {
    if (!tensor.trained) continue;
    const auto group = kind_of_bucket(tensor.summed_over, grid);
    auto bucket = std::find_if(buckets.begin(), buckets.end(), [&](const auto& one) { return one.group == group; });
    if (bucket == buckets.end()) {
      const int64_t ranks = extent_of(group, grid).size;
      bucket = buckets.insert(bucket, {group, ranks, shape.distributed_optimizer && ranks > 1});
    }
    bucket->own += tensor.count * tensor.local;
    bucket->numel += tensor.count * FlatLayout::padded_numel(tensor.local);
    bucket->at_a_time = std::max(bucket->at_a_time, shape.bucket_elements + tensor.local);
  }
  for (auto& bucket : buckets) {
    if (!bucket.is_divided) continue;
    bucket.numel = bucket.ranks * FlatLayout::slice_numel_of(bucket.numel, bucket.ranks);
    bucket.own = std::min(bucket.own, bucket.slice());
    bucket.at_a_time = std::min(bucket.at_a_time, bucket.numel);
  }
  return buckets;
}

/// What a reduce-scatter over MPI makes, when there are no activations: the sum of a bucket's slice.
int64_t optimizer_temporary(const std::vector<Bucket>& buckets, const ElementBytes& each) {
  int64_t largest = 0;
  for (const auto& bucket : buckets) {
    if (bucket.is_divided) largest = std::max(largest, bucket.at_a_time / bucket.ranks * each.gradient);
  }
  return largest;
}

/// What backward needs of a decoder layer, in bytes.
struct LayerBytes {
  int64_t kept = 0;       ///< from the forward pass
  int64_t temporary = 0;  ///< what comes on top when backward is in the layer's feed-forward
};

/// What an output layer with its loss needs, in bytes, besides what the norm before it keeps.
struct LossBytes {
  int64_t kept = 0;       ///< the exponentials; in chunks nothing but the input's gradient in the input's place
  int64_t temporary = 0;  ///< what comes on top: the logits or their gradient
};

LossBytes loss_bytes(const Sizes& n) {
  const int64_t columns = n.V / n.t;
  if (n.chunk == 0) return {n.S * columns * kFloat, n.S * columns * n.e};
  // Beside the exponentials the logits of a lower precision; the input, and with sequence parallelism all of it, and
  // its gradient before it is reduced.
  const int64_t logits = n.chunk * columns * (kFloat + (n.e < kFloat ? n.e : 0));
  return {0, logits + (n.s + (n.s < n.S ? 2 * n.S - n.s : 0)) * n.H * n.e};
}

/// Elements of the masks that attention over windows keeps, one for each block of queries.
int64_t window_mask_elements(int64_t length, int64_t window) {
  if (window <= 0 || length <= window) return 0;
  const int64_t block = std::max<int64_t>(window, 128);
  int64_t elements = 0;
  for (int64_t begin = 0; begin < length; begin += block) {
    const int64_t queries = std::min(block, length - begin);
    elements += queries * (queries + std::min(begin, window - 1));
  }
  return elements;
}

LayerBytes layer_bytes(const Step37Config& config, const LayerConfig& layer, const Sizes& n, const StepShape& shape,
                       const parallel::RankGrid& grid) {
  const auto& text = config.text;
  const int64_t heads = layer.num_attention_heads / n.t;
  const int64_t groups = text.num_query_groups / n.t;
  const int64_t q = heads * text.head_dim;
  const int64_t kv = groups * text.head_dim;
  const bool in_blocks = layer.sliding_window > 0 && shape.sequence_length > layer.sliding_window;
  const bool copies_output = in_blocks || shape.micro_batch_size > 1 || groups > 1;
  const auto& again = config.execution.recomputed;
  // A norm's input and output.
  const int64_t normed = n.s * n.H * n.e;
  const int64_t norm = n.s * (n.H * n.e + kFloat) + (again.norms ? 0 : normed);
  // The norm; per position q, k, v, g fused, norms of q and k, rotated q and k, the attention's
  // output (once more where it is put together from parts) and logsumexp, the gates, the gated output.
  int64_t attention = norm + n.S * n.e * ((q + 2 * kv + heads) + (q + kv) + (copies_output ? 2 * q : q) + heads + q) +
                      n.S * kFloat * (heads + groups + heads);
  const int64_t masks =
      n.e * shape.micro_batch_size * window_mask_elements(shape.sequence_length, layer.sliding_window);
  // What core attention keeps besides q, k, v and its output as it is handed on.
  if (!again.core_attention) attention += masks;
  if (again.core_attention) attention -= n.S * (kFloat * heads + n.e * (copies_output ? q : 0));
  int64_t feed_forward = norm;
  int64_t temporary = 0;
  const auto mlp = [&](int64_t F) {
    const int64_t products = n.S * 3 * F / n.t * n.e;  // gate and up, their product
    temporary = n.S * 7 * F / n.t * n.e;               // gradients of these and of the halves in between
    (again.mlp ? temporary : feed_forward) += products;
  };
  /// A recomputed layer keeps its input and `routes`; all else comes back, and its output.
  const auto result = [&](int64_t routes) -> LayerBytes {
    if (again.norms) temporary += normed;
    const int64_t hidden = n.s * n.H * n.e;
    if (!again.layers) return {attention + feed_forward, temporary};
    return {hidden + routes, attention + feed_forward + temporary};
  };
  if (!layer.has_experts) {
    mlp(text.ffn_hidden_size);
    return result(0);
  }
  const auto& moe = *text.moe;
  mlp(moe.shared_expert_ffn_hidden_size);
  // The scores; the rows that arrive, with their routing, unless they are the layer's own; for each of a token's
  // experts on this rank gate and up, and its place (int64).
  const int64_t own = n.S / n.t;
  const int64_t etp = grid.expert_tp();
  const int64_t rows = etp * (grid.ep > 1 ? dispatched_rows(n, moe, grid) : own);
  const int64_t pairs = own * etp * moe.router_topk;
  const int64_t width = moe.ffn_hidden_size / etp;
  // The logits, too, if there are auxiliary losses.
  feed_forward += kFloat * own * moe.num_experts * (router_loss_names(moe).empty() ? 1 : 2);
  int64_t routed = rows * 2 * moe.router_topk * kFloat + pairs * (2 * width * n.e + kInt64);
  if (grid.ep * etp > 1) routed += rows * n.H * n.e;
  if (!again.experts) feed_forward += routed;
  temporary = std::max(temporary, pairs * 7 * width * n.e + (again.experts ? routed : 0));
  const int64_t routes = own * kInt64 * (moe.router_topk + 1);  // each token's experts, and where it goes
  if (again.experts) feed_forward += routes;
  return result(routes);
}

/// What backward needs of the vision tower for the pictures of the fullest rank, in bytes.
struct TowerBytes {
  int64_t kept = 0;        ///< from the forward pass
  int64_t recomputed = 0;  ///< of one block
};

TowerBytes tower_bytes(const VisionConfig& vision, const Sizes& n) {
  const int64_t side = vision.image_size / vision.patch_size;
  const int64_t half = (side + 1) / 2;
  const int64_t patches = side * side;
  const int64_t parts = n.splits_tower ? n.t : 1;
  // Both norms' inputs, outputs and statistics, what the layer scales multiply; qkv, rotated q and k, attention's
  // output and logsumexp; the mlp's input to its activation, the sigmoid, their product.
  const int64_t block = 6 * vision.width * n.e + 4 * kFloat +
                        ((6 * vision.width + 3 * vision.mlp_width) * n.e + vision.heads * kFloat) / parts;
  const int64_t ends = patches * (2 * vision.width * n.e + 2 * kFloat) + half * half * 2 * vision.width * n.e;
  const int64_t input = vision.width * n.e;
  return {n.tower_images * (vision.layers * patches * (n.recomputes_tower ? input : block) + ends),
          n.recomputes_tower ? n.tower_images * patches * (block - input) : 0};
}

/// Multiplications of a sub-sequence of S positions: forward once, a gradient of the input where one flows, a gradient
/// of the weight where it is trained.
double text_work(const Step37Config& config, double S) {
  const auto& text = config.text;
  const auto H = static_cast<double>(text.hidden_size);
  const auto D = static_cast<double>(text.head_dim);
  const auto& again = config.execution.recomputed;
  double recomputed = 0.0;  // of the next two, once more
  double linear = 0.0;      // elements of the matrices that a position is multiplied by
  double attention = 0.0;   // the like for q kᵀ and the weighted sum of v
  const auto add = [&](double& sum, double elements, bool is_recomputed) {
    sum += elements;
    if (is_recomputed || again.layers) recomputed += elements;
  };
  const auto add_layer = [&](const LayerConfig& layer) {
    const auto heads = static_cast<double>(layer.num_attention_heads);
    add(linear, H * (2 * heads * D + 2 * static_cast<double>(text.num_query_groups) * D + heads), false);
    const auto window = static_cast<double>(layer.sliding_window);
    add(attention, 2 * heads * D * (window > 0 ? std::min(window, S / 2) : S / 2), again.core_attention);
    if (!layer.has_experts) {
      add(linear, 3 * H * static_cast<double>(text.ffn_hidden_size), again.mlp);
      return;
    }
    const auto& moe = *text.moe;
    add(linear, H * static_cast<double>(moe.num_experts), false);
    add(linear, H * static_cast<double>(3 * moe.router_topk * moe.ffn_hidden_size), again.experts);
    add(linear, H * static_cast<double>(3 * moe.shared_expert_ffn_hidden_size), again.mlp);
  };
  for (const auto& layer : text.layers) add_layer(layer);
  linear += H * static_cast<double>(text.vocabulary_size);
  for (const auto& layer : trained_mtp_layers(config)) {
    add_layer(layer);
    linear += 2 * H * H + H * static_cast<double>(text.vocabulary_size);
  }

  return S * (linear * (config.freeze_language_model ? 2 : 3) + attention * 3 + recomputed);
}

/// The same of a picture of `pixels` a side, in the projector and, if it runs, in the tower. With
/// MmEncoderTpMode::kWeights what isn't split of the tower counts once for each of `tp` ranks.
double image_work(const Step37Config& config, int64_t pixels, int tp, bool runs_tower) {
  const auto& vision = config.vision;
  const auto H = static_cast<double>(config.text.hidden_size);
  const auto W = static_cast<double>(vision.width);
  const int64_t side = pixels / vision.patch_size;
  const auto patches = static_cast<double>(side * side);
  const int64_t half = (side + 1) / 2;
  const auto half_grid = static_cast<double>(half * half);
  const auto rows = static_cast<double>(vision.feature_rows(pixels, pixels));
  const double conv1 = patches * 3 * static_cast<double>(vision.patch_size * vision.patch_size) * W;
  const double block = patches * (4 * W * W + 2 * W * static_cast<double>(vision.mlp_width) + 2 * patches * W);
  const double downsamplers = half_grid * 18 * W * W + rows * 72 * W * W;
  const double projector = rows * static_cast<double>(vision.output_dim()) * H;
  const bool trains_tower = !config.freeze_vision_model;
  const double ends = conv1 * (trains_tower ? 2 : 1) + downsamplers * (trains_tower ? 3 : 1);
  const bool on_every_rank = config.mm_encoder_tp_mode == MmEncoderTpMode::kWeights;
  const double tower = ends * (on_every_rank ? tp : 1) + static_cast<double>(vision.layers) * block *
                                                             (trains_tower ? (config.recompute_tower ? 4 : 3) : 1);
  return (runs_tower ? tower : 0.0) + projector * (1 + (trains_tower ? 1 : 0) + (config.freeze_projector ? 0 : 1));
}

}  // namespace

GroupExtent extent_of(std::string_view group, const parallel::RankGrid& grid) {
  const int64_t tp = grid.tp;
  const int64_t etp = grid.expert_tp();
  const int64_t world = grid.world_size();
  if (group == "tp") return {tp, tp};
  if (group == "dp") return {grid.dp, grid.dp == 1 ? 1 : world};
  if (group == "tp_dp") return {tp * grid.dp, world};
  if (group == "etp") return {etp, etp};
  if (group == "ep") return {grid.ep, grid.ep == 1 ? 1 : etp * grid.ep};
  if (group == "etp_ep") return {etp * grid.ep, etp * grid.ep};
  TORCH_INTERNAL_ASSERT(group == "edp");
  return {grid.edp(), grid.edp() == 1 ? 1 : world};
}

std::vector<Traffic> step_traffic(const Step37Config& config, const parallel::RankGrid& grid, const StepShape& shape,
                                  const std::vector<TensorGroup>& tensors) {
  TrafficSum sum(grid);
  sum.repeat = shape.global_batch_size / (shape.micro_batch_size * grid.dp);
  add_micro_batch(config, Sizes(config, grid, shape), grid, sum);
  sum.repeat = 1;
  const auto& each = shape.element_bytes;
  for (const auto& bucket : buckets_of(tensors, grid, shape)) {
    const int64_t gradients = bucket.numel * each.gradient;
    if (!bucket.is_divided) {
      sum.add(Kind::kAllReduce, bucket.group, gradients);
      continue;
    }
    sum.add(Kind::kReduceScatter, bucket.group, gradients);
    sum.add(Kind::kAllGather, bucket.group, bucket.numel * each.parameter);
    sum.add(Kind::kAllReduce, bucket.group, 3 * kDouble);  // its squares, by how they are counted
  }
  // The losses and the gradient norm.
  const auto& moe = config.text.moe;
  const auto num_losses = 1 + static_cast<int64_t>(config.auxiliary_losses().size());
  sum.add(Kind::kAllReduce, "dp", num_losses * kDouble);
  sum.add(Kind::kAllReduce, "tp", kDouble);
  const auto is_of_experts = [](const auto& tensor) { return tensor.trained && tensor.summed_over == "edp"; };
  if (std::any_of(tensors.begin(), tensors.end(), is_of_experts)) sum.add(Kind::kAllReduce, "etp_ep", kDouble);
  if (moe) {
    // The experts' tokens and norms.
    const int64_t experts = num_expert_layers(config.text) * moe->num_experts;
    for (const char* group : {"tp_dp", "etp_ep"}) sum.add(Kind::kAllReduce, group, experts * kDouble);
  }
  return sum.result();
}

int64_t step_flops(const Step37Config& config, const parallel::RankGrid& grid, const StepShape& shape) {
  const double pack = text_work(config, static_cast<double>(shape.sequence_length)) +
                      static_cast<double>(shape.images_per_pack) *
                          image_work(config, config.vision.image_size, grid.tp, shape.runs_tower);
  return static_cast<int64_t>(2 * pack * static_cast<double>(shape.global_batch_size));
}

int64_t pack_flops(const Step37Config& config, const parallel::RankGrid& grid, const PicturePack& pack,
                   const CropOptions& crops, bool runs_tower) {
  double work = 0.0;
  const auto* ends = pack.packed.cu_seqlens.const_data_ptr<int32_t>();
  for (int64_t i = 1; i < pack.packed.cu_seqlens.numel(); ++i) {
    work += text_work(config, static_cast<double>(ends[i] - ends[i - 1]));
  }
  int64_t num_crops = 0;
  for (const auto& picture : pack.pictures) num_crops += plan_crops(picture.width, picture.height, crops).num_crops();
  const auto image = [&](int64_t side) { return image_work(config, side, grid.tp, runs_tower); };
  work += static_cast<double>(pack.pictures.size()) * image(crops.global_side);
  if (num_crops > 0) work += static_cast<double>(num_crops) * image(crops.crop_side);
  return static_cast<int64_t>(2 * work);
}

MemoryBytes step_memory(const Step37Config& config, const parallel::RankGrid& grid, const StepShape& shape,
                        const std::vector<TensorGroup>& tensors) {
  const Sizes n(config, grid, shape);
  const auto& each = shape.element_bytes;
  const int64_t of_optimizer = each.main + each.exp_avg + each.exp_avg_sq;
  MemoryBytes memory;
  for (const auto& tensor : tensors) {
    memory.weights += tensor.count * tensor.local * each.parameter;
  }
  const auto buckets = buckets_of(tensors, grid, shape);
  for (const auto& bucket : buckets) {
    memory.gradients += bucket.numel * each.gradient;
    memory.optimizer += bucket.own * of_optimizer;
  }

  const auto& text = config.text;
  const auto loss = loss_bytes(n);
  int64_t decoder = n.s * (2 * n.H * n.e + kFloat);  // the last norm's input and output
  std::vector<LayerBytes> each_layer;
  const auto add_layers = [&](const std::vector<LayerConfig>& layers) {
    std::set<std::pair<double, int64_t>> tables;
    for (const auto& layer : layers) {
      const auto bytes = layer_bytes(config, layer, n, shape, grid);
      each_layer.push_back(bytes);
      decoder += bytes.kept;
      if (tables.emplace(layer.rope_theta, layer.rotary_dim(text.head_dim)).second) {
        decoder += shape.sequence_length * shape.micro_batch_size * layer.rotary_dim(text.head_dim) * kFloat;
      }
    }
  };
  add_layers(text.layers);
  // The moved embeddings, both norms side by side, what the last norm and the output layer keep.
  const auto mtp = trained_mtp_layers(config);
  add_layers(mtp);
  decoder += static_cast<int64_t>(mtp.size()) * (n.s * (5 * n.H * n.e + 3 * kFloat) + loss.kept);
  const int64_t rows_of_image = n.images == 0 ? 0 : n.rows / n.images;
  const bool projects_all = config.projector_sharding == ProjectorSharding::kColumn;
  const int64_t features = (projects_all ? n.images : (n.images + n.t - 1) / n.t) * rows_of_image * n.C * n.e;
  const auto tower = n.trains_features ? tower_bytes(config.vision, n) : TowerBytes{};
  const int64_t side = config.vision.image_size;
  // Features come in bfloat16.
  const int64_t input = n.runs_tower
                            ? n.tower_images * 3 * side * side * kFloat
                            : n.tower_images * rows_of_image * n.C * static_cast<int64_t>(sizeof(at::BFloat16));
  memory.activations = decoder + loss.kept + features + tower.kept;

  // The loss; a layer when those behind it are gone; the tower when the decoder's part is gone.
  int64_t of_layers = 0;
  int64_t freed = loss.kept + n.s * 2 * n.H * n.e;
  for (auto layer = each_layer.rbegin(); layer != each_layer.rend(); ++layer) {
    of_layers = std::max(of_layers, layer->temporary + n.s * n.H * n.e - freed);
    freed += layer->kept;
  }
  const int64_t patches = n.tower_images * Sizes::patches_of(config.vision);
  const int64_t mlp_width = config.vision.mlp_width / (n.splits_tower ? n.t : 1);
  // Backward through an mlp; of a tower without gradients forward: y, its sigmoid and their product, and the block's.
  const int64_t tower_temporary =
      (n.runs_tower ? patches : 0) *
      (n.trains_features ? 2 * mlp_width + 2 * config.vision.width : 3 * mlp_width + 5 * config.vision.width) * n.e;
  const int64_t peak =
      std::max({loss.temporary, of_layers, tower_temporary + tower.recomputed + tower.kept - memory.activations});
  memory.buffers = std::max(input + peak + n.S * 4 * kInt64, optimizer_temporary(buckets, each) - memory.activations);
  return memory;
}

}  // namespace megatron_cpp::step37
