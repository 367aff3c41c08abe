// The image insert in another vision-language model, with its own sharding of the word embedding (a class derived from
// ParallelEmbedding), its own start tokens and feature width, and tiles before pictures.
//
//   cmake -S examples/other_vlm -B build_vlm -DCMAKE_PREFIX_PATH=PREFIX && cmake --build build_vlm
//   mpirun -np 2 --bind-to none build_vlm/other_vlm
//
// prints
//   the embedding conforms
//   inserted 3 tiles and 2 pictures on 2 ranks: embeddings and gradients equal the dense model's
#include <ATen/ATen.h>

#include <cstdio>

#include "megatron_cpp/parallel/agree.h"
#include "megatron_cpp/parallel/collectives.h"
#include "megatron_cpp/parallel/process_groups.h"
#include "megatron_cpp/parallel/runtime.h"
#include "megatron_cpp/step37/insert/image_insert_embedding.h"
#include "megatron_cpp/testing/check_parallel_embedding.h"
#include "round_robin_embedding.h"

namespace parallel = megatron_cpp::parallel;
namespace step37 = megatron_cpp::step37;

namespace {

constexpr int64_t V = 101, H = 24, C = 20, B = 2, S = 16;
constexpr int64_t kTileStart = 3, kPictureStart = 5;

/// [B, S]: a tile and a picture in the first text, two tiles and a picture in the second.
at::Tensor make_ids() {
  auto ids = at::randint(10, V, {B, S}, at::kLong);
  ids[0][1] = ids[1][0] = ids[1][4] = kTileStart;
  ids[0][6] = ids[1][9] = kPictureStart;
  return ids;
}

int run(parallel::Runtime& runtime) {
  const int t = runtime.size(), rank = runtime.rank();
  const auto tp = parallel::make_process_groups(runtime, {.tp = t}).tp;
  const auto violations = megatron_cpp::check_parallel_embedding(
      [](const auto& options, const auto& group) { return std::make_shared<RoundRobinEmbedding>(options, group); }, tp);
  for (const auto& violation : violations) parallel::agree(false, violation, tp);
  if (rank == 0) std::printf("the embedding conforms\n");

  const auto options = megatron_cpp::ParallelEmbeddingOptions(V, H).sequence_parallel(true);
  const auto words = std::make_shared<RoundRobinEmbedding>(options, tp);
  step37::ImageInsertEmbedding insert(megatron_cpp::LanguageModelEmbedding(words),
                                      step37::ImageInsertEmbeddingOptions(C, H).projector_bias(true));

  at::manual_seed(1);  // the same on every rank: ids, features and the dense model
  const auto table = at::randn({V, H}).set_requires_grad(true);
  const auto projector = at::randn({H, C}).set_requires_grad(true);
  const auto bias = at::randn({H}).set_requires_grad(true);
  const auto ids = make_ids();
  const auto tiles = at::randn({3, 2, C}), pictures = at::randn({2, 4, C});
  auto parts = insert->named_parameters();
  {
    const at::NoGradGuard no_grad;
    words->weight.copy_(table.slice(0, rank, V, t));
    parts["align_projector.weight"].copy_(projector.chunk(t)[rank]);
    parts["align_projector.bias"].copy_(bias.chunk(t)[rank]);
  }

  const auto embeddings = insert->forward(ids, {{.insert_start_token = kTileStart, .image_features = tiles},
                                                {.insert_start_token = kPictureStart, .image_features = pictures}});
  embeddings.square().sum().backward();

  auto dense = at::embedding(table, ids.t());  // [S, B, H]
  const auto project = [&](const at::Tensor& features) { return at::linear(features, projector, bias); };
  dense = step37::ImageInsertEmbedding::Impl::insert_features(dense, project(tiles), ids, kTileStart);
  dense = step37::ImageInsertEmbedding::Impl::insert_features(dense, project(pictures), ids, kPictureStart);
  dense.square().sum().backward();

  const auto equal = [&](const at::Tensor& own, const at::Tensor& expected, const char* what) {
    parallel::agree(at::allclose(own, expected, 1e-4, 1e-5), std::string(what) + " differ from the dense model's", tp);
  };
  equal(embeddings, dense.chunk(t)[rank], "the embeddings");
  equal(words->weight.grad(), table.grad().slice(0, rank, V, t), "the word embedding's gradients");
  equal(parts["align_projector.weight"].grad(), projector.grad().chunk(t)[rank], "the projector's gradients");
  equal(parts["align_projector.bias"].grad(), bias.grad().chunk(t)[rank], "the bias's gradients");
  if (rank == 0) {
    std::printf("inserted 3 tiles and 2 pictures on %d ranks: embeddings and gradients equal the dense model's\n", t);
  }
  return 0;
}

}  // namespace

int main() { return parallel::Runtime::run(run); }
