// A custom model around the image insert, trained by the library's training loop: tensor- and sequence-parallel in
// pairs of ranks, data-parallel beyond. The task: name what is in a (made-up) picture.
//
//   cmake -S examples/pretraining_loop -B build_loop -DCMAKE_PREFIX_PATH=PREFIX && cmake --build build_loop
//   mpirun -np 2 --bind-to none build_loop/pretraining_loop
//
// prints the loss of every tenth step, the same at every number of ranks, and at the end
//   learned: loss 3.92 -> 0.00
#include <ATen/ATen.h>

#include <cmath>
#include <cstdio>

#include "megatron_cpp/parallel/process_groups.h"
#include "megatron_cpp/parallel/runtime.h"
#include "megatron_cpp/step37/insert/image_insert_embedding.h"
#include "megatron_cpp/tensor_parallel/column_parallel_linear.h"
#include "megatron_cpp/tensor_parallel/row_parallel_linear.h"
#include "megatron_cpp/tensor_parallel/vocab_parallel_cross_entropy.h"
#include "megatron_cpp/training/trainer.h"
#include "megatron_cpp/training/training_loop.h"

namespace parallel = megatron_cpp::parallel;
namespace step37 = megatron_cpp::step37;

namespace {

constexpr int64_t V = 50, H = 32, C = 16;  // vocabulary, hidden size, channels of the tower's features
constexpr int64_t kImageStart = 40, kImagePatch = 41, kImageEnd = 42, kEnd = 43, kNumWords = 8, kIgnored = -100;
constexpr int64_t S = 8, kBatch = 16, kImageRows = 4;  // <im_start> 4 x <im_patch> <im_end> word <end>
constexpr double kFirstLoss = 3.92265;                 // at every number of ranks

/// A custom decoder: an MLP per position, with a causal mean that lets words see the picture before them.
class DecoderImpl : public megatron_cpp::ParallelModule {
 public:
  explicit DecoderImpl(const parallel::GroupPtr& tp) {
    const auto column = [](int64_t n) {
      return megatron_cpp::ColumnParallelLinearOptions(H, n).sequence_parallel(true);
    };
    const auto row = megatron_cpp::RowParallelLinearOptions(4 * H, H).sequence_parallel(true).init_std(0.2);
    norm = register_parameter("norm", at::ones({H}));
    up = register_module("up", megatron_cpp::ColumnParallelLinear(column(4 * H).init_std(0.2), tp));
    down = register_module("down", megatron_cpp::RowParallelLinear(row, tp));
    head = register_module("head", megatron_cpp::ColumnParallelLinear(column(V).pad_out_features(true), tp));
  }

  /// [S/t, B, H], this rank's positions -> [S, B, V/t], its logits of every position.
  at::Tensor forward(const at::Tensor& x) {
    const auto hidden = up->forward(at::rms_norm(x, {H}, norm));  // [S, B, 4H/t]: here a rank has the whole sequence
    const auto mean = hidden.cumsum(0) / at::arange(1, S + 1).view({S, 1, 1});
    return head->forward(x + down->forward(at::gelu(mean)));
  }

  /// The norm is replicated, but runs on the positions of this rank only: its gradient is partial.
  std::vector<megatron_cpp::ParameterShard> own_parameters() const override {
    return {megatron_cpp::replicated_parameter("norm", norm, megatron_cpp::GradientDomain::kReplicatedPartial,
                                               megatron_cpp::InitialValue::constant(1), /*weight_decay=*/false)};
  }

  at::Tensor norm;
  megatron_cpp::ColumnParallelLinear up{nullptr}, head{nullptr};
  megatron_cpp::RowParallelLinear down{nullptr};
};
TORCH_MODULE(Decoder);

struct Batch {
  at::Tensor ids, targets, features;  // [B, S], [S, B], [B, kImageRows, C]
};

/// This data-parallel rank's part of the batch of a step; a picture is the pattern of its word plus noise.
Batch make_batch(int64_t step, const at::Tensor& patterns, int dp, int dp_rank) {
  at::manual_seed(step);
  const auto words = at::randint(kNumWords, {kBatch}, at::kLong);
  const auto pictures = patterns.index_select(0, words) + 0.3 * at::randn({kBatch, kImageRows, C});
  auto ids = at::tensor({kImageStart, kImagePatch, kImagePatch, kImagePatch, kImagePatch, kImageEnd, kEnd, kEnd});
  ids = ids.repeat({kBatch, 1});
  ids.select(1, S - 2).copy_(words);
  auto targets = at::full({S, kBatch}, kIgnored, at::kLong);
  targets.slice(0, S - 3, S - 1).copy_(ids.slice(1, S - 2).t());  // <im_end> -> word -> <end>
  return {ids.chunk(dp)[dp_rank], targets.chunk(dp, 1)[dp_rank].contiguous(), pictures.chunk(dp)[dp_rank]};
}

int run(parallel::Runtime& runtime) {
  const int t = runtime.size() % 2 == 0 ? 2 : 1;
  const auto groups = parallel::make_process_groups(runtime, {.tp = t, .dp = runtime.size() / t});

  torch::nn::Module model;
  const auto embedding = model.register_module(
      "embedding", megatron_cpp::LanguageModelEmbedding(
                       megatron_cpp::ParallelEmbeddingOptions(V, H).sequence_parallel(true), groups.tp));
  const auto insert = model.register_module("insert", step37::ImageInsertEmbedding(embedding, C, H));
  const auto decoder = model.register_module("decoder", Decoder(groups.tp));

  // Each parameter has a GradientDomain: the ranks over which the trainer sums its gradient, once per step.
  const auto parameters = megatron_cpp::parameter_shards(model);
  megatron_cpp::initialize_parameters(parameters, /*seed=*/1);
  constexpr int64_t kSteps = 61;
  megatron_cpp::TrainerOptions options;
  options.learning_rate = {.peak = 0.01, .floor = 0.01, .warmup_steps = 0, .total_steps = kSteps};
  megatron_cpp::Trainer trainer(parameters, groups, options);

  const auto patterns = at::randn({kNumWords, kImageRows, C}, at::detail::createCPUGenerator(7));
  double first = 0, loss = 0;
  int64_t step = 0;  // of the next batch
  megatron_cpp::TrainingLoopCallbacks callbacks;
  callbacks.next_batch = [&] {
    const auto batch = make_batch(step++, patterns, groups.grid.dp, groups.dp->getRank());
    const auto loss_sum = [=](int64_t /*micro_batch*/) mutable {
      step37::ImageForInsert images{.insert_start_token = kImageStart, .image_features = batch.features};
      const auto logits = decoder->forward(insert->forward(batch.ids, {images}));
      return megatron_cpp::vocab_parallel_cross_entropy(logits, batch.targets, {.vocabulary_size = V}, groups.tp).sum();
    };
    return megatron_cpp::StepBatch{.num_micro_batches = 1, .num_loss_tokens = 2 * kBatch, .loss_sum = loss_sum};
  };
  callbacks.report = [&](const megatron_cpp::StepMetrics& metrics) {
    loss = metrics.result.loss;
    if (metrics.step == 1) first = loss;
    if (runtime.rank() == 0 && metrics.step % 10 == 1) std::printf("step %2ld  loss %.4f\n", metrics.step - 1, loss);
  };
  megatron_cpp::run_training_loop(trainer, {.steps = kSteps}, callbacks);
  TORCH_CHECK(std::abs(first - kFirstLoss) < 1e-3 && loss < 0.05, "the loss went from ", first, " to ", loss);
  if (runtime.rank() == 0) std::printf("learned: loss %.2f -> %.2f\n", first, loss);
  return 0;
}

}  // namespace

int main() { return parallel::Runtime::run(run); }
