// A LibTorch program with its own model, loop and optimizer: tensor- and sequence-parallel in pairs of ranks,
// data-parallel beyond. Parameters are bfloat16; the program keeps float32 copies of them and of their gradients, and
// all-reduces the gradients itself. The task: name what is in a (made-up) picture, which replaces placeholder tokens.
//
//   cmake -S examples/own_optimizer -B build_own -DCMAKE_PREFIX_PATH=PREFIX && cmake --build build_own
//   mpirun -np 2 --bind-to none build_own/own_optimizer
//   torchrun --no-python --nproc-per-node 2 build_own/own_optimizer
//
// prints the loss of every tenth step, the same up to bfloat16 at every number of ranks, and at the end
//   learned: loss 3.91 -> 0.00
#include <ATen/ATen.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adamw.h>

#include <cmath>
#include <cstdio>

#include "megatron_cpp/parallel/collectives.h"
#include "megatron_cpp/parallel/environment_groups.h"
#include "megatron_cpp/parallel/errors.h"
#include "megatron_cpp/parallel/runtime.h"
#include "megatron_cpp/step37/insert/image_insert_embedding.h"
#include "megatron_cpp/tensor_parallel/column_parallel_linear.h"
#include "megatron_cpp/tensor_parallel/row_parallel_linear.h"
#include "megatron_cpp/tensor_parallel/vocab_parallel_cross_entropy.h"

namespace parallel = megatron_cpp::parallel;
namespace step37 = megatron_cpp::step37;

namespace {

constexpr int64_t V = 50, H = 32, C = 16;  // vocabulary, hidden size, channels of the tower's features
constexpr int64_t kImageRow = 41, kImageEnd = 42, kEnd = 43, kNumWords = 8, kIgnored = -100;
constexpr int64_t S = 8, kBatch = 16, kImageRows = 4;     // 4 x <image_row>, <image_end>, word, 2 x <end>
constexpr double kFirstLoss = 3.913, kTenthLoss = 1.116;  // at every number of ranks, up to bfloat16

class ModelImpl : public megatron_cpp::ParallelModule {
 public:
  explicit ModelImpl(const parallel::GroupPtr& tp) {
    const auto column = [](int64_t n) {
      return megatron_cpp::ColumnParallelLinearOptions(H, n).sequence_parallel(true);
    };
    const auto row = megatron_cpp::RowParallelLinearOptions(4 * H, H).sequence_parallel(true).init_std(0.2);
    const auto words = megatron_cpp::ParallelEmbeddingOptions(V, H).sequence_parallel(true);
    const auto insertion =
        step37::ImageInsertEmbeddingOptions(H, H).projector_sharding(step37::ProjectorSharding::kNone);
    embedding = register_module("embedding", megatron_cpp::LanguageModelEmbedding(words, tp));
    projector = register_module("projector", torch::nn::Linear(torch::nn::LinearOptions(C, H).bias(false)));
    insert = register_module("insert", step37::ImageInsertEmbedding(embedding, insertion));
    norm = register_parameter("norm", at::ones({H}));
    up = register_module("up", megatron_cpp::ColumnParallelLinear(column(4 * H).init_std(0.2), tp));
    down = register_module("down", megatron_cpp::RowParallelLinear(row, tp));
    head = register_module("head", megatron_cpp::ColumnParallelLinear(column(V).pad_out_features(true), tp));
  }

  /// ids [B, S], features [B, kImageRows, C] -> this rank's logits of every position, [S, B, V/t].
  at::Tensor forward(const at::Tensor& ids, const at::Tensor& features) {
    const int64_t B = ids.size(0);
    const auto plan = step37::InsertPlan::from_placeholders({ids.const_data_ptr<int64_t>(), static_cast<size_t>(B * S)},
                                                            B, S, kImageRow, std::vector<int64_t>(B, kImageRows));
    const step37::ImageForInsert images{.image_features = projector->forward(features)};
    const auto x = insert->forward(ids, {images}, plan);          // [S/t, B, H]
    const auto hidden = up->forward(at::rms_norm(x, {H}, norm));  // [S, B, 4H/t]
    const auto mean = hidden.cumsum(0) / at::arange(1, S + 1).view({S, 1, 1}).to(hidden);
    return head->forward(x + down->forward(at::gelu(mean)));
  }

  /// Replicated, but the norm runs on this rank's positions and the projector on its pictures: gradients are partial.
  std::vector<megatron_cpp::ParameterShard> own_parameters() const override {
    const auto partial = megatron_cpp::GradientDomain::kReplicatedPartial;
    return {megatron_cpp::replicated_parameter("norm", norm, partial, megatron_cpp::InitialValue::constant(1), false),
            megatron_cpp::replicated_parameter("projector.weight", projector->weight, partial,
                                               megatron_cpp::InitialValue::normal(0.2), true)};
  }

 private:
  megatron_cpp::LanguageModelEmbedding embedding{nullptr};
  torch::nn::Linear projector{nullptr};
  step37::ImageInsertEmbedding insert{nullptr};
  at::Tensor norm;
  megatron_cpp::ColumnParallelLinear up{nullptr}, head{nullptr};
  megatron_cpp::RowParallelLinear down{nullptr};
};
TORCH_MODULE(Model);

int train(const parallel::ProcessGroups& groups) {
  Model model(groups.tp);
  const auto parameters = megatron_cpp::parameter_shards(*model);
  megatron_cpp::initialize_parameters(parameters, /*seed=*/1);
  std::vector<at::Tensor> main_parameters, sum_over_tp;  // float32, with float32 gradients
  for (const auto& shard : parameters) {
    auto main = shard.parameter.detach().clone();
    main.mutable_grad() = at::zeros_like(main);
    main_parameters.push_back(main);
    if (shard.domain.summed_over == "tp_dp") sum_over_tp.push_back(main);
  }
  model->to(at::kBFloat16);
  torch::optim::AdamW optimizer(main_parameters, torch::optim::AdamWOptions(0.005).weight_decay(0.01));

  const int64_t dp = groups.dp->getSize(), dp_rank = groups.dp->getRank();
  const auto patterns = at::randn({kNumWords, kImageRows, C}, at::detail::createCPUGenerator(7));
  double first = 0, tenth = 0, loss = 0;
  for (int64_t step = 0; step <= 60; ++step) {
    at::manual_seed(step);
    const auto words = at::randint(kNumWords, {kBatch}, at::kLong);
    const auto pictures = patterns.index_select(0, words) + 0.3 * at::randn({kBatch, kImageRows, C});
    auto ids =
        at::tensor({kImageRow, kImageRow, kImageRow, kImageRow, kImageEnd, kEnd, kEnd, kEnd}).repeat({kBatch, 1});
    ids.select(1, kImageRows + 1).copy_(words);
    auto targets = at::full({kBatch, S}, kIgnored, at::kLong);
    targets.slice(1, kImageRows, kImageRows + 2).copy_(ids.slice(1, kImageRows + 1, kImageRows + 3));

    auto loss_sum = at::zeros({1});
    for (int64_t micro_batch = 0; micro_batch < 2; ++micro_batch) {  // two micro-batches per replica
      const auto own = [&](const at::Tensor& whole) { return whole.chunk(2 * dp)[2 * dp_rank + micro_batch]; };
      const auto logits = model->forward(own(ids), own(pictures).to(at::kBFloat16)).to(at::kFloat);
      const auto losses = megatron_cpp::vocab_parallel_cross_entropy(logits, own(targets).t().contiguous(),
                                                                     {.vocabulary_size = V}, groups.tp);
      const auto part = losses.sum() / (2 * kBatch);  // two positions of each text have a target
      part.backward();
      loss_sum += part.detach();
      for (size_t i = 0; i < parameters.size(); ++i) {
        main_parameters[i].mutable_grad() += parameters[i].parameter.grad();
      }
      model->zero_grad();
    }
    for (auto& main : sum_over_tp) parallel::all_reduce_in_place(main.mutable_grad(), groups.tp);
    for (auto& main : main_parameters) parallel::all_reduce_in_place(main.mutable_grad(), groups.dp);
    optimizer.step();
    optimizer.zero_grad(/*set_to_none=*/false);
    const at::NoGradGuard no_grad;
    for (size_t i = 0; i < parameters.size(); ++i) parameters[i].parameter.copy_(main_parameters[i]);

    loss = parallel::all_reduce(loss_sum, groups.dp).item<double>();
    if (step == 0) first = loss;
    if (step == 10) tenth = loss;
    if (groups.world->getRank() == 0 && step % 10 == 0) std::printf("step %2ld  loss %.4f\n", step, loss);
  }
  TORCH_CHECK(std::abs(first - kFirstLoss) < 0.01 && std::abs(tenth - kTenthLoss) < 0.01 && loss < 0.05,
              "the loss went from ", first, " by ", tenth, " to ", loss);
  if (groups.world->getRank() == 0) std::printf("learned: loss %.2f -> %.2f\n", first, loss);
  return 0;
}

parallel::RankGrid grid_of(int ranks) {
  const int t = ranks % 2 == 0 ? 2 : 1;
  return {.tp = t, .dp = ranks / t};
}

}  // namespace

int main() {
  if (!parallel::ranks_in_environment()) {
    return parallel::Runtime::run([](parallel::Runtime& runtime) {
      return train(parallel::make_process_groups(runtime, grid_of(runtime.size())));
    });
  }
  try {
    return train(parallel::process_groups_from_environment(grid_of(parallel::world_size_in_environment())));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", parallel::error_text(error).c_str());
    return 1;
  }
}
