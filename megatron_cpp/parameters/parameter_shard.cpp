#include "megatron_cpp/parameters/parameter_shard.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/PhiloxRNGEngine.h>
#include <c10/util/Exception.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <functional>
#include <numbers>
#include <set>
#include <string_view>
#include <utility>

#include "parallel/hash.h"

namespace megatron_cpp {

std::string_view GradientDomain::replicated_over() const {
  if (sharded_over.empty()) return "tp_dp";
  if (sharded_over == kSharded.sharded_over) return kSharded.summed_over;
  TORCH_CHECK_VALUE(sharded_over == kExpert.sharded_over, "sharded over \"", sharded_over,
                    "\": parameters are sharded over tp or etp_ep");
  return kExpert.summed_over;
}

namespace {

/// A hash of the name, then the seed: the same on every machine.
uint64_t generator_key(uint64_t seed, std::string_view name) {
  std::array<std::byte, 8> bytes{};  // little-endian everywhere
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(seed >> (8 * i));
  return parallel::stable_hash(bytes, parallel::stable_hash(name));
}

/// Normal values number 2i and 2i+1 of a stream: Box-Muller on the uniform pair (u1, u2), u1 in (0, 1].
std::pair<float, float> normal_pair(uint64_t key, int64_t pair) {
  at::Philox4_32 engine(key, /*subsequence=*/static_cast<uint64_t>(pair), /*offset=*/0);
  const double u1 = (static_cast<double>(engine()) + 1.0) / 4294967296.0;
  const double u2 = static_cast<double>(engine()) / 4294967296.0;
  const double radius = std::sqrt(-2.0 * std::log(u1));
  const double angle = 2.0 * std::numbers::pi * u2;
  return {static_cast<float>(radius * std::cos(angle)), static_cast<float>(radius * std::sin(angle))};
}

/// Values [first, first + count) of the stream `key`.
void fill_normal(float* out, int64_t first, int64_t count, uint64_t key, float standard_deviation) {
  int64_t index = first;
  const int64_t end = first + count;
  while (index < end) {
    const auto [even, odd] = normal_pair(key, index / 2);
    if (index % 2 == 0) {
      *out++ = even * standard_deviation;
      if (++index == end) break;
    }
    *out++ = odd * standard_deviation;
    ++index;
  }
}

/// The segment's elements, in the shape of its box. What is contiguous in the global tensor is generated in one run.
at::Tensor normal_values(const ParameterSegment& segment, uint64_t seed, float standard_deviation) {
  const auto& shape = segment.global_shape;
  const auto& [first, length] = segment.box;
  auto values = at::empty(length, at::kFloat);
  // The box has dimensions `whole` and later completely; a run is some rows of the dimension before them.
  size_t whole = shape.size();
  int64_t row = 1;
  while (whole > 1 && length[whole - 1] == shape[whole - 1]) row *= shape[--whole];
  const size_t dim = whole - 1;
  const int64_t run = length[dim] * row;
  const int64_t num_runs = values.numel() / run;
  const uint64_t key = generator_key(seed, segment.name);
  float* data = values.mutable_data_ptr<float>();
  // The flat index of a run's first element in the global tensor.
  const auto begin_of_run = [&](int64_t number) {
    int64_t begin = first[dim] * row;
    int64_t stride = shape[dim] * row;
    for (size_t d = dim; d-- > 0;) {
      begin += (first[d] + number % length[d]) * stride;
      number /= length[d];
      stride *= shape[d];
    }
    return begin;
  };
  if (num_runs == 1) {
    constexpr int64_t kGrain = 1 << 14;
    const int64_t run_begin = begin_of_run(0);
    at::parallel_for(0, run, kGrain, [&](int64_t begin, int64_t end) {
      fill_normal(data + begin, run_begin + begin, end - begin, key, standard_deviation);
    });
  } else {
    at::parallel_for(0, num_runs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t number = begin; number < end; ++number) {
        fill_normal(data + number * run, begin_of_run(number), run, key, standard_deviation);
      }
    });
  }
  return values;
}

std::string join(const std::string& prefix, const std::string& name) {
  return prefix.empty() ? name : prefix + "." + name;
}

}  // namespace

ParameterSegment ParameterSegment::rows(std::string name, std::vector<int64_t> global_shape, int64_t dim,
                                        int64_t global_begin, int64_t local_begin, int64_t length) {
  auto box = Box::rows(global_shape, dim, {global_begin, global_begin + length});
  std::vector<int64_t> begin(global_shape.size(), 0);
  begin[static_cast<size_t>(dim)] = local_begin;
  return {std::move(name), std::move(global_shape), std::move(box), std::move(begin)};
}

at::Tensor ParameterSegment::in_local(const at::Tensor& local) const {
  return view_of(local, Box::whole(local.sizes().vec()), {local_begin, box.length});
}

at::Tensor ParameterSegment::in_global(const at::Tensor& global) const {
  return view_of(global, Box::whole(global_shape), box);
}

ParameterShard replicated_parameter(std::string name, const at::Tensor& parameter, GradientDomain domain,
                                    InitialValue initial_value, bool weight_decay) {
  TORCH_INTERNAL_ASSERT(domain.sharded_over.empty() && parameter.dim() > 0);
  auto segment = ParameterSegment::rows(name, parameter.sizes().vec(), 0, 0, 0, parameter.size(0));
  return {std::move(name), parameter, domain, {std::move(segment)}, initial_value, weight_decay};
}

ParameterShard sharded_parameter(std::string name, const at::Tensor& parameter, std::vector<int64_t> global_shape,
                                 int64_t dim, int64_t begin, InitialValue initial_value, bool weight_decay) {
  auto segment = ParameterSegment::rows(name, std::move(global_shape), dim, begin, 0, parameter.size(dim));
  return {std::move(name), parameter, GradientDomain::kSharded, {std::move(segment)}, initial_value, weight_decay};
}

std::vector<ParameterShard> parameter_shards(const torch::nn::Module& root) {
  std::vector<ParameterShard> all;
  std::set<std::string> spoken_for;
  // A ParallelModule also lists the parameters of modules below it that are no ParallelModule.
  const std::function<void(const torch::nn::Module&, const std::string&)> visit = [&](const torch::nn::Module& module,
                                                                                      const std::string& prefix) {
    if (const auto* parallel_module = dynamic_cast<const ParallelModule*>(&module)) {
      for (auto& shard : parallel_module->own_parameters()) {
        shard.name = join(prefix, shard.name);
        shard.before_use = parallel_module->before_use();
        for (auto& segment : shard.segments) segment.name = join(prefix, segment.name);
        TORCH_CHECK_VALUE(spoken_for.insert(shard.name).second, "parameter ", shard.name,
                          " is listed by two parallel modules");
        all.push_back(std::move(shard));
      }
    }
    for (const auto& child : module.named_children()) visit(*child.value(), join(prefix, child.key()));
  };
  visit(root, "");
  for (const auto& parameter : root.named_parameters()) {
    TORCH_CHECK_VALUE(spoken_for.count(parameter.key()) > 0, "no parallel module says how parameter ", parameter.key(),
                      " is sharded: give it to a ParallelModule that lists it in own_parameters()");
  }
  return all;
}

void initialize_parameters(const std::vector<ParameterShard>& parameters, uint64_t seed) {
  const at::NoGradGuard no_grad;
  for (const auto& shard : parameters) {
    auto parameter = shard.parameter;
    parameter.zero_();
    for (const auto& segment : shard.segments) {
      if (segment.box.numel() == 0) continue;
      auto target = segment.in_local(parameter);
      if (shard.initial_value.kind == InitialValue::Kind::kConstant) {
        target.fill_(shard.initial_value.value);
      } else {
        target.copy_(normal_values(segment, seed, static_cast<float>(shard.initial_value.value)));
      }
    }
  }
}

}  // namespace megatron_cpp
