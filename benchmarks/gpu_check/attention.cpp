// (e) Variable-length flash attention, full and with a window, beside scaled_dot_product_attention: the same numbers,
// and their times, forward and backward.
#include "megatron_cpp/transformer/attention.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "benchmarks/gpu_check/check.h"
#include "parallel/shard.h"

namespace megatron_cpp::gpu_check {
namespace {

/// One rank's heads of eight: 64 or 96 query heads and 8 key/value heads.
struct Shape {
  int64_t sequence;
  int64_t heads;
  int64_t head_dim;
  int64_t window;  ///< 0: none
};

struct Inputs {
  at::Tensor q;  ///< [S, 1, heads, D]
  at::Tensor k;  ///< [S, 1, 1, D]
  at::Tensor v;
  at::Tensor gradient;
};

Inputs make_inputs(const Target& target, const Shape& shape) {
  const auto leaf = [&](int64_t heads) {
    return random_values(target, {shape.sequence, 1, heads, shape.head_dim}, at::kBFloat16, 1.0).requires_grad_();
  };
  return {leaf(shape.heads), leaf(1), leaf(1),
          random_values(target, {shape.sequence, 1, shape.heads, shape.head_dim}, at::kBFloat16, 1.0)};
}

/// None without a window.
std::optional<at::Tensor> mask_of(const Target& target, const Shape& shape) {
  if (shape.window == 0) return std::nullopt;
  return at::ones({shape.sequence, shape.sequence}, at::TensorOptions(at::kBool).device(target.device()))
      .tril_()
      .triu_(1 - shape.window);
}

/// LibTorch's own, on [1, heads, S, D] with keys and values repeated for every head.
at::Tensor plain_attention(const Inputs& inputs, const Shape& shape, const std::optional<at::Tensor>& mask) {
  const auto by_head = [&](const at::Tensor& x) { return x.permute({1, 2, 0, 3}).expand({-1, shape.heads, -1, -1}); };
  const auto output = at::scaled_dot_product_attention(by_head(inputs.q), by_head(inputs.k), by_head(inputs.v), mask,
                                                       /*dropout_p=*/0.0, /*is_causal=*/!mask.has_value());
  return output.permute({2, 0, 1, 3});
}

Inputs in_float(const Inputs& inputs) {
  const auto leaf = [](const at::Tensor& x) { return x.detach().to(at::kFloat).requires_grad_(); };
  return {leaf(inputs.q), leaf(inputs.k), leaf(inputs.v), inputs.gradient.to(at::kFloat)};
}

/// Two thirds and one third of the sequence: nothing may cross.
std::vector<parallel::Range> two_segments(int64_t S) { return {{0, S / 3 * 2}, {S / 3 * 2, S}}; }

}  // namespace

void check_attention(const Target& target, Report& report) {
  const auto full = target.is_gpu() ? Shape{8192, 8, 128, 0} : Shape{256, 4, 32, 0};
  const auto sliding = target.is_gpu() ? Shape{8192, 12, 128, 512} : Shape{256, 6, 32, 32};
  for (const auto& shape : {full, sliding}) {
    const std::string name = shape.window > 0 ? "window " + std::to_string(shape.window) : "full";
    const auto inputs = make_inputs(target, shape);
    const auto mask = mask_of(target, shape);
    const auto sub_sequences = [&](std::vector<parallel::Range> ranges) {
      return SubSequences(std::move(ranges), /*batch_size=*/1, target.device());
    };
    const auto whole = sub_sequences({{0, shape.sequence}});
    const auto ours = [&](const Inputs& of, const SubSequences& segments) {
      return core_attention(of.q, of.k, of.v, segments, shape.window);
    };

    // Numbers first: against float32 of LibTorch's own, output and gradients.
    {
      const auto exact = in_float(inputs);
      const auto expected = plain_attention(exact, shape, mask);
      torch::autograd::backward({expected}, {exact.gradient});
      const auto output = ours(inputs, whole);
      torch::autograd::backward({output}, {inputs.gradient});
      const double forward = relative_difference(output, expected);
      double backward = 0.0;
      for (const auto& [got, want] : {std::pair{inputs.q, exact.q}, {inputs.k, exact.k}, {inputs.v, exact.v}}) {
        backward = std::max(backward, relative_difference(got.grad(), want.grad()));
      }
      report.verdict({{"what", "core_attention against float32, " + name},
                      {"output_differs", forward},
                      {"gradients_differ", backward},
                      {"allowed", 3e-2}},
                     forward < 3e-2 && backward < 3e-2);
      // A sub-sequence alone gives what it gives among others.
      const at::NoGradGuard no_grad;
      const auto segments = two_segments(shape.sequence);
      const auto packed = ours(inputs, sub_sequences(segments));
      const auto rows = [&](const at::Tensor& x) { return x.narrow(0, segments[1].begin, segments[1].length()); };
      const auto alone =
          ours({rows(inputs.q), rows(inputs.k), rows(inputs.v), {}}, sub_sequences({{0, segments[1].length()}}));
      const double crossing = relative_difference(rows(packed), alone);
      report.verdict({{"what", "core_attention of two sub-sequences, " + name}, {"differs", crossing}},
                     crossing < 1e-2);
    }

    at::Tensor output;
    const auto backward = [&] {
      torch::autograd::backward({output}, {inputs.gradient});
      for (const auto& leaf : {inputs.q, inputs.k, inputs.v}) leaf.mutable_grad().reset();
    };
    const std::vector<Operation> operations = {
        {"core_attention, " + name + ", forward", [&] { output = ours(inputs, whole); }},
        {"core_attention, " + name + ", backward", backward},
        {"scaled_dot_product_attention, " + name + ", forward", [&] { output = plain_attention(inputs, shape, mask); }},
        {"scaled_dot_product_attention, " + name + ", backward", backward}};
    const auto times = take_turns(target, operations, /*seconds=*/6.0);
    for (size_t i = 0; i < operations.size(); ++i) {
      auto row = to_row(operations[i].name, times.operations[i], times);
      if (i < 2) row["ratio_to_scaled_dot_product"] = times.operations[i].median / times.operations[i + 2].median;
      report.row(std::move(row));
    }
  }
}

}  // namespace megatron_cpp::gpu_check
