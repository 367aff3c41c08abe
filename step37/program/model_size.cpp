#include "step37/program/model_size.h"

#include <utility>

#include "megatron_cpp/tensor_parallel/vocab_parallel_embedding.h"

namespace megatron_cpp::step37 {
namespace {

constexpr std::string_view kAttention = "attention";
constexpr std::string_view kDense = "dense feed-forward";
constexpr std::string_view kTower = "vision tower";
constexpr std::string_view kMtp = "MTP layers";

class TensorList {
 public:
  TensorList(const Step37Config& config, const parallel::RankGrid& grid) : config_(config), grid_(grid) {}

  void add_decoder() {
    const auto& text = config_.text;
    const int64_t table = padded_vocabulary_size(text.vocabulary_size, grid_.tp) * text.hidden_size;
    const bool by_columns = config_.execution.embedding_sharding == EmbeddingSharding::kHidden;
    trained_ = !config_.freeze_language_model;
    sharded("embedding", by_columns ? text.vocabulary_size * text.hidden_size : table);
    for (const auto& layer : text.layers) {
      add_attention(kAttention, layer);
      layer.has_experts ? add_experts(*text.moe) : add_mlp(kDense, text.ffn_hidden_size, /*with_norm=*/true);
    }
    norm("output layer", text.hidden_size);
    sharded("output layer", table);
  }

  /// enorm, hnorm, eh_proj [H, 2H], a decoder layer, a norm and an output layer.
  void add_mtp(const LayerConfig& layer) {
    const auto& text = config_.text;
    const int64_t H = text.hidden_size;
    trained_ = config_.trains_mtp();
    norm(kMtp, H, 3);
    norm(kMtp, 2 * H * H);  // eh_proj, which runs on the same rows
    add_attention(kMtp, layer);
    add_mlp(kMtp, text.ffn_hidden_size, /*with_norm=*/true);
    sharded(kMtp, padded_vocabulary_size(text.vocabulary_size, grid_.tp) * H);
  }

  void add_projector() {
    const int64_t H = config_.text.hidden_size;
    const int64_t weight = H * config_.vision.output_dim();
    const bool has_bias = config_.projector_bias;
    trained_ = !config_.freeze_projector;
    switch (config_.projector_sharding) {
      case ProjectorSharding::kColumn:
        sharded("projector", weight);
        if (has_bias) sharded("projector", H);
        break;
      case ProjectorSharding::kRow:
        sharded("projector", weight);
        if (has_bias) add("projector", 1, H, H, "dp");
        break;
      case ProjectorSharding::kReplicated:
        partial("projector", weight);
        if (has_bias) partial("projector", H);
        break;
      case ProjectorSharding::kNone:
        break;
    }
  }

  void add_tower() {
    const auto& vision = config_.vision;
    const int64_t W = vision.width;
    const int64_t grid = vision.image_size / vision.patch_size;
    const bool is_split = config_.mm_encoder_tp_mode == MmEncoderTpMode::kWeights;
    const auto on_every_rank = [&](int64_t elements, int64_t count = 1) {
      is_split ? add(kTower, count, elements, elements, "dp") : partial(kTower, elements, count);
    };
    const auto of_blocks = [&](int64_t elements, int64_t count) {
      is_split ? add(kTower, count, elements, elements / grid_.tp, "dp") : partial(kTower, elements, count);
    };
    trained_ = !config_.freeze_vision_model;
    on_every_rank(grid * grid * W);                                // positional_embedding
    on_every_rank(W * 3 * vision.patch_size * vision.patch_size);  // conv1
    on_every_rank(W, 2);                                           // ln_pre
    // ln_1, ln_2, ls_1, ls_2, and the biases of out_proj and c_proj
    on_every_rank(W, 8 * vision.layers);
    of_blocks(3 * W * W, vision.layers);
    of_blocks(3 * W, vision.layers);
    of_blocks(W * W, vision.layers);
    of_blocks(W * vision.mlp_width, 2 * vision.layers);
    of_blocks(vision.mlp_width, vision.layers);
    for (const int64_t width : {W, 2 * W}) {  // the downsamplers
      on_every_rank(2 * width * width * 9);
      on_every_rank(2 * width);
    }
  }

  std::vector<TensorGroup> tensors;

 private:
  void add(std::string_view part, int64_t count, int64_t whole, int64_t local, std::string_view summed_over) {
    tensors.push_back({part, count, whole, local, summed_over, trained_});
  }
  void sharded(std::string_view part, int64_t elements) { add(part, 1, elements, elements / grid_.tp, "dp"); }
  /// On every rank, which has a summand of the gradient.
  void partial(std::string_view part, int64_t elements, int64_t count = 1) {
    add(part, count, elements, elements, grid_.tp > 1 ? "tp_dp" : "dp");
  }
  void norm(std::string_view part, int64_t elements, int64_t count = 1) {
    const bool is_partial = config_.execution.sequence_parallel && grid_.tp > 1;
    add(part, count, elements, elements, is_partial ? "tp_dp" : "dp");
  }

  void add_attention(std::string_view part, const LayerConfig& layer) {
    const auto& text = config_.text;
    const int64_t H = text.hidden_size;
    const int64_t q = layer.num_attention_heads * text.head_dim;
    const int64_t kv = text.num_query_groups * text.head_dim;
    norm(part, H);
    sharded(part, (q + 2 * kv + layer.num_attention_heads) * H);
    partial(part, text.head_dim, 2);  // q_norm, k_norm
    sharded(part, H * q);
  }

  void add_mlp(std::string_view part, int64_t F, bool with_norm) {
    const int64_t H = config_.text.hidden_size;
    if (with_norm) norm(part, H);
    sharded(part, 2 * F * H);
    sharded(part, H * F);
  }

  void add_experts(const MoEConfig& moe) {
    const int64_t H = config_.text.hidden_size;
    const int64_t weight = moe.num_experts * moe.ffn_hidden_size * H;
    const int64_t parts = int64_t{grid_.ep} * grid_.expert_tp();
    norm("router", H);
    for (const int64_t matrices : {2, 1}) add("experts", 1, matrices * weight, matrices * weight / parts, "edp");
    if (moe.shared_expert_ffn_hidden_size > 0) {
      add_mlp("shared experts", moe.shared_expert_ffn_hidden_size, /*with_norm=*/false);
    }
    const bool trained = std::exchange(trained_, trained_ && !moe.freeze_router);
    partial("router", moe.num_experts * H);
    trained_ = trained;
  }

  const Step37Config& config_;
  const parallel::RankGrid& grid_;
  bool trained_ = true;  ///< of what is added
};

}  // namespace

std::vector<TensorGroup> tensors_of(const Step37Config& config, const parallel::RankGrid& grid) {
  TensorList list(config, grid);
  list.add_decoder();
  for (const auto& layer : config.text.mtp_layers) list.add_mtp(layer);
  list.add_projector();
  list.add_tower();
  return std::move(list.tensors);
}

int64_t whole_elements(const std::vector<TensorGroup>& tensors) {
  int64_t sum = 0;
  for (const auto& tensor : tensors) sum += tensor.count * tensor.whole;
  return sum;
}

int64_t local_elements(const std::vector<TensorGroup>& tensors) {
  int64_t sum = 0;
  for (const auto& tensor : tensors) sum += tensor.count * tensor.local;
  return sum;
}

}  // namespace megatron_cpp::step37
