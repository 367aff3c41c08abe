// What faults_test starts: training steps of a small Step3.7, in which one rank is killed, stopped or throws as it
// comes to one collective.
//
//   fault_program KIND RANK COLLECTIVE TENSOR_PARALLEL TIMEOUT_MS [words that mark the process]
//
// KIND: none, kill, stop or throw. COLLECTIVE counts those of RANK, over all groups, from the first step on. With none,
// rank RANK prints how many there are.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <signal.h>  // raise

#include <cstdio>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "megatron_cpp/training/trainer.h"
#include "parallel/process_groups.h"
#include "parallel/recording_backend.h"
#include "parallel/runtime.h"
#include "step37/step37_model.h"

namespace megatron_cpp {
namespace {

struct Fault {
  std::string kind;
  int64_t collective = -1;  ///< -1: not on this rank
  int64_t seen = 0;

  /// What is left of this rank goes on to the collective.
  void come() {
    if (seen++ != collective) return;
    if (kind == "kill") raise(SIGKILL);
    if (kind == "stop") raise(SIGSTOP);
    if (kind == "throw") throw std::runtime_error("a fault on purpose");
  }
};

constexpr int64_t V = 96, H = 64, S = 128;  // [S, B, H] takes 32 KiB: large enough to go through shared memory
constexpr int64_t kImageStart = 90;

step37::Step37Config model_config() {
  step37::Step37Config config;
  config.vision = {.image_size = 28, .patch_size = 14, .width = 16, .layers = 1, .heads = 2, .mlp_width = 32};
  config.text.vocabulary_size = V;
  config.text.hidden_size = H;
  config.text.head_dim = 16;
  config.text.num_query_groups = 4;
  config.text.ffn_hidden_size = 64;
  config.execution.sequence_parallel = true;
  config.execution.accumulate_into_grad = true;
  config.text.layers.resize(1);
  config.text.layers[0].num_attention_heads = 4;
  config.checked = true;
  return config;
}

step37::Step37Batch batch(int64_t step) {
  step37::Step37Batch result;
  result.input_ids = (at::arange(S) * 7 + step).remainder(kImageStart).view({1, S});
  result.labels = result.input_ids.roll(-1, 1);
  for (const int64_t position : {3, 60}) result.input_ids[0][position] = kImageStart;
  result.attention.position_ids = at::arange(S).view({1, S});
  step37::ImageForInsert images;
  images.insert_start_token = kImageStart;
  images.images = at::ones({2, 3, 28, 28}).mul_(at::arange(2).view({2, 1, 1, 1}));
  result.images.push_back(std::move(images));
  return result;
}

int body(parallel::Runtime& runtime, const std::vector<std::string>& arguments) {
  TORCH_CHECK_VALUE(arguments.size() >= 6, "usage: see the first lines of tests/faults/fault_program.cpp");
  const int rank = std::stoi(arguments[2]);
  Fault fault{arguments[1], runtime.rank() == rank ? std::stoll(arguments[3]) : -1};
  const int tp = std::stoi(arguments[4]);
  parallel::ProcessGroupsOptions options;
  options.timeout = std::chrono::milliseconds(std::stoll(arguments[5]));
  auto groups = parallel::make_process_groups(runtime, {.tp = tp, .dp = runtime.size() / tp}, options);
  for (auto* group : {&groups.world, &groups.tp, &groups.dp, &groups.tp_dp}) {
    *group = parallel::observe(*group, [&](parallel::CollectiveKind, int64_t) { fault.come(); });
  }

  step37::Step37Model model(model_config(), groups.tp);
  const auto parameters = parameter_shards(*model);
  initialize_parameters(parameters, 1);
  Trainer trainer(parameters, groups, {});
  fault.seen = 0;
  constexpr int64_t kSteps = 2;  // the second finds shared memory and gradients made
  for (int64_t step = 0; step < kSteps; ++step) {
    trainer.step([&](int64_t) { return model->loss_sum(batch(step)); }, 1, S * groups.grid.dp);
  }
  if (runtime.rank() == rank) std::printf("%lld collectives\n", static_cast<long long>(fault.seen));
  return 0;
}

}  // namespace
}  // namespace megatron_cpp

int main(int argc, char** argv) {
  using namespace megatron_cpp;
  const std::vector<std::string> arguments(argv, argv + argc);
  return parallel::Runtime::run([&](parallel::Runtime& runtime) { return body(runtime, arguments); });
}
