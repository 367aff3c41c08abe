#include "megatron_cpp/training/trainer.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <map>
#include <sstream>
#include <string>

#include "megatron_cpp/training/expert_balance.h"
#include "megatron_cpp/training/not_finite_search.h"
#include "megatron_cpp/training/replica_check.h"
#include "megatron_cpp/training/schedule.h"
#include "parallel/agree.h"
#include "parallel/collectives.h"
#include "parallel/host_name.h"
#include "parallel/named_range.h"

namespace megatron_cpp {
namespace {

/// "loss 2, z_loss 0.5 and gradient norm 1".
std::string numbers_text(const StepResult& result) {
  std::string auxiliary;
  for (const auto& [name, value] : result.auxiliary_losses) auxiliary += ", " + name + " " + c10::str(value);
  return c10::str("loss ", result.loss, auxiliary, " and gradient norm ", result.grad_norm);
}

/// What a pass gave on a rank: float64 on the CPU.
struct RankNumbers {
  at::Tensor own;     ///< before anything was reduced
  at::Tensor of_all;  ///< afterwards
};

/// @param is_exact  whether equal passes have equal bits; else only which numbers are finite counts.
bool is_same(const at::Tensor& a, const at::Tensor& b, bool is_exact) {
  return is_exact ? at::allclose(a, b, /*rtol=*/0.0, /*atol=*/0.0, /*equal_nan=*/true)
                  : at::isfinite(a).equal(at::isfinite(b));
}

/// The ranks whose own numbers differ between two passes, with their hosts, and if there are none those that have other
/// sums; "" if nothing differs anywhere. The same on every rank. Collective.
std::string ranks_that_differ(const RankNumbers& first, const RankNumbers& second, bool is_exact,
                              const parallel::GroupPtr& world) {
  const bool own_differ = !is_same(first.own, second.own, is_exact);
  const bool sums_differ = !is_same(first.of_all, second.of_all, is_exact);
  const auto name = c10::str("rank ", world->getRank(), " on ", parallel::host_name());
  const auto own = parallel::gather_texts(own_differ ? name : "", world);
  const auto sums = parallel::gather_texts(sums_differ ? name : "", world);
  std::vector<std::string> names;
  for (const auto* texts : {&own, &sums}) {
    for (const auto& text : *texts) {
      if (!text.empty()) names.push_back(text);
    }
    if (!names.empty()) break;
  }
  return internal::listed(names);
}

}  // namespace

Trainer::Trainer(const std::vector<ParameterShard>& parameters, const parallel::ProcessGroups& groups,
                 const TrainerOptions& options)
    : groups_(groups),
      options_(options),
      parameters_(parameters),
      gradients_(parameters, groups, options.gradients),
      optimizer_(gradients_.slices(options.adamw), options.adamw),
      spikes_(options.loss_spike) {
  options_.learning_rate.validate();
  TORCH_CHECK_VALUE(options_.clip_grad_norm >= 0, "clip_grad_norm ", options_.clip_grad_norm, " is below 0");
  TORCH_CHECK_VALUE(options_.max_skipped_steps >= 0, "max_skipped_steps ", options_.max_skipped_steps, " is below 0");
  TORCH_CHECK_VALUE(options_.check_replicas >= 0, "check_replicas ", options_.check_replicas, " is below 0");
}

Trainer::Pass Trainer::run_pass(const Batch& batch, internal::NotFiniteSearch* search) {
  const auto& names = options_.auxiliary_losses;
  const auto& balance = options_.expert_balance;
  const auto num_loss_tokens = static_cast<double>(batch.num_loss_tokens);
  gradients_.zero();
  if (balance) balance->zero();
  // Also on a rank without a micro-batch.
  auto losses = at::zeros({1 + static_cast<int64_t>(names.size())},
                          gradients_.parameters().front().parameter.options().dtype(at::kDouble).requires_grad(false));
  std::map<int64_t, at::Tensor> means;  // of micro-batches between their forward and backward pass
  for (const auto& [kind, micro_batch] : one_after_the_other(batch.num_micro_batches)) {
    if (kind == Action::Kind::kForward) {
      const parallel::NamedRange range("forward");
      if (search != nullptr) search->begin_forward(micro_batch);
      const auto sums = batch.loss_sum(micro_batch);
      TORCH_CHECK_VALUE(sums.auxiliary.size() == names.size(), "a micro-batch has ", sums.auxiliary.size(),
                        " auxiliary losses, and ", names.size(), " have names");
      auto mean = sums.tokens / num_loss_tokens;
      std::vector<at::Tensor> parts{mean.detach().reshape({})};
      for (const auto& auxiliary : sums.auxiliary) {
        parts.push_back((auxiliary.detach() / num_loss_tokens).reshape({}));
        mean = mean + auxiliary / num_loss_tokens;
      }
      losses.add_(at::stack(parts));
      means[micro_batch] = mean;
      if (search != nullptr) search->end_forward(losses);
    } else {
      const parallel::NamedRange range("backward");
      const bool is_last = micro_batch == batch.num_micro_batches - 1;
      if (is_last && search == nullptr) gradients_.reduce_in_backward();
      means.extract(micro_batch).mapped().backward();
      if (search != nullptr) search->look_at_gradients(gradients_.parameters());
    }
  }
  parallel::in_range("gradient reduction", [&] { gradients_.reduce(); });
  gradients_.finish_gather();  // of modules that no micro-batch has used
  const parallel::NamedRange range("losses and norm");
  // The only wait for the device in a step; the work up to the norm is queued before it.
  const auto all_losses = parallel::all_reduce(losses, groups_.dp);
  // A loss that isn't finite on one rank, and its copies are, makes the norm so on all.
  std::vector<at::Tensor> parts{all_losses, gradients_.squared_norm(all_losses.sum(0, /*keepdim=*/true).mul(0.0))};
  if (balance) parts.push_back(balance->reduce());
  const auto numbers = at::cat(parts).cpu();
  const double squared_norm = numbers.const_data_ptr<double>()[1 + names.size()];
  return {losses, numbers, std::isfinite(squared_norm)};
}

StepResult Trainer::result_of(const Pass& pass, int64_t step_number) const {
  const auto* number = pass.numbers.const_data_ptr<double>();
  StepResult result;
  result.loss = *number++;
  for (const auto& name : options_.auxiliary_losses) result.auxiliary_losses.emplace_back(name, *number++);
  result.grad_norm = std::sqrt(*number++);
  if (options_.expert_balance) {
    for (const auto& name : ExpertBalance::metric_names()) result.metrics.emplace_back(name, *number++);
  }
  result.learning_rate = options_.learning_rate.at(step_number);
  return result;
}

at::Tensor Trainer::own_numbers(const Pass& pass) const {
  return at::cat({pass.own_losses, gradients_.squares_before_reduction()}).cpu();
}

Trainer::Pass Trainer::repeat(const Batch& batch, const Pass& first) {
  const int64_t step_number = optimizer_.num_steps() + 1;
  const bool is_exact = first.own_losses.device().is_cpu();
  const auto text = numbers_text(result_of(first, step_number));
  const auto first_own = own_numbers(first);
  auto second = run_pass(batch, nullptr);
  const auto second_own = own_numbers(second);
  auto suspects =
      ranks_that_differ({first_own, first.numbers}, {second_own, second.numbers}, is_exact, groups_.of("world"));
  auto again = second;
  std::string finding;
  if (!second.is_finite && suspects.empty()) {
    internal::NotFiniteSearch search(parameters_);
    again = run_pass(batch, &search);
    suspects = ranks_that_differ({second_own, second.numbers}, {own_numbers(again), again.numbers}, is_exact,
                                 groups_.of("world"));
    if (suspects.empty()) finding = search.agreed(batch.sample_names, groups_.of("world"));
  }
  const bool is_first = groups_.world->getRank() == 0;
  if (!suspects.empty()) {
    const auto repeated = numbers_text(result_of(again, step_number));
    const auto message =
        c10::str("step ", step_number, ": ", text,
                 " are not all finite, and repeated with the same "
                 "batch they are ",
                 repeated, ": the numbers of ", suspects, " changed, which points to a fault of that machine");
    if (!again.is_finite) throw parallel::AgreedError(message, parallel::kSuspectedHostStatus);
    ++step_counts_.repeated;
    if (is_first) {
      TORCH_WARN(message, "; going on with these");
    }
    return again;
  }
  const auto message =
      c10::str("step ", step_number, ": ", text,
               " are not all finite, the same ones when repeated: data or model are the reason; ", finding);
  if (options_.not_finite == NotFiniteAction::kStop) throw parallel::AgreedError(message, parallel::kNotFiniteStatus);
  if (skipped_in_a_row_ == options_.max_skipped_steps) {
    throw parallel::AgreedError(c10::str(message, "; ", skipped_in_a_row_, " steps in a row were skipped before it"),
                                parallel::kNotFiniteStatus);
  }
  if (is_first) {
    TORCH_WARN(message, "; the batch is left out");
  }
  return again;
}

void Trainer::warn_of_spike(const std::string& what, const Batch& batch) const {
  std::string own;
  for (int64_t i = 0; batch.sample_names && i < batch.num_micro_batches; ++i) {
    for (const auto& name : batch.sample_names(i)) own += name + "\n";
  }
  std::vector<std::string> names;
  for (const auto& lines : parallel::gather_texts(own, groups_.dp)) {
    std::istringstream stream(lines);
    for (std::string name; std::getline(stream, name);) names.push_back(name);
  }
  if (groups_.dp->getRank() > 0 || groups_.tp->getRank() > 0) return;
  TORCH_WARN("step ", optimizer_.num_steps() + 1, ": ", what, "; the samples of this step: ", internal::listed(names));
}

StepResult Trainer::step(const std::function<LossSum(int64_t)>& loss_sum, int64_t num_micro_batches,
                         int64_t num_loss_tokens, const SampleNames& sample_names) {
  TORCH_CHECK_VALUE(num_loss_tokens > 0, "the global batch has no loss token");
  const int64_t step_number = optimizer_.num_steps() + 1;
  const Batch batch{loss_sum, num_micro_batches, num_loss_tokens, sample_names};
  auto pass = run_pass(batch, nullptr);
  if (!pass.is_finite) pass = repeat(batch, pass);
  const auto result = result_of(pass, step_number);
  if (pass.is_finite) {
    skipped_in_a_row_ = 0;
    // All replicas have the same bits, which one all-reduce has given them.
    if (const auto spike = spikes_.add(result.loss)) warn_of_spike(*spike, batch);
    if (options_.clip_grad_norm > 0 && result.grad_norm > options_.clip_grad_norm) {
      const parallel::NamedRange range("clipping");
      gradients_.scale(options_.clip_grad_norm / result.grad_norm);
    }
    if (options_.before_update) options_.before_update();
    const parallel::NamedRange range("optimizer");
    optimizer_.step(result.learning_rate);
    gradients_.gather_parameters();
    if (options_.expert_balance) options_.expert_balance->update_biases();
  } else {
    ++skipped_in_a_row_;
    ++step_counts_.skipped;
    optimizer_.set_num_steps(step_number);
  }
  if (options_.check_replicas > 0 && step_number % options_.check_replicas == 0) {
    gradients_.finish_gather();
    check_replicas(parameters_, groups_, c10::str("after step ", step_number));
  }
  return result;
}

void Trainer::write_parameters() {
  optimizer_.write_parameters();
  gradients_.gather_parameters();
}

}  // namespace megatron_cpp
