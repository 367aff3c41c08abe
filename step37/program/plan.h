// The `plan` command: what a configuration needs, before anything is started.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "parallel/rank_grid.h"
#include "step37/program/run_config.h"
#include "step37/program/step_cost.h"

namespace megatron_cpp::step37 {

struct PlanArguments {
  std::filesystem::path config;
  std::vector<std::string> overrides;
  int ranks = 0;                           ///< 0: as many as the configuration's sizes give
  int gpus = 0;                            ///< above 0: search the layouts of as many ranks
  double memory = 0.0;                     ///< of a rank, in 10^9 bytes; 0: not given
  std::optional<int64_t> images_per_pack;  ///< nullopt: as many as a pack of shortest captions holds
  double intra_node_gbps = 3600.0;         ///< 10^9 bits that a rank sends in a second inside a node: NVLink 4
  double inter_node_gbps = 400.0;          ///< and to another node: one network card a rank
  int ranks_per_node = 8;
};

/// What one layout of a configuration needs.
struct Plan {
  parallel::RankGrid grid;
  bool sequence_parallel = true;
  int64_t loss_chunk = 0;  ///< TransformerExecution::loss_chunk
  StepShape shape;
  std::vector<TensorGroup> tensors;
  MemoryBytes memory;  ///< of a rank
  std::vector<Traffic> traffic;
  int64_t flops = 0;  ///< of a step, all ranks

  int64_t bytes_of(parallel::CollectiveKind kind) const;
};

/// Ranks that the sizes of ParallelSection give: tp * cp * dp * pp, a 0 counted as 1.
int ranks_of(const RunConfig& config);

/// The plan of `config` for `num_ranks` ranks. Not collective; reads no data.
/// @throws c10::ValueError as validate(config, num_ranks) does; for pictures that don't fit into a pack.
Plan make_plan(const RunConfig& config, int num_ranks, std::optional<int64_t> images_per_pack = {});

/// The best layouts of arguments.gpus ranks that the configuration's sizes allow, with sequence parallelism: those that
/// fit into arguments.memory, by the seconds that a rank's collectives take at the given rates, then by memory. If none
/// fits, the one of least memory. At most three.
/// @throws c10::ValueError if no layout divides model and batch, with the reason of the last one.
std::vector<Plan> best_layouts(const RunConfig& config, const PlanArguments& arguments);

/// How long a rank's collectives take one after the other: those of groups within a node at one rate, others at the
/// rate between nodes.
double communication_seconds(const Plan& plan, const PlanArguments& arguments);

/// Prints the table and, as its last line, a JSON object {ranks, parameters, memory_bytes: {weights, gradients,
/// optimizer, activations, buffers, total}, bytes_per_step: {kind: n}, flops_per_step, fits}; fits is null without
/// arguments.memory. Needs neither other ranks nor data.
/// @return  0, also if it doesn't fit.
/// @throws c10::ValueError for what can't be read or doesn't divide.
int plan(const PlanArguments& arguments);

}  // namespace megatron_cpp::step37
