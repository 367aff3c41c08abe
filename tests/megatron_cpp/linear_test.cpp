// Column- and row-parallel linear layers against at::linear. The data are multiples of 1/8, so every product and sum is
// exact in float32 and the comparisons are of bits.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "megatron_cpp/tensor_parallel/column_parallel_linear.h"
#include "megatron_cpp/tensor_parallel/row_parallel_linear.h"
#include "parallel/collectives.h"
#include "parallel/recording_backend.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp {
namespace {

using parallel::CollectiveKind;
using parallel::CommunicationCount;
using namespace test_support;

/// A leaf whose transposition is the layer's input: the layer sees strides that aren't contiguous.
struct Input {
  Input(const at::Tensor& values, bool needs_gradient)
      : leaf(on_device(values.transpose(0, 1).contiguous()).requires_grad_(needs_gradient)) {}
  at::Tensor tensor() const { return leaf.transpose(0, 1); }
  at::Tensor gradient() const { return leaf.grad().defined() ? leaf.grad().transpose(0, 1) : at::Tensor(); }
  at::Tensor leaf;
};

void assign(const at::Tensor& parameter, const at::Tensor& values) {
  const at::NoGradGuard no_grad;
  auto target = parameter;
  target.copy_(values);
}

/// The loss sum(W * Y): W differs by token and column.
void backward(const at::Tensor& output, const at::Tensor& loss_weights) {
  if (output.requires_grad()) (output * on_device(loss_weights)).sum().backward();
}

/// What at::linear makes of the whole tensors, in one process.
struct Dense {
  Dense(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& loss_weights) {
    const auto x = input.clone().requires_grad_();
    const auto a = weight.clone().requires_grad_();
    const auto b = bias.clone().requires_grad_();
    const auto y = at::linear(x, a, b);
    (y * loss_weights).sum().backward();
    output = y.detach();
    input_gradient = x.grad();
    weight_gradient = a.grad();
    bias_gradient = b.grad();
  }
  at::Tensor output, input_gradient, weight_gradient, bias_gradient;
};

/// A count of `collectives` that send `bytes_sent`, nothing in a group of one rank.
CommunicationCount expected_count(const std::vector<std::pair<CollectiveKind, int64_t>>& collectives, int t) {
  CommunicationCount count;
  if (t == 1) return count;
  for (const auto& [kind, bytes] : collectives) {
    ++count.collectives[static_cast<size_t>(kind)];
    count.bytes_sent += bytes;
  }
  return count;
}

/// Bytes of `elements` float32 that one of t ranks sends when it gathers or scatters them all; an all-reduce is twice.
int64_t share(int64_t elements, int t) { return elements * 4 * (t - 1) / t; }

struct Frozen {
  bool input = false;
  bool weight = false;
};

constexpr int64_t kC = 8;

struct ColumnCase {
  bool bias = false;
  bool sequence_parallel = false;
  bool gather_output = false;
  bool fused = false;
  int64_t batch = 3;
  Frozen frozen = {};
};

std::ostream& operator<<(std::ostream& out, const ColumnCase& c) {
  return out << "bias " << c.bias << ", sequence_parallel " << c.sequence_parallel << ", gather_output "
             << c.gather_output << ", fused " << c.fused << ", batch " << c.batch << ", frozen input " << c.frozen.input
             << ", frozen weight " << c.frozen.weight;
}

/// This rank's rows of each of the parts, one after the other.
at::Tensor own_rows_of_parts(const at::Tensor& whole, const std::vector<int64_t>& parts, int64_t dim,
                             const parallel::GroupPtr& tp) {
  std::vector<at::Tensor> own;
  for (const auto& matrix : whole.split_with_sizes(parts, dim)) own.push_back(part(matrix, dim, tp));
  return at::cat(own, dim);
}

void check_column(const ColumnCase& c, int t) {
  SCOPED_TRACE(testing::Message() << c << ", t = " << t);
  const auto recorded = parallel::record(groups(t).tp);
  const auto& tp = recorded.group;
  const int64_t S = 2 * t;
  const std::vector<int64_t> parts = c.fused ? std::vector<int64_t>{3 * t, t, 2 * t} : std::vector<int64_t>{6 * t};
  const int64_t F = 6 * t;
  const auto x = exact_values({S, c.batch, kC}, 1);
  const auto weight = exact_values({F, kC}, 2);
  const auto bias = c.bias ? exact_values({F}, 3) : at::zeros({F});
  const auto loss_weights = exact_values({S, c.batch, F}, 4);
  const Dense dense(x, weight, bias, loss_weights);
  const auto own = [&](const at::Tensor& whole, int64_t dim) { return own_rows_of_parts(whole, parts, dim, tp); };

  auto options = c.fused ? ColumnParallelLinearOptions(kC, {{"q", parts[0]}, {"k", parts[1]}, {"v", parts[2]}})
                         : ColumnParallelLinearOptions(kC, F);
  options.bias(c.bias).sequence_parallel(c.sequence_parallel).gather_output(c.gather_output);
  ColumnParallelLinear layer(options, tp);
  layer->to(test_support::device());
  assign(layer->weight, own(weight, 0));
  if (c.bias) assign(layer->bias, own(bias, 0));
  EXPECT_EQ(layer->bias.defined(), c.bias);
  layer->weight.requires_grad_(!c.frozen.weight);

  const Input input(c.sequence_parallel ? part(x, 0, tp) : x, !c.frozen.input);
  const auto output = layer->forward(input.tensor());
  const auto in_forward = *recorded.count;
  EXPECT_TRUE(test_support::equal(output, c.gather_output ? dense.output : own(dense.output, -1)));
  backward(output, c.gather_output ? loss_weights : own(loss_weights, -1));
  const auto in_backward = *recorded.count - in_forward;

  if (!c.frozen.input) {
    EXPECT_TRUE(test_support::equal(input.gradient(),
                                    c.sequence_parallel ? part(dense.input_gradient, 0, tp) : dense.input_gradient));
  }
  if (c.frozen.weight) {
    EXPECT_FALSE(layer->weight.grad().defined());
  } else {
    EXPECT_TRUE(test_support::equal(layer->weight.grad(), own(dense.weight_gradient, 0)));
  }
  if (c.bias) {
    EXPECT_TRUE(test_support::equal(layer->bias.grad(), own(dense.bias_gradient, 0)));
  }

  const int64_t input_elements = S * c.batch * kC;
  std::vector<std::pair<CollectiveKind, int64_t>> forward;
  if (c.sequence_parallel) forward.emplace_back(CollectiveKind::kAllGather, share(input_elements, t));
  if (c.gather_output) forward.emplace_back(CollectiveKind::kAllGather, share(S * c.batch * F, t));
  std::vector<std::pair<CollectiveKind, int64_t>> backward_comm;
  if (!c.frozen.input) {
    if (c.sequence_parallel) {
      backward_comm.emplace_back(CollectiveKind::kReduceScatter, share(input_elements, t));
    } else {
      backward_comm.emplace_back(CollectiveKind::kAllReduce, 2 * share(input_elements, t));
    }
  }
  if (c.sequence_parallel && !c.frozen.weight) {
    backward_comm.emplace_back(CollectiveKind::kAllGather, share(input_elements, t));
  }
  EXPECT_EQ(in_forward, expected_count(forward, t));
  EXPECT_EQ(in_backward, expected_count(backward_comm, t));
}

struct RowCase {
  bool bias = false;
  bool sequence_parallel = false;
  bool input_is_parallel = true;
  bool reduce_output = true;
  int64_t batch = 3;
  Frozen frozen = {};
};

std::ostream& operator<<(std::ostream& out, const RowCase& c) {
  return out << "bias " << c.bias << ", sequence_parallel " << c.sequence_parallel << ", input_is_parallel "
             << c.input_is_parallel << ", reduce_output " << c.reduce_output << ", batch " << c.batch
             << ", frozen input " << c.frozen.input << ", frozen weight " << c.frozen.weight;
}

void check_row(const RowCase& c, int t) {
  SCOPED_TRACE(testing::Message() << c << ", t = " << t);
  const auto recorded = parallel::record(groups(t).tp);
  const auto& tp = recorded.group;
  const int64_t S = 2 * t;
  const int64_t C = 3 * t;
  constexpr int64_t kF = 5;
  const auto x = exact_values({S, c.batch, C}, 1);
  const auto weight = exact_values({kF, C}, 2);
  const auto bias = c.bias ? exact_values({kF}, 3) : at::zeros({kF});
  const auto loss_weights = exact_values({S, c.batch, kF}, 4);
  const Dense dense(x, weight, bias, loss_weights);

  RowParallelLinear layer(RowParallelLinearOptions(C, kF)
                              .bias(c.bias)
                              .sequence_parallel(c.sequence_parallel)
                              .input_is_parallel(c.input_is_parallel)
                              .reduce_output(c.reduce_output),
                          tp);
  layer->to(test_support::device());
  assign(layer->weight, part(weight, 1, tp));
  if (c.bias) assign(layer->bias, bias);
  EXPECT_EQ(layer->bias.defined(), c.bias);
  layer->weight.requires_grad_(!c.frozen.weight);

  const Input input(c.input_is_parallel ? part(x, 2, tp) : x, !c.frozen.input);
  const auto output = layer->forward(input.tensor());
  const auto in_forward = *recorded.count;
  const bool own_rows = c.reduce_output && c.sequence_parallel;
  if (c.reduce_output) {
    EXPECT_TRUE(test_support::equal(output, own_rows ? part(dense.output, 0, tp) : dense.output));
  } else {
    const auto product = at::linear(part(x, 2, tp), part(weight, 1, tp));
    EXPECT_TRUE(test_support::equal(output, tp->getRank() == 0 ? product + bias : product));
    EXPECT_TRUE(test_support::equal(parallel::all_reduce(output.detach(), groups(t).tp), dense.output));
  }
  // The sum over the ranks of each one's loss of its rows, or of its summand; or the same loss on every rank.
  backward(output, own_rows ? part(loss_weights, 0, tp) : loss_weights);
  const auto in_backward = *recorded.count - in_forward;

  if (!c.frozen.input) {
    EXPECT_TRUE(test_support::equal(input.gradient(),
                                    c.input_is_parallel ? part(dense.input_gradient, 2, tp) : dense.input_gradient));
  }
  if (c.frozen.weight) {
    EXPECT_FALSE(layer->weight.grad().defined());
  } else {
    EXPECT_TRUE(test_support::equal(layer->weight.grad(), part(dense.weight_gradient, 1, tp)));
  }
  if (c.bias) {
    // Under sequence parallelism each rank has the part of its rows; otherwise every rank has it all.
    const auto gradient = own_rows ? parallel::all_reduce(layer->bias.grad(), groups(t).tp) : layer->bias.grad();
    EXPECT_TRUE(test_support::equal(gradient, dense.bias_gradient));
  }

  const int64_t output_elements = S * c.batch * kF;
  std::vector<std::pair<CollectiveKind, int64_t>> forward;
  std::vector<std::pair<CollectiveKind, int64_t>> backward_comm;
  if (own_rows) {
    forward.emplace_back(CollectiveKind::kReduceScatter, share(output_elements, t));
    if (!c.frozen.input || !c.frozen.weight) {
      backward_comm.emplace_back(CollectiveKind::kAllGather, share(output_elements, t));
    }
  } else if (c.reduce_output) {
    forward.emplace_back(CollectiveKind::kAllReduce, 2 * share(output_elements, t));
  }
  if (!c.input_is_parallel && !c.frozen.input) {
    backward_comm.emplace_back(CollectiveKind::kAllGather, share(S * c.batch * C, t));
  }
  EXPECT_EQ(in_forward, expected_count(forward, t));
  EXPECT_EQ(in_backward, expected_count(backward_comm, t));
}

}  // namespace

TEST(ColumnParallelLinear, EqualsTheDenseLayer) {
  for (const int t : test_support::divisors_of_world()) {
    for (const bool bias : {false, true}) {
      for (const bool sequence_parallel : {false, true}) {
        for (const bool gather_output : {false, true}) {
          check_column({.bias = bias, .sequence_parallel = sequence_parallel, .gather_output = gather_output}, t);
        }
        check_column({.bias = bias, .sequence_parallel = sequence_parallel, .fused = true}, t);
      }
    }
  }
}

TEST(ColumnParallelLinear, FrozenPartsCostNoCommunication) {
  for (const int t : test_support::divisors_of_world()) {
    for (const bool bias : {false, true}) {
      for (const bool sequence_parallel : {false, true}) {
        for (const auto& frozen : {Frozen{.input = true}, Frozen{.weight = true}, Frozen{true, true}}) {
          check_column({.bias = bias, .sequence_parallel = sequence_parallel, .frozen = frozen}, t);
        }
      }
    }
  }
}

TEST(ColumnParallelLinear, TakesAnEmptyBatch) {
  for (const int t : test_support::divisors_of_world()) {
    for (const bool sequence_parallel : {false, true}) {
      check_column({.bias = true, .sequence_parallel = sequence_parallel, .batch = 0}, t);
      check_column({.bias = true, .sequence_parallel = sequence_parallel, .gather_output = true, .batch = 0}, t);
    }
  }
}

TEST(RowParallelLinear, EqualsTheDenseLayer) {
  for (const int t : test_support::divisors_of_world()) {
    for (const bool bias : {false, true}) {
      for (const bool reduce_output : {false, true}) {
        for (const bool sequence_parallel : {false, true}) {
          check_row({.bias = bias, .sequence_parallel = sequence_parallel, .reduce_output = reduce_output}, t);
        }
        check_row({.bias = bias, .input_is_parallel = false, .reduce_output = reduce_output}, t);
      }
    }
  }
}

TEST(RowParallelLinear, FrozenPartsCostNoCommunication) {
  for (const int t : test_support::divisors_of_world()) {
    for (const auto& frozen : {Frozen{.input = true}, Frozen{.weight = true}, Frozen{true, true}}) {
      check_row({.frozen = frozen}, t);
      check_row({.bias = true, .frozen = frozen}, t);
      check_row({.bias = true, .sequence_parallel = true, .frozen = frozen}, t);
      check_row({.input_is_parallel = false, .frozen = frozen}, t);
    }
  }
}

TEST(RowParallelLinear, TakesAnEmptyBatch) {
  for (const int t : test_support::divisors_of_world()) {
    for (const bool sequence_parallel : {false, true}) {
      check_row({.bias = true, .sequence_parallel = sequence_parallel, .batch = 0}, t);
    }
    check_row({.bias = true, .input_is_parallel = false, .batch = 0}, t);
  }
}

// An input of two dimensions, and of one.
TEST(ParallelLinear, TakesAnyNumberOfDimensions) {
  for (const int t : test_support::divisors_of_world()) {
    const auto& tp = groups(t).tp;
    ColumnParallelLinear column(ColumnParallelLinearOptions(kC, 2 * t), tp);
    RowParallelLinear row(RowParallelLinearOptions(2 * t, 5), tp);
    column->to(test_support::device());
    row->to(test_support::device());
    const auto a = exact_values({2 * t, kC}, 5);
    const auto b = exact_values({5, 2 * t}, 6);
    assign(column->weight, part(a, 0, tp));
    assign(row->weight, part(b, 1, tp));
    for (const auto& shape : std::vector<std::vector<int64_t>>{{kC}, {3, kC}, {2, 3, 2, kC}}) {
      const auto x = exact_values(shape, 7);
      EXPECT_TRUE(test_support::equal(row->forward(column->forward(on_device(x))), at::linear(at::linear(x, a), b)))
          << shape;
    }
  }
}

namespace {

/// Two backward passes, as for two micro-batches, through a column- and a row-parallel layer with or without
/// accumulate_into_grad; the gradients in the order column weight and bias, row weight and bias, both inputs.
std::vector<at::Tensor> gradients_of_two_passes(bool accumulate_into_grad, bool sequence_parallel,
                                                const parallel::GroupPtr& tp) {
  const int t = tp->getSize();
  ColumnParallelLinear column(ColumnParallelLinearOptions(kC, 3 * t)
                                  .bias(true)
                                  .sequence_parallel(sequence_parallel)
                                  .accumulate_into_grad(accumulate_into_grad),
                              tp);
  RowParallelLinear row(RowParallelLinearOptions(3 * t, 5)
                            .bias(true)
                            .sequence_parallel(sequence_parallel)
                            .accumulate_into_grad(accumulate_into_grad),
                        tp);
  column->to(test_support::device());
  row->to(test_support::device());
  assign(column->weight, part(exact_values({3 * t, kC}, 2), 0, tp));
  assign(column->bias, part(exact_values({3 * t}, 3), 0, tp));
  assign(row->weight, part(exact_values({5, 3 * t}, 4), 1, tp));
  assign(row->bias, exact_values({5}, 5));
  // A gradient that no layer has to do with.
  const auto bystander = on_device(at::ones({2})).requires_grad_();
  bystander.mutable_grad() = on_device(exact_values({2}, 6));

  std::vector<at::Tensor> inputs;
  for (int64_t pass = 0; pass < 2; ++pass) {
    const auto x = exact_values({2 * t, 3, kC}, 10 + pass);
    inputs.push_back(on_device((sequence_parallel ? part(x, 0, tp) : x).contiguous()).requires_grad_());
    const auto output = row->forward(column->forward(inputs.back()));
    const void* memory = column->weight.grad().defined() ? column->weight.grad().data_ptr() : nullptr;
    const auto loss_weights = exact_values({2 * t, 3, 5}, 20 + pass);
    backward(output, sequence_parallel ? part(loss_weights, 0, tp) : loss_weights);
    if (memory != nullptr && accumulate_into_grad) {
      EXPECT_EQ(column->weight.grad().data_ptr(), memory);
    }
  }
  EXPECT_TRUE(test_support::equal(bystander.grad(), exact_values({2}, 6)));
  return {column->weight.grad(), column->bias.grad(), row->weight.grad(),
          row->bias.grad(),      inputs[0].grad(),    inputs[1].grad()};
}

}  // namespace

TEST(ParallelLinear, AccumulatingIntoGradIsTheSameAsAutograds) {
  for (const int t : test_support::divisors_of_world()) {
    for (const bool sequence_parallel : {false, true}) {
      const auto plain = gradients_of_two_passes(false, sequence_parallel, groups(t).tp);
      const auto accumulated = gradients_of_two_passes(true, sequence_parallel, groups(t).tp);
      for (size_t i = 0; i < plain.size(); ++i)
        EXPECT_TRUE(test_support::equal(accumulated[i], plain[i])) << "gradient " << i;
    }
  }
}

TEST(ParallelLinear, RefuseSizesOnEveryRankBeforeAnythingIsSent) {
  for (const int t : test_support::divisors_of_world()) {
    const auto recorded = parallel::record(groups(t).tp);
    const auto& tp = recorded.group;
    const std::string size = "is not divisible by tensor-parallel size " + std::to_string(t);
    if (t > 1) {
      EXPECT_EQ(value_error([&] { ColumnParallelLinear(ColumnParallelLinearOptions(kC, 2 * t + 1), tp); }),
                "out_features " + std::to_string(2 * t + 1) + " " + size);
      // Divisible together, but not each.
      EXPECT_EQ(value_error([&] {
                  ColumnParallelLinear(ColumnParallelLinearOptions(kC, {{"q", t + 1}, {"k", t - 1}}), tp);
                }),
                "q out_features " + std::to_string(t + 1) + " " + size);
      EXPECT_EQ(value_error([&] { RowParallelLinear(RowParallelLinearOptions(t + 1, 5), tp); }),
                "in_features " + std::to_string(t + 1) + " " + size);
      RowParallelLinear row(RowParallelLinearOptions(t, 5).sequence_parallel(true), tp);
      row->to(test_support::device());
      EXPECT_EQ(value_error([&] {
                  row->forward(on_device(at::ones({t + 1, 2, 1})));
                }),
                "sequence length " + std::to_string(t + 1) + " " + size);
    }
    EXPECT_TRUE(
        contains(value_error([&] {
                   ColumnParallelLinear(ColumnParallelLinearOptions(kC, {{"q", t}, {"k", t}}).gather_output(true), tp);
                 }),
                 "gather_output of a fused weight"));
    EXPECT_TRUE(contains(value_error([&] {
                           RowParallelLinear(
                               RowParallelLinearOptions(t, 5).sequence_parallel(true).input_is_parallel(false), tp);
                         }),
                         "sequence_parallel needs an input that is parallel"));
    for (const bool sequence_parallel : {false, true}) {
      ColumnParallelLinear column(ColumnParallelLinearOptions(kC, t).sequence_parallel(sequence_parallel), tp);
      column->to(test_support::device());
      EXPECT_TRUE(contains(value_error([&] {
                             column->forward(on_device(at::ones({t, 2, kC + 1})));
                           }),
                           "does not have the 8 columns"));
      RowParallelLinear row(RowParallelLinearOptions(3 * t, 5).sequence_parallel(sequence_parallel), tp);
      row->to(test_support::device());
      EXPECT_TRUE(contains(value_error([&] {
                             row->forward(on_device(at::ones({t, 2, 4})));
                           }),
                           "does not have the 3 columns"));
    }
    RowParallelLinear whole_input(RowParallelLinearOptions(3 * t, 5).input_is_parallel(false), tp);
    whole_input->to(test_support::device());
    EXPECT_NE(value_error([&] { whole_input->forward(on_device(at::ones({t, 2, 4 * t}))); }), "nothing thrown");
    EXPECT_EQ(recorded.count->total(), 0);
  }
}

TEST(ParallelLinear, RefuseDoubleBackward) {
  for (const int t : test_support::divisors_of_world()) {
    ColumnParallelLinear layer(ColumnParallelLinearOptions(kC, t), groups(t).tp);
    layer->to(test_support::device());
    const auto input = on_device(exact_values({2, kC}, 1)).requires_grad_();
    const auto loss = layer->forward(input).square().sum();
    EXPECT_THROW(torch::autograd::grad({loss}, {input}, {}, /*retain_graph=*/true, /*create_graph=*/true),
                 c10::NotImplementedError);
  }
}

}  // namespace megatron_cpp
