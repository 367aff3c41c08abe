#include "megatron_cpp/training/not_finite_search.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <string_view>
#include <tuple>

#include "parallel/agree.h"
#include "parallel/collectives.h"

namespace megatron_cpp::internal {
namespace {

thread_local NotFiniteSearch* current_search = nullptr;  // callbacks are plain functions

bool is_finite(const at::Tensor& tensor) { return at::isfinite(tensor).all().item<bool>(); }

bool has_nan_or_infinity(const at::Tensor& tensor) {
  return at::isnan(tensor).logical_or_(at::isposinf(tensor)).any().item<bool>();
}

/// Whether an operator computes its output: not where it may hold anything, is filled with a constant, is a view of
/// what others have computed before, or is still to be received.
bool computes(const at::RecordFunction& function, size_t output) {
  const std::string_view name = function.name();
  for (const std::string_view prefix :
       {"aten::empty", "aten::new_empty", "aten::resize", "aten::set_", "aten::fill", "aten::full", "c10d::"}) {
    if (name.starts_with(prefix)) return false;
  }
  const auto schema = function.operator_schema();
  if (!schema || output >= schema->returns().size()) return true;
  const auto* alias = schema->returns()[output].alias_info();
  return alias == nullptr || alias->isWrite();
}

std::string module_of(const std::string& parameter) {
  const auto dot = parameter.rfind('.');
  return dot == std::string::npos ? "" : parameter.substr(0, dot);
}

}  // namespace

std::string common_module(const std::string& a, const std::string& b) {
  auto common =
      a.substr(0, static_cast<size_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin()));
  const bool ends_a = common.size() == a.size() && (b.size() == a.size() || b[a.size()] == '.');
  const bool ends_b = common.size() == b.size() && (a.size() == b.size() || a[b.size()] == '.');
  return ends_a || ends_b ? common : module_of(common);
}

std::string listed(const std::vector<std::string>& names) {
  constexpr size_t kMost = 64;
  if (names.size() <= kMost) return fmt::format("{}", fmt::join(names, ", "));
  return fmt::format("{} and {} more", fmt::join(names.begin(), names.begin() + kMost, ", "), names.size() - kMost);
}

NotFiniteSearch::NotFiniteSearch(const std::vector<ParameterShard>& parameters) {
  TORCH_INTERNAL_ASSERT(current_search == nullptr, "there is another search on this thread");
  for (size_t i = 0; i < parameters.size(); ++i) {
    const auto& shard = parameters[i];
    if (!is_finite(shard.parameter.detach())) {
      find(Kind::kParameter, static_cast<int64_t>(i), "parameter " + shard.name);
    }
  }
  std::map<std::shared_ptr<BeforeUse>, std::string> modules;
  for (const auto& shard : parameters) {
    if (!shard.before_use) continue;
    const auto name = module_of(shard.name);
    const auto [entry, is_new] = modules.try_emplace(shard.before_use, name);
    if (!is_new) entry->second = common_module(entry->second, name);
  }
  for (const auto& [before_use, name] : modules) {
    before_uses_.emplace(before_use, *before_use);
    *before_use = [this, name = name, before = *before_use] {
      module_ = name;
      if (before) before();
    };
  }
  current_search = this;
  callback_ = at::addThreadLocalCallback(
      at::RecordFunctionCallback(begin_operator, end_operator).needsOutputs(true).scopes({at::RecordScope::FUNCTION}));
}

NotFiniteSearch::~NotFiniteSearch() {
  at::removeCallback(callback_);
  current_search = nullptr;
  for (auto& [before_use, before] : before_uses_) *before_use = before;
}

void NotFiniteSearch::find(Kind kind, int64_t place, const std::string& text) {
  if (kind_ != Kind::kNothing && kind_ <= kind) return;
  kind_ = kind;
  place_ = place;
  text_ = text;
  found_in_ = micro_batch_;
}

void NotFiniteSearch::begin_forward(int64_t micro_batch) {
  micro_batch_ = micro_batch;
  module_.clear();
  in_forward_ = true;
}

void NotFiniteSearch::end_forward(const at::Tensor& losses) {
  in_forward_ = false;
  if (!is_finite(losses)) find(Kind::kLoss, 0, fmt::format("the loss of micro-batch {}", micro_batch_));
}

void NotFiniteSearch::look_at_gradients(const std::vector<ParameterShard>& parameters) {
  for (size_t i = 0; i < parameters.size(); ++i) {
    const auto& gradient = parameters[i].parameter.grad();
    if (is_finite(gradient)) continue;
    find(Kind::kGradient, static_cast<int64_t>(i),
         fmt::format("the gradient of {}, in the backward pass of micro-batch {}", parameters[i].name, micro_batch_));
    return;
  }
}

std::unique_ptr<at::ObserverContext> NotFiniteSearch::begin_operator(const at::RecordFunction& /*function*/) {
  return nullptr;
}

void NotFiniteSearch::end_operator(const at::RecordFunction& function, at::ObserverContext* /*context*/) {
  auto* search = current_search;
  if (search == nullptr || !search->in_forward_ || search->kind_ <= Kind::kOperator) return;
  ++search->num_operators_;
  const at::DisableRecordFunctionGuard not_itself;
  const at::NoGradGuard no_grad;
  const auto& outputs = function.outputs();
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!outputs[i].isTensor()) continue;
    const auto& output = outputs[i].toTensor();
    const bool has_values =
        output.defined() && output.has_storage() && output.is_floating_point() && output.numel() > 0;
    if (!has_values || !computes(function, i) || !has_nan_or_infinity(output)) continue;
    search->find(Kind::kOperator, search->num_operators_,
                 fmt::format("the output of {}, [{}], {}in the forward pass of micro-batch {}", function.name(),
                             fmt::join(output.sizes(), ", "),
                             search->module_.empty() ? "" : fmt::format("in or after {}, ", search->module_),
                             search->micro_batch_));
    return;
  }
}

std::string NotFiniteSearch::agreed(const std::function<std::vector<std::string>(int64_t)>& names,
                                    const parallel::GroupPtr& world) const {
  const auto own = at::tensor({static_cast<int64_t>(kind_), found_in_, place_}, at::kLong);
  const auto all = parallel::all_gather(own.unsqueeze(0), world);
  using Place = std::tuple<int64_t, int64_t, int64_t, int>;
  Place first{static_cast<int64_t>(Kind::kNothing), 0, 0, 0};
  for (int rank = 0; rank < world->getSize(); ++rank) {
    const auto* numbers = all[rank].const_data_ptr<int64_t>();
    first = std::min(first, Place{numbers[0], numbers[1], numbers[2], rank});
  }
  const auto kind = static_cast<Kind>(std::get<0>(first));
  const int rank = std::get<3>(first);
  if (kind == Kind::kNothing) return "what each rank computes is finite, the sums over the ranks aren't";
  auto text = fmt::format("the first thing that isn't is {} (rank {} of {})", text_, rank, world->getSize());
  if (names && kind != Kind::kParameter) {
    text += fmt::format("; the samples of this micro-batch: {}", listed(names(found_in_)));
  }
  return parallel::broadcast_text(text, rank, world);
}

}  // namespace megatron_cpp::internal
