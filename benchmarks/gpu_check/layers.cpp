// (d) Decoder layers and the output layer with its loss at one rank's widths of eight, over a rehearsed group: without
// copies, and with copies at a set pace on a stream of their own. Where a layer with copies takes about
// max(products, copies) the two run side by side; where it takes their sum, they wait for each other.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "benchmarks/gpu_check/check.h"
#include "megatron_cpp/tensor_parallel/column_parallel_linear.h"
#include "megatron_cpp/tensor_parallel/vocab_parallel_cross_entropy.h"
#include "megatron_cpp/transformer/transformer_layer.h"
#include "parallel/collectives.h"
#include "parallel/recording_backend.h"
#include "parallel/rehearsal_backend.h"

namespace megatron_cpp::gpu_check {
namespace {

constexpr int kTensorParallel = 8;
/// What a rank of eight gets over the links of one H100 to the others, in one direction.
constexpr double kGigabytesPerSecond = 450.0;

struct ModelSizes {
  int64_t sequence;
  int64_t vocabulary;
  TransformerConfig config;
};

/// The released model's; on the CPU a small one of the same kind.
ModelSizes model_sizes(const Target& target) {
  ModelSizes sizes{target.pick<int64_t>(8192, 512), target.pick<int64_t>(128815, 1003), {}};
  auto& config = sizes.config;
  config.vocabulary_size = sizes.vocabulary;
  config.hidden_size = target.pick<int64_t>(4096, 256);
  config.head_dim = target.pick<int64_t>(128, 32);
  config.num_query_groups = 8;
  config.ffn_hidden_size = target.pick<int64_t>(11264, 512);
  LayerConfig full;
  full.num_attention_heads = target.pick<int64_t>(64, 16);
  full.rope_theta = 5e6;
  full.partial_rotary_factor = 0.5;
  LayerConfig sliding;
  sliding.num_attention_heads = target.pick<int64_t>(96, 24);
  sliding.sliding_window = target.pick<int64_t>(512, 64);
  config.layers = {full, sliding};
  return sizes;
}

/// A module of one rank with values and gradients to add into.
template <class Module>
Module ready(Module module, const Target& target) {
  module->to(target.device());
  module->to(at::kBFloat16);
  const at::NoGradGuard no_grad;
  for (auto& parameter : module->parameters()) {
    parameter.normal_(0.0, 0.02);
    parameter.mutable_grad() = at::zeros_like(parameter);
  }
  return module;
}

/// Forward and backward of one piece of the model, which are timed apart.
struct Piece {
  std::string name;
  std::function<at::Tensor()> forward;
  at::Tensor gradient;  ///< of the output
};

class Pieces {
 public:
  Pieces(const Target& target, const ModelSizes& sizes, const parallel::GroupPtr& tp) : target_(target), sizes_(sizes) {
    const int64_t S = sizes.sequence;
    const int64_t H = sizes.config.hidden_size;
    hidden_ = random_values(target, {S / kTensorParallel, 1, H}, at::kBFloat16, 1.0).requires_grad_();
    const AttentionInput positions{at::arange(S).view({1, S}), {}};
    const auto gradient = random_values(target, hidden_.sizes(), at::kBFloat16, 1e-3);
    for (int64_t layer = 0; layer < sizes.config.num_layers(); ++layer) {
      auto module =
          ready(TransformerLayer(sizes.config, layer,
                                 TransformerExecution{.sequence_parallel = true, .accumulate_into_grad = true}, tp),
                target);
      // Once a forward pass of all layers: no part of a layer's time.
      const AttentionBatch batch(positions, S, 1, {module->self_attention->rotary()}, target.device());
      const bool is_full = sizes.config.layers[static_cast<size_t>(layer)].sliding_window == 0;
      pieces_.push_back({is_full ? "full-attention layer" : "sliding-window layer",
                         [this, module, batch]() mutable { return module->forward(hidden_, batch); }, gradient});
    }
    const auto options = ColumnParallelLinearOptions(H, sizes.vocabulary)
                             .pad_out_features(true)
                             .sequence_parallel(true)
                             .accumulate_into_grad(true);
    auto output_layer = ready(ColumnParallelLinear(options, tp), target);
    const auto labels = at::randint(sizes.vocabulary, {S, 1}, at::TensorOptions(at::kLong)).to(target.device());
    pieces_.push_back({"output layer and loss",
                       [this, output_layer, labels, tp]() mutable {
                         const auto logits = output_layer->forward(hidden_);
                         return vocab_parallel_cross_entropy(logits, labels, {.vocabulary_size = sizes_.vocabulary},
                                                             tp);
                       },
                       at::full({S, 1}, 1.0 / static_cast<double>(S), at::TensorOptions().device(target.device()))});
  }
  Pieces(const Pieces&) = delete;
  Pieces& operator=(const Pieces&) = delete;

  const std::vector<Piece>& all() const { return pieces_; }

  /// Forward and backward of each piece, in this order.
  std::vector<Operation> operations() {
    outputs_.resize(pieces_.size());
    std::vector<Operation> result;
    for (size_t i = 0; i < pieces_.size(); ++i) {
      result.push_back({pieces_[i].name + ", forward", [this, i] { outputs_[i] = pieces_[i].forward(); }});
      result.push_back({pieces_[i].name + ", backward", [this, i] {
                          torch::autograd::backward({outputs_[i]}, {pieces_[i].gradient});
                          outputs_[i].reset();
                          hidden_.mutable_grad().reset();
                        }});
    }
    return result;
  }

 private:
  Target target_;
  ModelSizes sizes_;
  at::Tensor hidden_;
  std::vector<Piece> pieces_;
  std::vector<at::Tensor> outputs_;
};

}  // namespace

void check_layers(const Target& target, Report& report) {
  const auto sizes = model_sizes(target);
  const auto quiet = parallel::make_rehearsal_group(0, kTensorParallel, {.device = target.device()});
  const double pace = target.pick(kGigabytesPerSecond, 0.0);
  const auto paced_group =
      parallel::make_rehearsal_group(0, kTensorParallel, {.device = target.device(), .gigabytes_per_second = pace});
  const bool has_copies = pace > 0.0;
  const auto paced = parallel::record(paced_group);
  Pieces without(target, sizes, quiet);
  Pieces with(target, sizes, paced.group);

  auto operations = without.operations();
  const size_t num_timed = operations.size();
  const auto with_copies = with.operations();
  // What each sends, and whether it runs at all.
  std::vector<int64_t> bytes;
  for (const auto& operation : with_copies) {
    const auto before = paced.count->bytes_sent;
    operation.run();
    bytes.push_back(paced.count->bytes_sent - before);
  }
  if (has_copies) operations.insert(operations.end(), with_copies.begin(), with_copies.end());
  // One collective alone says what pace was reached.
  const auto shard =
      random_values(target, {sizes.sequence / kTensorParallel, 1, sizes.config.hidden_size}, at::kBFloat16, 1.0);
  const auto paced_before = paced.count->bytes_sent;
  parallel::all_gather(shard, paced.group);
  const auto gathered_bytes = static_cast<double>(paced.count->bytes_sent - paced_before);
  operations.push_back({"one all-gather alone", [&] { parallel::all_gather(shard, paced.group); }});

  const auto times = take_turns(target, operations, /*seconds=*/target.pick(11.0, 8.0));
  report.row(product_row(times));
  const auto& gather = times.operations.back();
  const double reached = gathered_bytes / gather.median / 1e6;  // GB/s
  if (has_copies) {
    auto row = to_row("one all-gather alone", gather, times);
    row["MB"] = gathered_bytes / 1e6;
    row["set_GB/s"] = pace;
    row["GB/s"] = reached;
    report.row(row);
  } else if (!target.is_gpu()) {
    report.no_gpu("copies at a set pace");
  }
  for (size_t i = 0; i < num_timed; ++i) {
    const double products = times.operations[i].median;
    auto row = to_row(operations[i].name, times.operations[i], times);
    row["MB_sent"] = static_cast<double>(bytes[i]) / 1e6;
    if (has_copies) {
      const double copies = static_cast<double>(bytes[i]) / reached / 1e6;
      const double together = times.operations[num_timed + i].median;
      row["copies_ms"] = copies;
      row["with_copies_ms"] = together;
      row["max_ms"] = std::max(products, copies);
      row["sum_ms"] = products + copies;
      // 1: side by side; 0: one after the other.
      row["overlap"] = (products + copies - together) / std::min(products, copies);
    }
    report.row(row);
  }
}

}  // namespace megatron_cpp::gpu_check
