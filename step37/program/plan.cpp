#include "step37/program/plan.h"

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>

#include "step37/program/start_run.h"

namespace megatron_cpp::step37 {
namespace {

using Kind = parallel::CollectiveKind;
constexpr double kGiga = 1e9;

double gigabytes(int64_t bytes) { return static_cast<double>(bytes) / kGiga; }

bool fits(const Plan& plan, const PlanArguments& arguments) {
  return arguments.memory <= 0.0 || static_cast<double>(plan.memory.total()) <= arguments.memory * kGiga;
}

/// A shortest sample: begin token, <im_start>, the picture's rows, <im_end>, a caption of one token.
int64_t images_that_fit(const RunConfig& config) {
  return config.training.sequence_length / (crop_options(config).global_tokens() + 4);
}

ElementBytes element_bytes(const TrainingSection& training) {
  const auto size = [](at::ScalarType dtype) { return static_cast<int64_t>(c10::elementSize(dtype)); };
  const bool is_float = training.precision == at::kFloat;
  return {.parameter = size(training.precision),
          .gradient = size(training.main_gradients),
          .main = is_float ? 0 : size(at::kFloat),
          .exp_avg = size(training.exp_avg),
          .exp_avg_sq = size(training.exp_avg_sq)};
}

std::string layout_text(const Plan& plan) {
  return fmt::format("{}, {} sequence parallelism", plan.grid.text(), plan.sequence_parallel ? "with" : "without");
}

/// Lines of a plan's table.
class Table {
 public:
  Table(const Plan& plan, const PlanArguments& arguments) : plan_(plan), arguments_(arguments) {}

  std::string text() {
    const auto& shape = plan_.shape;
    line("{} ranks: {}", plan_.grid.world_size(), layout_text(plan_));
    line("a step: global batch {}, packs of {} positions with {} pictures each, micro-batch {}, {} replicas{}\n",
         shape.global_batch_size, shape.sequence_length, shape.images_per_pack, shape.micro_batch_size, plan_.grid.dp,
         loss_text(plan_.loss_chunk));
    add_parameters();
    add_memory();
    add_traffic();
    line("\nFLOPs of a step: {:.4g}, of them {:.4g} on each rank", static_cast<double>(plan_.flops),
         static_cast<double>(plan_.flops) / plan_.grid.world_size());
    return std::move(text_);
  }

 private:
  template <class... Values>
  void line(fmt::format_string<Values...> format, Values&&... values) {
    fmt::format_to(std::back_inserter(text_), format, std::forward<Values>(values)...);
    text_ += '\n';
  }

  void add_parameters() {
    line("{:<34}{:>20}{:>20}", "parameters", "whole model", "a rank");
    for (const auto part : kModelParts) {
      std::vector<TensorGroup> own;
      bool frozen = true;
      for (const auto& tensor : plan_.tensors) {
        if (tensor.part != part) continue;
        own.push_back(tensor);
        frozen = frozen && !tensor.trained;
      }
      if (own.empty()) continue;
      line("  {:<32}{:>20}{:>20}", fmt::format("{}{}", part, frozen ? " (frozen)" : ""), whole_elements(own),
           local_elements(own));
    }
    line("  {:<32}{:>20}{:>20}\n", "total", whole_elements(plan_.tensors), local_elements(plan_.tensors));
  }

  void add_memory() {
    const auto& memory = plan_.memory;
    const auto row = [&](const std::string& name, int64_t bytes) {
      line("  {:<68}{:>11.3f} GB", name, gigabytes(bytes));
    };
    const auto& each = plan_.shape.element_bytes;
    line("memory of a rank");
    row(fmt::format("weights, {} bytes a parameter", each.parameter), memory.weights);
    row(fmt::format("gradients, {} bytes a trained parameter", each.gradient), memory.gradients);
    row(fmt::format("{}AdamW's moments, {} bytes a trained parameter{}", each.main > 0 ? "main and " : "",
                    each.main + each.exp_avg + each.exp_avg_sq,
                    plan_.shape.distributed_optimizer ? " of the rank's" : ""),
        memory.optimizer);
    row("activations of a micro-batch, kept for backward", memory.activations);
    row("buffers at the peak of a step", memory.buffers);
    row("total", memory.total());
    line("");
  }

  void add_traffic() {
    const double intra = arguments_.intra_node_gbps * kGiga / 8;
    const double inter = arguments_.inter_node_gbps * kGiga / 8;
    int64_t of_experts = 0;
    line("{:<34}{:>20}", "sent by a rank in a step", "GB");
    for (const auto& traffic : plan_.traffic) {
      const auto name = fmt::format("{} over {}{}", parallel::collective_name(traffic.kind), traffic.group,
                                    traffic.of_experts ? ", experts" : "");
      line("  {:<32}{:>20.6f}", name, gigabytes(traffic.bytes));
      if (traffic.of_experts && traffic.kind == Kind::kAllToAll) of_experts += traffic.bytes;
    }
    if (of_experts > 0) {
      const auto bytes = static_cast<double>(of_experts);
      line("  the experts' all-to-all takes {:.4g} s inside a node ({:g} Gbit/s), {:.4g} s across nodes ({:g} Gbit/s)",
           bytes / intra, arguments_.intra_node_gbps, bytes / inter, arguments_.inter_node_gbps);
    }
    line("  all of it, one after the other, on nodes of {} ranks: {:.4g} s", arguments_.ranks_per_node,
         communication_seconds(plan_, arguments_));
  }

  const Plan& plan_;
  const PlanArguments& arguments_;
  std::string text_;
};

std::string json_text(const Plan& plan, const PlanArguments& arguments) {
  nlohmann::ordered_json bytes = nlohmann::ordered_json::object();
  for (int kind = 0; kind < parallel::kNumCollectiveKinds; ++kind) {
    const int64_t sent = plan.bytes_of(static_cast<Kind>(kind));
    if (sent > 0) bytes[std::string(parallel::collective_name(static_cast<Kind>(kind)))] = sent;
  }
  const auto& memory = plan.memory;
  nlohmann::ordered_json json{{"ranks", plan.grid.world_size()},
                              {"parameters", whole_elements(plan.tensors)},
                              {"memory_bytes",
                               {{"weights", memory.weights},
                                {"gradients", memory.gradients},
                                {"optimizer", memory.optimizer},
                                {"activations", memory.activations},
                                {"buffers", memory.buffers},
                                {"total", memory.total()}}},
                              {"bytes_per_step", bytes},
                              {"flops_per_step", plan.flops},
                              {"fits", nullptr}};
  if (arguments.memory > 0.0) json["fits"] = fits(plan, arguments);
  return json.dump();
}

std::string layouts_text(const std::vector<Plan>& layouts, const PlanArguments& arguments) {
  const auto& best = layouts.front();
  if (!fits(best, arguments)) {
    const auto over = best.memory.total() - static_cast<int64_t>(arguments.memory * kGiga);
    return fmt::format(
        "no layout fits: a rank of the smallest one, {}, needs {:.3f} GB, {} bytes more than the {:g} GB given\n\n",
        layout_text(best), gigabytes(best.memory.total()), over, arguments.memory);
  }
  auto text = fmt::format("the best layouts of {} GPUs, by seconds of communication in a step, then by memory\n",
                          arguments.gpus);
  for (const auto& layout : layouts) {
    text += fmt::format("  {:<70}{:>10.4g} s{:>11.3f} GB a rank\n", layout_text(layout),
                        communication_seconds(layout, arguments), gigabytes(layout.memory.total()));
  }
  return text + "\nThe first of them:\n";
}

}  // namespace

int64_t Plan::bytes_of(Kind kind) const {
  int64_t bytes = 0;
  for (const auto& sent : traffic) bytes += sent.kind == kind ? sent.bytes : 0;
  return bytes;
}

int ranks_of(const RunConfig& config) {
  double ranks = 1.0;
  for (const int64_t size : {config.parallel.tp, config.parallel.cp, config.parallel.dp, config.parallel.pp}) {
    ranks *= static_cast<double>(std::max<int64_t>(size, 1));
  }
  TORCH_CHECK_VALUE(ranks <= std::numeric_limits<int32_t>::max(), "parallel.tp ", config.parallel.tp, " x parallel.cp ",
                    config.parallel.cp, " x parallel.dp ", config.parallel.dp, " x parallel.pp ", config.parallel.pp,
                    " are too many ranks");
  return static_cast<int>(ranks);
}

Plan make_plan(const RunConfig& config, int num_ranks, std::optional<int64_t> images_per_pack) {
  validate(config, num_ranks);
  const int64_t most = images_that_fit(config);
  const int64_t images = images_per_pack.value_or(most);
  TORCH_CHECK_VALUE(images >= 0 && images <= most, "--images-per-pack ", images, " is not in [0, ", most,
                    "]: as many fit into training.sequence_length ", config.training.sequence_length);
  const auto model = model_config(config, config.data.vocabulary_size);
  Plan plan;
  plan.grid = rank_grid(config, num_ranks);
  plan.sequence_parallel = config.parallel.sequence_parallel;
  plan.loss_chunk = model.execution.loss_chunk;
  plan.shape = {.sequence_length = config.training.sequence_length,
                .micro_batch_size = config.training.micro_batch_size,
                .global_batch_size = config.training.global_batch_size,
                .images_per_pack = images,
                .runs_tower = config.data.features.empty(),
                .element_bytes = element_bytes(config.training),
                .distributed_optimizer = config.training.distributed_optimizer,
                .bucket_elements = config.training.bucket_elements};
  plan.tensors = tensors_of(model, plan.grid);
  plan.memory = step_memory(model, plan.grid, plan.shape, plan.tensors);
  plan.traffic = step_traffic(model, plan.grid, plan.shape, plan.tensors);
  plan.flops = step_flops(model, plan.grid, plan.shape);
  return plan;
}

double communication_seconds(const Plan& plan, const PlanArguments& arguments) {
  double seconds = 0.0;
  for (const auto& traffic : plan.traffic) {
    const int64_t span = extent_of(traffic.group, plan.grid).span;
    const bool in_node = span <= arguments.ranks_per_node && arguments.ranks_per_node % span == 0;
    const double gbps = in_node ? arguments.intra_node_gbps : arguments.inter_node_gbps;
    seconds += static_cast<double>(traffic.bytes) * 8 / (gbps * kGiga);
  }
  return seconds;
}

std::vector<Plan> best_layouts(const RunConfig& config, const PlanArguments& arguments) {
  const bool has_experts = model_config(config, config.data.vocabulary_size).text.moe.has_value();
  std::vector<Plan> plans;
  std::string reason;
  const auto try_layout = [&](int tp, int ep, int etp) {
    auto layout = config;
    layout.parallel.tp = tp;
    layout.parallel.dp = arguments.gpus / tp;
    layout.parallel.ep = ep;
    layout.parallel.etp = etp;
    layout.parallel.sequence_parallel = true;
    try {
      plans.push_back(make_plan(layout, arguments.gpus, arguments.images_per_pack));
    } catch (const c10::ValueError& error) {
      reason = fmt::format("tp {}, ep {}, etp {}: {}", tp, ep, etp, error.what_without_backtrace());
    }
  };
  for (int tp = 1; tp <= arguments.gpus; ++tp) {
    if (arguments.gpus % tp != 0) continue;
    for (int ep = 1; ep <= (has_experts ? arguments.gpus : 1); ++ep) {
      if (arguments.gpus % ep != 0) continue;
      for (int etp = 1; etp <= (has_experts ? arguments.gpus / ep : 1); ++etp) {
        if (arguments.gpus / ep % etp == 0) try_layout(tp, ep, etp);
      }
    }
  }
  TORCH_CHECK_VALUE(!plans.empty(), "no layout of ", arguments.gpus,
                    " GPUs divides model and batch; the last one tried, ", reason);
  const auto memory = [](const Plan& plan) { return plan.memory.total(); };
  const auto smallest = *std::ranges::min_element(plans, {}, memory);
  std::erase_if(plans, [&](const Plan& plan) { return !fits(plan, arguments); });
  if (plans.empty()) return {smallest};
  std::ranges::stable_sort(plans, {}, [&](const Plan& plan) {
    return std::pair(communication_seconds(plan, arguments), plan.memory.total());
  });
  plans.resize(std::min<size_t>(plans.size(), 3));
  return plans;
}

int plan(const PlanArguments& arguments) {
  const auto config = read_run_config(arguments.config, arguments.overrides, /*warns=*/true);
  std::string text;
  Plan chosen;
  if (arguments.gpus > 0) {
    const auto layouts = best_layouts(config, arguments);
    text = layouts_text(layouts, arguments);
    chosen = layouts.front();
  } else {
    chosen = make_plan(config, arguments.ranks > 0 ? arguments.ranks : ranks_of(config), arguments.images_per_pack);
  }
  text += Table(chosen, arguments).text();
  if (arguments.memory > 0.0) {
    text += fmt::format("{} into {:g} GB\n", fits(chosen, arguments) ? "fits" : "does not fit", arguments.memory);
  }
  std::puts((text + json_text(chosen, arguments)).c_str());
  return 0;
}

}  // namespace megatron_cpp::step37
