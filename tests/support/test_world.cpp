#include "tests/support/test_world.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <utility>

#include "parallel/agree.h"
#include "parallel/collectives.h"
#include "parallel/environment_groups.h"
#include "parallel/nccl/staged_backend.h"
#include "tests/support/nccl_like_backend.h"

namespace megatron_cpp::test_support {
namespace {

struct World {
  std::unique_ptr<parallel::Runtime> runtime;
  std::map<std::string, parallel::ProcessGroups> by_grid;
};

World& world() {
  static World instance;
  return instance;
}

int world_size() { return parallel::ranks_in_environment() ? parallel::world_size_in_environment() : runtime().size(); }

/// A group of the same ranks whose CPU tensors go through a staged backend, as tensors of a shared GPU do.
parallel::GroupPtr staged(const parallel::GroupPtr& group) {
  auto result = c10::make_intrusive<c10d::ProcessGroup>(group->getRank(), group->getSize());
  result->setBackend(at::kCPU, c10d::ProcessGroup::CUSTOM, parallel::make_staged_backend(group->getBackend(at::kCPU)));
  result->setGroupName(group->getGroupName());
  return result;
}

}  // namespace

parallel::GroupPtr over_test_backend(const parallel::GroupPtr& group) {
  const char* value = std::getenv("TEST_BACKEND");
  const std::string name = value != nullptr ? value : "";
  if (name.empty()) return group;
  if (name == "like_nccl") return like_nccl(group);
  TORCH_CHECK_VALUE(name == "staged", "TEST_BACKEND=", name, " is neither like_nccl nor staged");
  return staged(group);
}

parallel::Runtime& runtime() {
  if (!world().runtime) {
    const char* device = std::getenv("TEST_DEVICE");
    world().runtime = std::make_unique<parallel::Runtime>();
    world().runtime->choose_device({.device = device != nullptr ? device : "cpu", .share_devices = true});
  }
  return *world().runtime;
}

c10::Device device() { return parallel::ranks_in_environment() ? c10::Device(c10::kCPU) : runtime().device(); }

const parallel::ProcessGroups& groups(int tp) { return groups({.tp = tp, .dp = world_size() / tp}); }

const parallel::ProcessGroups& groups(const parallel::RankGrid& grid) {
  auto& by_grid = world().by_grid;
  const auto found = by_grid.find(grid.text());
  if (found != by_grid.end()) return found->second;
  parallel::ProcessGroupsOptions options;
  options.timeout = std::chrono::seconds(60);
  auto made = parallel::ranks_in_environment() ? parallel::process_groups_from_environment(grid, options)
                                               : parallel::make_process_groups(runtime(), grid, options);
  std::map<parallel::GroupPtr, parallel::GroupPtr> over_backend{{made.world, made.world}};  // shared groups stay shared
  for (const auto& kind : parallel::kGroupKinds) {
    auto& group = made.*(kind.group);
    auto& replacement = over_backend[group];
    if (!replacement) replacement = over_test_backend(group);
    group = replacement;
  }
  return by_grid.emplace(grid.text(), std::move(made)).first->second;
}

const parallel::GroupPtr& world_tp() { return groups(world_size()).tp; }

const parallel::GroupPtr& single() { return groups(1).tp; }

std::vector<int> divisors_of_world() {
  std::vector<int> result;
  for (int size = 1; size <= world_size(); ++size) {
    if (world_size() % size == 0) result.push_back(size);
  }
  return result;
}

at::Tensor on_device(const at::Tensor& tensor) { return tensor.to(device()); }

at::Tensor part(const at::Tensor& whole, int64_t dim, const parallel::GroupPtr& tp) {
  const int64_t length = whole.size(dim) / tp->getSize();
  return whole.narrow(dim, length * tp->getRank(), length);
}

void end_test_world() {
  world().by_grid.clear();
  world().runtime.reset();
}

SharedFolder::SharedFolder() {
  if (runtime().rank() == 0) own_.emplace();
  path_ = parallel::broadcast_text(own_ ? own_->path().string() : "", 0, world_tp());
}

SharedFolder::~SharedFolder() { parallel::barrier(world_tp()); }

bool on_all_ranks(bool condition) {
  return parallel::all_reduce(at::full({1}, condition ? 1 : 0, at::kInt), world_tp(), parallel::Reduction::kMin)
             .item<int>() == 1;
}

testing::AssertionResult near(const at::Tensor& actual, const at::Tensor& expected, double tolerance) {
  if (!actual.defined() || !expected.defined() || actual.sizes() != expected.sizes()) {
    return testing::AssertionFailure() << "shape " << (actual.defined() ? c10::str(actual.sizes()) : "undefined")
                                       << ", expected "
                                       << (expected.defined() ? c10::str(expected.sizes()) : "undefined");
  }
  if (actual.numel() == 0) return testing::AssertionSuccess();
  const auto want = expected.detach().cpu().to(at::kDouble);
  const auto got = actual.detach().cpu().to(at::kDouble);
  const double largest = std::max(1e-30, want.abs().max().item<double>());
  const double difference = (got - want).abs().max().item<double>();
  if (difference <= tolerance * largest) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "differs by " << difference << ", largest value " << largest << ", allowed "
                                     << tolerance * largest;
}

testing::AssertionResult equal(const at::Tensor& actual, const at::Tensor& expected) {
  if (actual.defined() && expected.defined() && at::equal(actual.detach().cpu(), expected.detach().cpu())) {
    return testing::AssertionSuccess();
  }
  return testing::AssertionFailure() << "not equal: " << near(actual, expected, 0.0).message();
}

at::Tensor exact_values(at::IntArrayRef shape, int64_t seed, at::ScalarType dtype) {
  int64_t elements = 1;
  for (const int64_t size : shape) elements *= size;
  const auto index = at::arange(elements, at::kLong);
  // A multiplicative hash: neighbours in any dimension differ.
  const auto mixed = (index * 2654435761 + seed * 40503 + 12345).bitwise_and(0x7fffffff).floor_divide(1 << 9);
  return mixed.remainder(65).sub(32).to(at::kDouble).div(8).to(dtype).view(shape);
}

}  // namespace megatron_cpp::test_support
