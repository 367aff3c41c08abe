// The image insert under another vision-language model: a word embedding with a sharding of its own, borrowed through
// ParallelEmbedding, start tokens and feature width of its own, tiles before pictures.
//
//   cmake -S examples/other_vlm -B build_vlm -DCMAKE_PREFIX_PATH=PREFIX && cmake --build build_vlm
//   mpirun -np 2 --bind-to none build_vlm/other_vlm
//
// prints
//   the embedding conforms
//   inserted 3 tiles and 2 pictures on 2 ranks: embeddings and gradients equal the dense model's
#include <ATen/ATen.h>
#include <torch/nn/modules/embedding.h>

#include <cstdio>

#include "megatron_cpp/conformance/embedding_conformance.h"
#include "parallel/agree.h"
#include "parallel/collectives.h"
#include "parallel/process_groups.h"
#include "parallel/runtime.h"
#include "step37/insert/image_insert_embedding.h"

namespace {

/// Ids dealt out like cards: id v lies in row v / t on rank v % t. Frequent ids, which tokenizers number first, are
/// spread evenly. Each rank's table is an ordinary torch::nn::Embedding.
class DealtEmbedding : public megatron::ParallelEmbedding {
 public:
  DealtEmbedding(const megatron::ParallelEmbeddingOptions& options, const parallel::GroupPtr& group)
      : ParallelEmbedding(options, group), t_(group->getSize()), rank_(group->getRank()) {
    const int64_t rows = (options.vocabulary_size() - rank_ + t_ - 1) / t_;
    table_ = register_module("table", torch::nn::Embedding(rows, options.hidden_size()));
    weight = table_->weight;
  }

  /// Every row of the whole comes from the one rank that has its id: the whole is the sum of the ranks' findings.
  megatron::Part layout() const override { return megatron::Part::kSummand; }

  at::Tensor partial(const at::Tensor& input_ids, const at::Tensor& rows_left_out) override {
    const int64_t B = input_ids.size(0), S = input_ids.size(1), V = options().vocabulary_size();
    const auto ids = input_ids.t().reshape({-1});  // [S*B]: the id of flat row s*B + b
    const auto wrong = ids.lt(0).logical_or(ids.ge(V)).nonzero();
    TORCH_CHECK_VALUE(wrong.numel() == 0, "id ", ids[wrong[0].item<int64_t>()].item<int64_t>(), " is not in [0, ", V,
                      ")");
    auto own = ids.remainder(t_).eq(rank_);
    if (rows_left_out.defined() && rows_left_out.numel() > 0) {
      const auto last = rows_left_out.max().item<int64_t>();
      TORCH_CHECK_VALUE(last < S * B, "row ", last, " to leave out is not one of ", S * B);
      own.index_fill_(0, rows_left_out, false);
    }
    const auto rows = own.nonzero().squeeze(1);
    const auto found = table_->forward(ids.index_select(0, rows).div(t_, "floor"));
    return at::zeros({S * B, hidden_size()}, found.options()).index_copy(0, rows, found).view({S, B, hidden_size()});
  }

  std::vector<int64_t> finders(const at::Tensor& input_ids) const override {
    const auto ranks = input_ids.t().remainder(t_).contiguous();
    return {ranks.const_data_ptr<int64_t>(), ranks.const_data_ptr<int64_t>() + ranks.numel()};
  }

  /// Row i of the rank's table is row i*t + rank of the whole.
  std::vector<megatron::ParameterShard> own_parameters() const override {
    megatron::ParameterShard shard{.name = "table.weight",
                                   .parameter = weight,
                                   .domain = megatron::GradientDomain::kSharded,
                                   .initial_value = megatron::InitialValue::normal(options().init_std())};
    for (int64_t i = 0; i < weight.size(0); ++i) {
      shard.segments.push_back(megatron::ParameterSegment::rows("weight", {options().vocabulary_size(), hidden_size()},
                                                                0, i * t_ + rank_, i, 1));
    }
    return {shard};
  }

 private:
  int64_t t_, rank_;
  torch::nn::Embedding table_{nullptr};
};

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
  const auto violations = megatron::check_parallel_embedding(
      [](const auto& options, const auto& group) { return std::make_shared<DealtEmbedding>(options, group); }, tp);
  for (const auto& violation : violations) parallel::agree(false, violation, tp);
  if (rank == 0) std::printf("the embedding conforms\n");

  const auto options = megatron::ParallelEmbeddingOptions(V, H).sequence_parallel(true);
  const auto words = std::make_shared<DealtEmbedding>(options, tp);
  step37::ImageInsertEmbedding insert(megatron::LanguageModelEmbedding(words),
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
