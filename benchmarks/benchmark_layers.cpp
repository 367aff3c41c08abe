// What tensor-parallel layers cost beside dense LibTorch: forward and backward of each, over all ranks with sequence
// parallelism, beside LibTorch's own operators doing one rank's share of the same work without communication.
// linear_cross_entropy, in chunks, stands beside the same with whole logits.
//
//   mpirun -np 2 --bind-to none build/bin/benchmark_layers [--dtype float32] [--sequence 1024] [--layer MLP ...]
//     [--device cuda]
//
// Prints a JSON object a line: first the machine, then one per layer and dtype. `ratio` is the layer's median over the
// dense one's: 1 means that communication and bookkeeping are free.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "benchmarks/support.h"
#include "megatron_cpp/tensor_parallel/column_parallel_linear.h"
#include "megatron_cpp/tensor_parallel/linear_cross_entropy.h"
#include "megatron_cpp/tensor_parallel/row_parallel_linear.h"
#include "megatron_cpp/tensor_parallel/vocab_parallel_cross_entropy.h"
#include "megatron_cpp/tensor_parallel/vocab_parallel_embedding.h"
#include "megatron_cpp/transformer/transformer_layer.h"
#include "parallel/host_memory.h"
#include "parallel/process_groups.h"
#include "parallel/runtime.h"

namespace megatron_cpp {
namespace {

/// Whole sizes, over all ranks; B = 1. H, F, V, heads and groups must be divisible by the ranks.
struct Sizes {
  int64_t sequence = 1024;  ///< S
  int64_t hidden = 1024;    ///< H
  int64_t ffn = 2816;       ///< F
  int64_t vocabulary = 32000;
  int64_t loss_chunk = 256;  ///< positions, of linear_cross_entropy
  int64_t heads = 16;
  int64_t groups = 4;  ///< key/value heads
  int64_t head_dim() const { return hidden / heads; }
};

struct Arguments {
  Sizes sizes;
  std::vector<std::string> dtypes = {"float32", "bfloat16"};
  std::vector<std::string> layers;
  std::string device = "cpu";
  double seconds = 15.0;
};

/// One forward and backward pass; gradients of parameters are kept and added into, as between micro-batches.
using Step = std::function<void()>;

struct Comparison {
  Step parallel;
  Step dense;
};

/// Passes `gradient` back from forward(input), and forgets the input's own.
Step forward_backward(const at::Tensor& input, const at::Tensor& gradient,
                      std::function<at::Tensor(const at::Tensor&)> forward) {
  return [=, forward = std::move(forward)] {
    torch::autograd::backward({forward(input)}, {gradient});
    input.mutable_grad().reset();
  };
}

/// Makes the tensors of one dtype for this rank, on its device.
class Tensors {
 public:
  Tensors(at::ScalarType dtype, const c10::Device& device) : dtype_(dtype), device_(device) {}

  at::Tensor gradient(at::IntArrayRef shape) const { return at::randn(shape).mul_(1e-3).to(device_, dtype_); }
  at::Tensor input(at::IntArrayRef shape) const { return at::randn(shape).to(device_, dtype_).requires_grad_(); }
  at::Tensor parameter(at::IntArrayRef shape) const {
    auto result = at::randn(shape).mul_(0.02).to(device_, dtype_).requires_grad_();
    result.mutable_grad() = at::zeros_like(result);
    return result;
  }
  /// A layer with initial values, and gradients to add into.
  template <class Layer>
  Layer ready(Layer layer) const {
    initialize_parameters(parameter_shards(*layer), 1);
    layer->to(device_, dtype_);
    for (auto& parameter : layer->parameters()) parameter.mutable_grad() = at::zeros_like(parameter);
    return layer;
  }
  at::ScalarType dtype() const { return dtype_; }
  const c10::Device& device() const { return device_; }

 private:
  at::ScalarType dtype_;
  c10::Device device_;
};

/// One rank's 1/t of attention: heads/t query heads on whole sequences.
class DenseAttention {
 public:
  DenseAttention(const Sizes& sizes, int64_t t, const Tensors& make)
      : heads_(sizes.heads / t), groups_(sizes.groups / t), head_dim_(sizes.head_dim()) {
    qkv_ = make.parameter({(heads_ + 2 * groups_) * head_dim_ + heads_, sizes.hidden});
    projection_ = make.parameter({sizes.hidden, heads_ * head_dim_});
    q_norm_ = make.parameter({head_dim_});
    k_norm_ = make.parameter({head_dim_});
    const auto frequencies =
        at::pow(10000.0, at::arange(0, head_dim_, 2, at::kFloat) / -static_cast<double>(head_dim_));
    const auto angles = at::outer(at::arange(sizes.sequence, at::kFloat), frequencies).repeat({1, 2});
    cos_ = angles.cos().to(make.device(), make.dtype()).view({sizes.sequence, 1, 1, head_dim_});
    sin_ = angles.sin().to(make.device(), make.dtype()).view({sizes.sequence, 1, 1, head_dim_});
  }

  /// [S, 1, H] -> this share's summand [S, 1, H].
  at::Tensor forward(const at::Tensor& input) const {
    const auto parts =
        at::linear(input, qkv_)
            .split_with_sizes({heads_ * head_dim_, groups_ * head_dim_, groups_ * head_dim_, heads_}, -1);
    const auto split = [&](const at::Tensor& part) { return part.unflatten(-1, {-1, head_dim_}); };
    const auto q = rotate(at::rms_norm(split(parts[0]), {head_dim_}, q_norm_, 1e-5));
    const auto k = rotate(at::rms_norm(split(parts[1]), {head_dim_}, k_norm_, 1e-5));
    const auto of_queries = [&](const at::Tensor& x) { return x.repeat_interleave(heads_ / groups_, 2); };
    const auto by_head = [](const at::Tensor& x) { return x.permute({1, 2, 0, 3}); };
    const auto attended =
        at::scaled_dot_product_attention(by_head(q), by_head(of_queries(k)), by_head(of_queries(split(parts[2]))), {},
                                         /*dropout_p=*/0.0, /*is_causal=*/true)
            .permute({2, 0, 1, 3});
    return at::linear((attended * at::sigmoid(parts[3]).unsqueeze(-1)).flatten(2, 3), projection_);
  }

 private:
  at::Tensor rotate(const at::Tensor& x) const {
    const auto halves = x.chunk(2, -1);
    return x * cos_ + at::cat({-halves[1], halves[0]}, -1) * sin_;
  }

  int64_t heads_;
  int64_t groups_;
  int64_t head_dim_;
  at::Tensor qkv_, projection_, q_norm_, k_norm_, cos_, sin_;
};

/// One rank's 1/t of the feed-forward: F/t columns on whole sequences.
class DenseMLP {
 public:
  DenseMLP(const Sizes& sizes, int64_t t, const Tensors& make)
      : gate_up_(make.parameter({2 * sizes.ffn / t, sizes.hidden})),
        down_(make.parameter({sizes.hidden, sizes.ffn / t})) {}

  at::Tensor forward(const at::Tensor& input) const {
    const auto halves = at::linear(input, gate_up_).chunk(2, -1);
    return at::linear(at::silu(halves[0]) * halves[1], down_);
  }

 private:
  at::Tensor gate_up_, down_;
};

/// One rank's share of a decoder layer. Norms and sums have S/t rows; copies stand in for the gather before a part and
/// for the scatter after it.
class DenseLayer {
 public:
  DenseLayer(const Sizes& sizes, int64_t t, const Tensors& make)
      : t_(t),
        attention_(sizes, t, make),
        mlp_(sizes, t, make),
        first_norm_(make.parameter({sizes.hidden})),
        second_norm_(make.parameter({sizes.hidden})) {}

  /// [S/t, 1, H] -> the same shape.
  at::Tensor forward(const at::Tensor& input) const {
    const auto norm = [&](const at::Tensor& x, const at::Tensor& weight) {
      return at::rms_norm(x, {x.size(-1)}, weight, 1e-5).repeat({t_, 1, 1});
    };
    const auto own = [&](const at::Tensor& x) { return x.narrow(0, 0, input.size(0)); };
    const auto attended = input + own(attention_.forward(norm(input, first_norm_)));
    return attended + own(mlp_.forward(norm(attended, second_norm_)));
  }

 private:
  int64_t t_;
  DenseAttention attention_;
  DenseMLP mlp_;
  at::Tensor first_norm_, second_norm_;
};

Comparison column_parallel_linear(const Sizes& sizes, const Tensors& make, const parallel::GroupPtr& tp) {
  const int64_t t = tp->getSize(), S = sizes.sequence, H = sizes.hidden, F = sizes.ffn;
  auto layer = make.ready(
      ColumnParallelLinear(ColumnParallelLinearOptions(H, F).sequence_parallel(true).accumulate_into_grad(true), tp));
  const auto gradient = make.gradient({S, 1, F / t});
  const auto weight = make.parameter({F / t, H});
  return {
      forward_backward(make.input({S / t, 1, H}), gradient,
                       [=](const at::Tensor& x) mutable { return layer->forward(x); }),
      forward_backward(make.input({S, 1, H}), gradient, [=](const at::Tensor& x) { return at::linear(x, weight); })};
}

Comparison row_parallel_linear(const Sizes& sizes, const Tensors& make, const parallel::GroupPtr& tp) {
  const int64_t t = tp->getSize(), S = sizes.sequence, H = sizes.hidden, F = sizes.ffn;
  auto layer = make.ready(
      RowParallelLinear(RowParallelLinearOptions(F, H).sequence_parallel(true).accumulate_into_grad(true), tp));
  const auto input = make.input({S, 1, F / t});
  const auto weight = make.parameter({H, F / t});
  return {
      forward_backward(input, make.gradient({S / t, 1, H}),
                       [=](const at::Tensor& x) mutable { return layer->forward(x); }),
      forward_backward(input, make.gradient({S, 1, H}), [=](const at::Tensor& x) { return at::linear(x, weight); })};
}

/// The dense one looks S/t ids up in V/t rows: what a rank has to find on average.
Comparison vocab_parallel_embedding(const Sizes& sizes, const Tensors& make, const parallel::GroupPtr& tp) {
  const int64_t t = tp->getSize(), S = sizes.sequence, H = sizes.hidden, V = sizes.vocabulary;
  auto layer = make.ready(
      VocabParallelEmbedding(ParallelEmbeddingOptions(V, H).sequence_parallel(true).accumulate_into_grad(true), tp));
  const auto ids = at::randint(V, {1, S}, at::kLong);
  const auto own_ids = at::randint(V / t, {S / t, 1}, at::kLong).to(make.device());
  const auto gradient = make.gradient({S / t, 1, H});
  const auto weight = make.parameter({V / t, H});
  return {[=]() mutable { torch::autograd::backward({layer->forward(ids)}, {gradient}); },
          [=] { torch::autograd::backward({at::embedding(weight, own_ids)}, {gradient}); }};
}

Comparison vocab_parallel_cross_entropy(const Sizes& sizes, const Tensors& make, const parallel::GroupPtr& tp) {
  const int64_t t = tp->getSize(), S = sizes.sequence, V = sizes.vocabulary;
  const auto logits = make.input({S, 1, V / t});
  const auto target = at::randint(V, {S, 1}, at::kLong);
  const auto own_target = at::randint(V / t, {S}, at::kLong).to(make.device());
  const auto gradient = at::full({S, 1}, 1.0 / static_cast<double>(S), at::kFloat).to(make.device());
  const auto own_gradient = gradient.view({S}).to(make.dtype());
  return {forward_backward(logits, gradient,
                           [=](const at::Tensor& x) {
                             return megatron_cpp::vocab_parallel_cross_entropy(x, target, {.vocabulary_size = V}, tp);
                           }),
          forward_backward(logits, own_gradient, [=](const at::Tensor& x) {
            return at::cross_entropy_loss(x.view({S, V / t}), own_target, {}, at::Reduction::None);
          })};
}

/// The output layer with its loss: in chunks, and with whole logits.
Comparison linear_cross_entropy(const Sizes& sizes, const Tensors& make, const parallel::GroupPtr& tp) {
  const int64_t t = tp->getSize(), S = sizes.sequence, H = sizes.hidden, V = sizes.vocabulary;
  const auto weight = make.parameter({V / t, H});
  const auto target = at::randint(V, {S, 1}, at::kLong);
  const auto one_token = at::full({}, 1.0 / static_cast<double>(S), at::kFloat).to(make.device());
  const auto options =
      LinearCrossEntropyOptions({.vocabulary_size = V}).sequence_parallel(true).accumulate_into_grad(true);
  const auto with_chunk = [=](int64_t chunk) {
    return [=](const at::Tensor& x) {
      return megatron_cpp::linear_cross_entropy(x, weight, target, LinearCrossEntropyOptions(options).chunk(chunk), tp,
                                                1.0 / static_cast<double>(S));
    };
  };
  const auto input = make.input({S / t, 1, H});
  return {forward_backward(input, one_token, with_chunk(sizes.loss_chunk)),
          forward_backward(input, one_token, with_chunk(0))};
}

constexpr TransformerExecution kExecution{.sequence_parallel = true, .accumulate_into_grad = true};

TransformerConfig transformer_config(const Sizes& sizes) {
  TransformerConfig config;
  config.vocabulary_size = sizes.vocabulary;
  config.hidden_size = sizes.hidden;
  config.head_dim = sizes.head_dim();
  config.num_query_groups = sizes.groups;
  config.ffn_hidden_size = sizes.ffn;
  config.layers.resize(1);
  config.layers[0].num_attention_heads = sizes.heads;
  return config;
}

/// Of a layer whose input and output are the rank's rows, and of one that has the whole sequence around it.
template <class Layer, class Dense>
Comparison on_rows(const Layer& layer, const Dense& dense, int64_t dense_rows, const Sizes& sizes, const Tensors& make,
                   const parallel::GroupPtr& tp) {
  const std::vector<int64_t> own{sizes.sequence / tp->getSize(), 1, sizes.hidden};
  const std::vector<int64_t> rows{dense_rows, 1, sizes.hidden};
  return {forward_backward(make.input(own), make.gradient(own), layer),
          forward_backward(make.input(rows), make.gradient(rows),
                           [dense](const at::Tensor& x) { return dense->forward(x); })};
}

Comparison mlp(const Sizes& sizes, const Tensors& make, const parallel::GroupPtr& tp) {
  auto layer =
      make.ready(MLP(transformer_config(sizes), transformer_config(sizes).ffn_hidden_size, 0.0, kExecution, tp));
  return on_rows([layer](const at::Tensor& x) mutable { return layer->forward(x); },
                 std::make_shared<DenseMLP>(sizes, tp->getSize(), make), sizes.sequence, sizes, make, tp);
}

/// What a block makes once a forward pass, and here each layer does.
AttentionBatch batch_of(const Sizes& sizes, const RotaryEmbedding& rotary, const c10::Device& device) {
  return {{at::arange(sizes.sequence).view({1, -1}), {}}, sizes.sequence, 1, {rotary}, device};
}

Comparison self_attention(const Sizes& sizes, const Tensors& make, const parallel::GroupPtr& tp) {
  const auto config = transformer_config(sizes);
  auto layer = make.ready(SelfAttention(config, config.layers[0], kExecution, tp));
  return on_rows(
      [=](const at::Tensor& x) mutable { return layer->forward(x, batch_of(sizes, layer->rotary(), x.device())); },
      std::make_shared<DenseAttention>(sizes, tp->getSize(), make), sizes.sequence, sizes, make, tp);
}

Comparison transformer_layer(const Sizes& sizes, const Tensors& make, const parallel::GroupPtr& tp) {
  auto layer = make.ready(TransformerLayer(transformer_config(sizes), 0, kExecution, tp));
  return on_rows(
      [=](const at::Tensor& x) mutable {
        return layer->forward(x, batch_of(sizes, layer->self_attention->rotary(), x.device()));
      },
      std::make_shared<DenseLayer>(sizes, tp->getSize(), make), sizes.sequence / tp->getSize(), sizes, make, tp);
}

using MakeComparison = Comparison (*)(const Sizes&, const Tensors&, const parallel::GroupPtr&);

constexpr std::pair<const char*, MakeComparison> kLayers[] = {
    {"ColumnParallelLinear", column_parallel_linear},
    {"RowParallelLinear", row_parallel_linear},
    {"MLP", mlp},
    {"VocabParallelEmbedding", vocab_parallel_embedding},
    {"vocab_parallel_cross_entropy", vocab_parallel_cross_entropy},
    {"linear_cross_entropy", linear_cross_entropy},
    {"SelfAttention", self_attention},
    {"TransformerLayer", transformer_layer}};

void benchmark(const Arguments& arguments, at::ScalarType dtype, const c10::Device& device,
               const parallel::GroupPtr& tp) {
  at::manual_seed(1);  // the same ids and targets on every rank
  const Tensors make(dtype, device);
  std::vector<std::string> names;
  std::vector<Step> steps;
  const auto& wanted = arguments.layers;
  for (const auto& [name, make_comparison] : kLayers) {
    if (!wanted.empty() && std::ranges::find(wanted, name) == wanted.end()) continue;
    const auto comparison = make_comparison(arguments.sizes, make, tp);
    names.emplace_back(name);
    steps.push_back(comparison.parallel);
    steps.push_back(comparison.dense);
  }
  const auto times =
      benchmarks::measure(steps, {.warm_up = 1, .min = 3, .max = 25, .seconds = arguments.seconds}, tp, device);
  for (size_t i = 0; i < names.size(); ++i) {
    const auto& step = times[2 * i];
    const auto& dense = times[2 * i + 1];
    benchmarks::print({{"layer", names[i]},
                       {"dtype", benchmarks::name_of(dtype)},
                       {"tp", tp->getSize()},
                       {"tokens", arguments.sizes.sequence},
                       {"step_ms", benchmarks::min_and_median(step)},
                       {"dense_ms", benchmarks::min_and_median(dense)},
                       {"ratio", benchmarks::median(step) / benchmarks::median(dense)}},
                      tp->getRank());
  }
}

int run(parallel::Runtime& runtime, const Arguments& arguments) {
  if (std::getenv("OMP_NUM_THREADS") == nullptr) at::set_num_threads(1);
  const auto device = benchmarks::choose_device(runtime, arguments.device);
  const auto groups = parallel::make_process_groups(runtime, {.tp = runtime.size()});
  benchmarks::print(benchmarks::machine(runtime.size(), device), runtime.rank());
  for (const auto& dtype : arguments.dtypes) benchmark(arguments, benchmarks::dtype_of(dtype), device, groups.tp);
  return 0;
}

}  // namespace
}  // namespace megatron_cpp

int main(int argc, char** argv) {
  using namespace megatron_cpp;
  parallel::keep_freed_host_memory();  // as a training program does
  CLI::App app("Times tensor-parallel layers beside dense LibTorch. Start with mpirun -np N.", "benchmark_layers");
  Arguments arguments;
  benchmarks::add_size_option(app, "--sequence", arguments.sizes.sequence, "S, tokens of the one sequence");
  benchmarks::add_size_option(app, "--hidden", arguments.sizes.hidden, "H");
  benchmarks::add_size_option(app, "--ffn", arguments.sizes.ffn, "F, of the linears and the MLP");
  benchmarks::add_size_option(app, "--vocabulary", arguments.sizes.vocabulary, "V");
  benchmarks::add_size_option(app, "--loss-chunk", arguments.sizes.loss_chunk,
                              "positions at a time in linear_cross_entropy");
  benchmarks::add_size_option(app, "--heads", arguments.sizes.heads, "query heads, of H over their number elements");
  benchmarks::add_size_option(app, "--groups", arguments.sizes.groups, "key/value heads");
  app.add_option("--dtype", arguments.dtypes, "float32, bfloat16 or both")
      ->check(CLI::IsMember({"float32", "bfloat16"}))
      ->capture_default_str();
  std::vector<std::string> names;
  for (const auto& [name, make_comparison] : kLayers) names.emplace_back(name);
  app.add_option("--layer", arguments.layers, "these only, by the names in the output")->check(CLI::IsMember(names));
  benchmarks::add_device_option(app, arguments.device);
  app.add_option("--seconds", arguments.seconds, "rounds of a dtype go on for this long, three at least")
      ->capture_default_str();
  return benchmarks::run_on_ranks(app, argc, argv, [&](parallel::Runtime& runtime) { return run(runtime, arguments); });
}
