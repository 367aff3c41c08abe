// Each mapping against its mathematical definition: what all ranks of a group hold after it, as a function of what all
// held before, computed here in one process. Gradients are central differences of that function in float64, under the
// loss that the mapping is made for.
#include "parallel/mappings.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <numeric>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

#include "parallel/recording_backend.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::parallel {
namespace {

using Tensors = std::vector<at::Tensor>;  // one per rank of the group

/// What the ranks hold before the mapping.
enum class Input { kEqualOnAllRanks, kOwn };
/// What they do with its result. All alike: every rank computes the same loss of it, which counts once. Own: each rank
/// computes something else, and the loss is the sum over the ranks.
enum class Use { kAlikeOnAllRanks, kOwn };

struct MappingCase {
  std::string name;
  std::function<at::Tensor(const at::Tensor&, const GroupPtr&)> mapping;
  std::function<Tensors(const Tensors&)> definition;
  Input input;
  Use use;
  std::optional<CollectiveKind> forward;
  std::optional<CollectiveKind> backward;
};

void PrintTo(const MappingCase& mapping_case, std::ostream* out) { *out << mapping_case.name; }

Tensors on_each(const Tensors& inputs, const at::Tensor& value) { return Tensors(inputs.size(), value); }

at::Tensor sum_of(const Tensors& inputs) { return at::stack(inputs).sum(0); }

Tensors pieces(const at::Tensor& whole, const Tensors& inputs, int64_t dim) {
  return whole.chunk(static_cast<int64_t>(inputs.size()), dim);
}

// Rank p sends (p + q) % 3 + 1 rows to rank q.
int64_t rows_sent(int64_t from, int64_t to) { return (from + to) % 3 + 1; }

std::vector<int64_t> splits(int64_t rank, int64_t t) {
  std::vector<int64_t> result;
  for (int64_t peer = 0; peer < t; ++peer) result.push_back(rows_sent(rank, peer));
  return result;
}

Tensors exchange(const Tensors& inputs) {
  const auto t = static_cast<int64_t>(inputs.size());
  Tensors result;
  for (int64_t to = 0; to < t; ++to) {
    Tensors received;
    for (int64_t from = 0; from < t; ++from) {
      received.push_back(
          inputs[static_cast<size_t>(from)].split_with_sizes(splits(from, t), 0)[static_cast<size_t>(to)]);
    }
    result.push_back(at::cat(received, 0));
  }
  return result;
}

at::Tensor exchange_mapping(const at::Tensor& input, const GroupPtr& tp) {
  const auto own = splits(tp->getRank(), tp->getSize());  // rows_sent is symmetric: as many come as go
  return differentiable_all_to_all(input, own, own, tp);
}

at::Tensor equal_exchange_mapping(const at::Tensor& input, const GroupPtr& tp) {
  return differentiable_all_to_all(input, {}, {}, tp);
}

Tensors equal_exchange(const Tensors& inputs) {
  Tensors result;
  for (size_t to = 0; to < inputs.size(); ++to) {
    Tensors received;
    for (const auto& input : inputs) received.push_back(pieces(input, inputs, 0)[to]);
    result.push_back(at::cat(received, 0));
  }
  return result;
}

std::vector<MappingCase> mapping_cases() {
  const auto rows_of_sum = [](const Tensors& inputs) { return pieces(sum_of(inputs), inputs, 0); };
  const auto columns_of_sum = [](const Tensors& inputs) { return pieces(sum_of(inputs), inputs, -1); };
  const auto all_rows = [](const Tensors& inputs) { return on_each(inputs, at::cat(inputs, 0)); };
  const auto all_columns = [](const Tensors& inputs) { return on_each(inputs, at::cat(inputs, -1)); };
  const auto sum_on_each = [](const Tensors& inputs) { return on_each(inputs, sum_of(inputs)); };
  constexpr auto kGather = CollectiveKind::kAllGather;
  constexpr auto kScatter = CollectiveKind::kReduceScatter;
  constexpr auto kReduce = CollectiveKind::kAllReduce;
  constexpr auto kExchange = CollectiveKind::kAllToAll;
  return {
      {"copy_to_tensor_model_parallel_region", copy_to_tensor_model_parallel_region,
       [](const Tensors& inputs) { return inputs; }, Input::kEqualOnAllRanks, Use::kOwn, std::nullopt, kReduce},
      {"reduce_from_tensor_model_parallel_region", reduce_from_tensor_model_parallel_region, sum_on_each, Input::kOwn,
       Use::kAlikeOnAllRanks, kReduce, std::nullopt},
      {"reduce_from_tensor_model_parallel_region_to_partial_use",
       reduce_from_tensor_model_parallel_region_to_partial_use, sum_on_each, Input::kOwn, Use::kOwn, kReduce, kReduce},
      {"scatter_to_tensor_model_parallel_region", scatter_to_tensor_model_parallel_region,
       [](const Tensors& inputs) { return pieces(inputs[0], inputs, -1); }, Input::kEqualOnAllRanks, Use::kOwn,
       std::nullopt, kGather},
      {"gather_from_tensor_model_parallel_region", gather_from_tensor_model_parallel_region, all_columns, Input::kOwn,
       Use::kAlikeOnAllRanks, kGather, std::nullopt},
      {"all_gather_last_dim_from_tensor_parallel_region", all_gather_last_dim_from_tensor_parallel_region, all_columns,
       Input::kOwn, Use::kOwn, kGather, kScatter},
      {"reduce_scatter_last_dim_to_tensor_parallel_region", reduce_scatter_last_dim_to_tensor_parallel_region,
       columns_of_sum, Input::kOwn, Use::kOwn, kScatter, kGather},
      {"scatter_to_sequence_parallel_region", scatter_to_sequence_parallel_region,
       [](const Tensors& inputs) { return pieces(inputs[0], inputs, 0); }, Input::kEqualOnAllRanks, Use::kOwn,
       std::nullopt, kGather},
      {"gather_from_sequence_parallel_region", gather_from_sequence_parallel_region, all_rows, Input::kOwn, Use::kOwn,
       kGather, kScatter},
      {"gather_from_sequence_parallel_region_to_replicated_use", gather_from_sequence_parallel_region_to_replicated_use,
       all_rows, Input::kOwn, Use::kAlikeOnAllRanks, kGather, std::nullopt},
      {"reduce_scatter_to_sequence_parallel_region", reduce_scatter_to_sequence_parallel_region, rows_of_sum,
       Input::kOwn, Use::kOwn, kScatter, kGather},
      {"differentiable_all_to_all_uneven", exchange_mapping, exchange, Input::kOwn, Use::kOwn, kExchange, kExchange},
      {"differentiable_all_to_all_equal", equal_exchange_mapping, equal_exchange, Input::kOwn, Use::kOwn, kExchange,
       kExchange},
      {"all_to_all_sequence_to_hidden_parallel", all_to_all_sequence_to_hidden_parallel,
       [](const Tensors& inputs) { return pieces(at::cat(inputs, 0), inputs, -1); }, Input::kOwn, Use::kOwn, kExchange,
       kExchange},
      {"all_to_all_hidden_to_sequence_parallel", all_to_all_hidden_to_sequence_parallel,
       [](const Tensors& inputs) { return pieces(at::cat(inputs, -1), inputs, 0); }, Input::kOwn, Use::kOwn, kExchange,
       kExchange},
  };
}

/// The inputs of all ranks of this rank's group: [rows, 2, columns], in float64. Rows and columns are divisible by t;
/// the uneven exchange takes what its splits add up to.
Tensors inputs_of_all(const MappingCase& mapping_case, int t) {
  const auto& groups = test_support::groups(t);
  Tensors inputs;
  for (const int peer : groups.grid.group_of(test_support::world_tp()->getRank(), "tp")) {
    int64_t rows = 2 * t;
    if (mapping_case.name == "differentiable_all_to_all_uneven") {
      rows = 0;
      for (const int64_t part : splits(static_cast<int64_t>(inputs.size()), t)) rows += part;
    }
    inputs.push_back(mapping_case.input == Input::kEqualOnAllRanks && !inputs.empty()
                         ? inputs.front()
                         : test_support::exact_values({rows, 2, t == 1 ? 3 : t}, 11 + peer, at::kDouble));
  }
  return inputs;
}

/// Weights of the loss sum(w * y * y) on each rank: 0 is among them, and they differ by rank, row and column.
at::Tensor loss_weights(const MappingCase& mapping_case, const at::Tensor& output, size_t rank) {
  const int64_t seed = mapping_case.use == Use::kOwn ? 101 + static_cast<int64_t>(rank) : 101;
  return test_support::exact_values(output.sizes(), seed, at::kDouble);
}

double total_loss(const MappingCase& mapping_case, const Tensors& inputs) {
  const auto outputs = mapping_case.definition(inputs);
  double loss = 0.0;
  for (size_t rank = 0; rank < outputs.size(); ++rank) {
    loss += (loss_weights(mapping_case, outputs[rank], rank) * outputs[rank].square()).sum().item<double>();
    if (mapping_case.use == Use::kAlikeOnAllRanks) break;
  }
  return loss;
}

/// Central differences of the total loss by the input of `rank`. The loss is quadratic and its numbers are dyadic, so
/// they are exact.
at::Tensor gradient_by_differences(const MappingCase& mapping_case, const Tensors& inputs, size_t rank) {
  constexpr double kStep = 0.5;
  auto gradient = at::zeros_like(inputs[rank]);
  auto* out = gradient.mutable_data_ptr<double>();
  const auto loss_at = [&](int64_t element, double step) {
    Tensors moved = inputs;
    for (size_t other = 0; other < inputs.size(); ++other) {
      if (mapping_case.input == Input::kOwn && other != rank) continue;  // equal inputs move together
      moved[other] = inputs[other].clone();
      moved[other].view(-1)[element] += step;
    }
    return total_loss(mapping_case, moved);
  };
  for (int64_t element = 0; element < gradient.numel(); ++element) {
    out[element] = (loss_at(element, kStep) - loss_at(element, -kStep)) / (2 * kStep);
  }
  return gradient;
}

class Mappings : public testing::TestWithParam<MappingCase> {};

int64_t expected_count(const std::optional<CollectiveKind>& kind, int t) { return kind && t > 1 ? 1 : 0; }

}  // namespace

TEST_P(Mappings, ValueAndGradientAreThoseOfTheDefinition) {
  for (const int t : test_support::divisors_of_world()) {
    const auto recorded = record(test_support::groups(t).tp);
    const auto rank = static_cast<size_t>(recorded.group->getRank());
    const auto inputs = inputs_of_all(GetParam(), t);
    // A leaf behind a transposition, so that the mapping sees an input that isn't contiguous.
    const auto leaf = test_support::on_device(inputs[rank].transpose(0, 2).contiguous()).requires_grad_();
    const auto output = GetParam().mapping(leaf.transpose(0, 2), recorded.group);
    const auto after_forward = *recorded.count;
    EXPECT_TRUE(test_support::equal(output, GetParam().definition(inputs)[rank])) << "t = " << t;
    EXPECT_EQ(after_forward.total(), expected_count(GetParam().forward, t)) << "t = " << t;
    if (GetParam().forward) {
      EXPECT_EQ(after_forward.of(*GetParam().forward), expected_count(GetParam().forward, t));
    }

    const auto weights = test_support::on_device(loss_weights(GetParam(), output, rank));
    (weights * output.square()).sum().backward();
    const auto in_backward = *recorded.count - after_forward;
    EXPECT_TRUE(test_support::equal(leaf.grad().transpose(0, 2), gradient_by_differences(GetParam(), inputs, rank)))
        << "t = " << t;
    EXPECT_EQ(in_backward.total(), expected_count(GetParam().backward, t)) << "t = " << t;
    if (GetParam().backward) {
      EXPECT_EQ(in_backward.of(*GetParam().backward), expected_count(GetParam().backward, t));
    }
  }
}

TEST_P(Mappings, OfOneRankSendNothingAndCopyNothing) {
  const auto recorded = record(test_support::single());
  const auto input = test_support::on_device(inputs_of_all(GetParam(), 1)[0].transpose(0, 2)).requires_grad_();
  const auto output = GetParam().mapping(input, recorded.group);
  EXPECT_EQ(output.data_ptr(), input.data_ptr());
  EXPECT_EQ(output.strides(), input.strides());
  const auto gradient = torch::autograd::grad({output}, {input}, {at::ones_like(output)})[0];
  EXPECT_TRUE(test_support::equal(gradient, at::ones_like(input)));
  EXPECT_EQ(*recorded.count, CommunicationCount{});
}

TEST_P(Mappings, RefuseDoubleBackward) {
  for (const int t : test_support::divisors_of_world()) {
    if (t == 1) continue;  // nothing to differentiate
    const auto& tp = test_support::groups(t).tp;
    const auto rank = static_cast<size_t>(tp->getRank());
    const auto input = test_support::on_device(inputs_of_all(GetParam(), t)[rank]).requires_grad_();
    const auto output = GetParam().mapping(input, tp);
    EXPECT_THROW(torch::autograd::grad({output.square().sum()}, {input}, {}, /*retain_graph=*/true,
                                       /*create_graph=*/true),
                 c10::NotImplementedError);
  }
}

INSTANTIATE_TEST_SUITE_P(All, Mappings, testing::ValuesIn(mapping_cases()),
                         [](const auto& parameter) { return parameter.param.name; });

TEST(MappingErrors, WhatDoesNotDivideThrowsOnEveryRankBeforeAnythingIsSent) {
  for (const int t : test_support::divisors_of_world()) {
    if (t == 1) continue;
    const auto recorded = record(test_support::groups(t).tp);
    const auto& tp = recorded.group;
    const auto odd = test_support::on_device(at::ones({t + 1, 2 * t + 1}));
    const std::vector<at::Tensor (*)(const at::Tensor&, const GroupPtr&)> mappings = {
        scatter_to_tensor_model_parallel_region, reduce_scatter_last_dim_to_tensor_parallel_region,
        scatter_to_sequence_parallel_region,     reduce_scatter_to_sequence_parallel_region,
        all_to_all_sequence_to_hidden_parallel,  all_to_all_hidden_to_sequence_parallel};
    for (const auto& mapping : mappings) {
      std::string message;
      try {
        mapping(odd, tp);
      } catch (const c10::ValueError& error) {
        message = error.what_without_backtrace();
      }
      EXPECT_NE(message.find("is not divisible by"), std::string::npos) << message;
      EXPECT_NE(message.find("size " + std::to_string(t)), std::string::npos) << message;
    }
    EXPECT_EQ(recorded.count->total(), 0);
  }
}

TEST(CopyToTensorModelParallelRegion, ReturnsAView) {
  for (const int t : test_support::divisors_of_world()) {
    const auto input = test_support::on_device(at::ones({3, 2})).requires_grad_();
    const auto output = copy_to_tensor_model_parallel_region(input, test_support::groups(t).tp);
    EXPECT_EQ(output.data_ptr(), input.data_ptr());
  }
}

// Rank r has rows[r] rows of the sequence. Rolled as often as there are rows, the sequence is itself again.
TEST(RollSequence, MovesTheRowsOfAllRanksByOne) {
  for (const int t : test_support::divisors_of_world()) {
    std::vector<int64_t> one_each(static_cast<size_t>(t), 1);
    std::vector<int64_t> uneven;
    for (int rank = 0; rank < t; ++rank) uneven.push_back((rank + 2) % 4 + 1);
    for (const auto& rows : {one_each, uneven, std::vector<int64_t>(static_cast<size_t>(t), 0)}) {
      SCOPED_TRACE(testing::PrintToString(rows));
      const auto recorded = record(test_support::groups(t).tp);
      const auto rank = static_cast<size_t>(recorded.group->getRank());
      const int64_t total = std::accumulate(rows.begin(), rows.end(), int64_t{0});
      const auto own = [&](const at::Tensor& whole) { return whole.split_with_sizes(rows)[rank]; };
      const auto whole = test_support::on_device(test_support::exact_values({total, 2, 3}, 5));
      const auto weights = test_support::on_device(test_support::exact_values({total, 2, 3}, 6));
      const auto input = own(whole).transpose(0, 2).contiguous().transpose(0, 2).detach().requires_grad_();
      auto output = input;
      for (int64_t shift = 1; shift <= total; ++shift) {
        const auto before = *recorded.count;
        output = roll_sequence_parallel_region(output, recorded.group);
        EXPECT_TRUE(test_support::equal(output, own(whole.roll(-shift, 0)))) << shift;
        const auto sent = *recorded.count - before;
        EXPECT_EQ(sent.of(CollectiveKind::kAllToAll), t > 1 ? 1 : 0);
        EXPECT_EQ(sent.total(), t > 1 ? 1 : 0);
        EXPECT_EQ(sent.bytes_sent, t > 1 ? 2 * 3 * 4 : 0);

        const auto before_backward = *recorded.count;
        const auto gradient =
            torch::autograd::grad({(output * own(weights)).sum()}, {input}, {}, /*retain_graph=*/true)[0];
        EXPECT_TRUE(test_support::equal(gradient, own(weights.roll(shift, 0)))) << shift;
        EXPECT_EQ((*recorded.count - before_backward).bytes_sent, t > 1 ? shift * 2 * 3 * 4 : 0);
      }
      if (total > 0) continue;
      const auto none = roll_sequence_parallel_region(input, recorded.group);
      EXPECT_EQ(none.sizes(), input.sizes());
      EXPECT_EQ(recorded.count->bytes_sent, 0);
    }
  }
}

// A mapping within another: the loss of a two-layer perceptron, column- then row-parallel, by hand.
TEST(MappingsTogether, CopyAndReduceMakeAParallelProduct) {
  for (const int t : test_support::divisors_of_world()) {
    const auto& tp = test_support::groups(t).tp;
    const int64_t r = tp->getRank();
    const auto x = test_support::exact_values({3, 5}, 1, at::kDouble);
    const auto a = test_support::exact_values({5, 2 * t}, 2, at::kDouble);
    const auto b = test_support::exact_values({2 * t, 7}, 3, at::kDouble);

    const auto dense_x = x.clone().requires_grad_();
    const auto dense = dense_x.mm(a).square().mm(b);
    dense.square().sum().backward();

    const auto own_x = test_support::on_device(x.clone()).requires_grad_();
    const auto hidden =
        copy_to_tensor_model_parallel_region(own_x, tp).mm(test_support::on_device(a.narrow(1, 2 * r, 2))).square();
    const auto output =
        reduce_from_tensor_model_parallel_region(hidden.mm(test_support::on_device(b.narrow(0, 2 * r, 2))), tp);
    output.square().sum().backward();
    EXPECT_TRUE(test_support::near(output, dense, 1e-14));
    EXPECT_TRUE(test_support::near(own_x.grad(), dense_x.grad(), 1e-14));
  }
}

}  // namespace megatron_cpp::parallel
