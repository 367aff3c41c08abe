#include "benchmarks/image_insert/ways.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <random>
#include <utility>

#include "megatron_cpp/tensor_parallel/linear_function.h"
#include "parallel/mappings.h"
#include "parallel/shard.h"

namespace megatron_cpp::benchmark_image_insert {
namespace {

using step37::ImageForInsert;
using step37::ImageInsertEmbedding;
using step37::ImageInsertEmbeddingOptions;
using step37::InsertExchange;
using step37::ProjectorSharding;

constexpr int64_t kImageStart = 128000;
constexpr int64_t kPatchStart = 128002;
constexpr int64_t kImageRows = 169;
constexpr int64_t kPatchRows = 81;

/// Cheap values of about the size of real ones; what they are doesn't matter to the time.
at::Tensor values(at::IntArrayRef shape, const at::TensorOptions& options, double scale) {
  // A ramp that repeats, written once and expanded: a tensor of float32 numbers may not fit beside one of bfloat16.
  const auto ramp = at::arange(-125.0, 126.0, options.dtype(at::kFloat)).mul_(scale / 125.0).to(options);
  auto result = at::empty(shape, options);
  const auto flat = result.view(-1);
  const int64_t whole = flat.numel() / ramp.numel();
  flat.narrow(0, 0, whole * ramp.numel()).view({whole, ramp.numel()}).copy_(ramp.expand({whole, ramp.numel()}));
  flat.narrow(0, whole * ramp.numel(), flat.numel() - whole * ramp.numel())
      .copy_(ramp.narrow(0, 0, flat.numel() - whole * ramp.numel()));
  return result;
}

void fill(const torch::nn::Module& module) {
  const at::NoGradGuard no_grad;
  for (auto& parameter : module.parameters()) {
    parameter.copy_(values(parameter.sizes(), parameter.options().requires_grad(false), 0.02));
    parameter.mutable_grad() = at::zeros_like(parameter);
  }
}

/// `whole` [S, 1, H]'s rows of this rank.
at::Tensor own_rows(const at::Tensor& whole, const parallel::GroupPtr& tp) {
  const auto own = parallel::even_shard(whole.size(0), tp->getSize(), tp->getRank(), "sequence length");
  return whole.narrow(0, own.begin, own.length());
}

void backward(const at::Tensor& output, const at::Tensor& gradient) { torch::autograd::backward({output}, {gradient}); }

const std::vector<at::Tensor>& features_of(const Batch& batch, bool trained) {
  return trained ? batch.trained_features : batch.frozen_features;
}

/// Dtype and device of the batch's floating-point tensors, and so of the layers around it.
at::TensorOptions options_of(const Batch& batch) { return batch.frozen_features.front().options(); }

/// `layer` as the batch is.
template <class Layer>
void move_to(const Batch& batch, Layer& layer) {
  layer->to(options_of(batch).device(), options_of(batch).dtype().toScalarType());
}

/// The batch's images with the features of each group, of all its images.
std::vector<ImageForInsert> images_of(const Batch& batch, const std::vector<at::Tensor>& features) {
  std::vector<ImageForInsert> images(batch.groups.size());
  for (size_t group = 0; group < images.size(); ++group) {
    images[group].insert_start_token = batch.groups[group].start_token;
    images[group].image_features = features[group];
  }
  return images;
}

/// The images that this rank holds when all are spread by rows.
std::vector<ImageForInsert> own_images_of(const Batch& batch, bool trained, const parallel::GroupPtr& tp) {
  std::vector<int64_t> rows;
  for (const auto& group : batch.groups) rows.insert(rows.end(), static_cast<size_t>(group.num_images), group.rows);
  const auto holders = parallel::balanced_assignment(rows, tp->getSize());
  auto images = images_of(batch, batch.frozen_features);
  auto holder = holders.begin();
  for (size_t g = 0; g < images.size(); ++g) {
    const auto& group = batch.groups[g];
    std::vector<int64_t> own;
    for (int64_t image = 0; image < group.num_images; ++image, ++holder) {
      if (*holder == tp->getRank()) own.push_back(image);
    }
    images[g].held = step37::HeldImages{at::full({group.num_images}, group.rows, at::kLong), {}};
    const auto own_indices = at::tensor(own, at::kLong).to(options_of(batch).device());
    images[g].image_features = batch.frozen_features[g].index_select(0, own_indices).set_requires_grad(trained);
  }
  return images;
}

std::string name_of(ProjectorSharding sharding) {
  switch (sharding) {
    case ProjectorSharding::kColumn:
      return "column";
    case ProjectorSharding::kRow:
      return "row";
    case ProjectorSharding::kReplicated:
      return "replicated";
    case ProjectorSharding::kNone:
      return "none";
  }
  return "";
}

/// Our module on `embedding`.
void add_insert_ways(std::vector<Way>& ways, const std::string& name, const Sizes& sizes, const Batch& batch,
                     const LanguageModelEmbedding& embedding, ProjectorSharding sharding, InsertExchange exchange) {
  const auto& tp = embedding->tp();
  ImageInsertEmbedding insert(embedding, ImageInsertEmbeddingOptions(sizes.channels, sizes.hidden)
                                             .projector_sharding(sharding)
                                             .exchange(exchange)
                                             .accumulate_into_grad(true)
                                             .checked(false));
  move_to(batch, insert);
  fill(*insert);
  for (const bool trained : {false, true}) {
    auto images = images_of(batch, features_of(batch, trained));
    if (sharding == ProjectorSharding::kReplicated) images = own_images_of(batch, trained, tp);
    std::vector<at::Tensor> leaves;
    for (auto& group : images) {
      auto& features = std::get<at::Tensor>(*group.image_features);
      if (sharding == ProjectorSharding::kRow) {  // produced by channel
        const auto own = parallel::even_shard(sizes.channels, tp->getSize(), tp->getRank(), "channels");
        features = features.detach().narrow(2, own.begin, own.length()).contiguous().set_requires_grad(trained);
      }
      leaves.push_back(features);
    }
    const auto plan = insert->make_plan(batch.ids, images);
    const auto gradient = own_rows(batch.gradient, tp);
    ways.push_back({name, name_of(sharding), trained, leaves,
                    [=]() mutable { backward(insert->forward(batch.ids, images, plan), gradient); }});
  }
}

/// The matrix products alone of 1/t of the projector: what no sharding can do without.
void add_gemm_ways(std::vector<Way>& ways, const Sizes& sizes, const Batch& batch, const parallel::GroupPtr& tp) {
  const auto options = options_of(batch);
  const int64_t width = sizes.hidden / tp->getSize();
  const auto weight = values({width, sizes.channels}, options, 0.02).set_requires_grad(true);
  weight.mutable_grad() = at::zeros_like(weight);
  for (const bool trained : {false, true}) {
    const auto& leaves = features_of(batch, trained);
    int64_t num_rows = 0;
    for (const auto& group : batch.groups) num_rows += group.num_images * group.rows;
    const auto gradient = values({num_rows, width}, options, 1e-3);
    ways.push_back({"projector_gemm", "column", trained, leaves, [=] {
                      int64_t begin = 0;
                      for (const auto& features : leaves) {
                        const auto projected = megatron_cpp::internal::linear_with_communication(
                            features.view({-1, features.size(2)}), weight, {},
                            megatron_cpp::internal::LinearInput::kOwn,
                            /*accumulate_into_grad=*/true, tp);
                        backward(projected, gradient.narrow(0, begin, projected.size(0)));
                        begin += projected.size(0);
                      }
                    }});
  }
}

/// The published way (Megatron-Bridge's ImageInsertEmbedding on Megatron-Core's embedding, under sequence parallelism):
/// the whole embedding on every rank, a replicated projector over all rows, a clone per group, an assignment per image,
/// and the rank's rows cut out at the end.
class PublicWay {
 public:
  PublicWay(const Sizes& sizes, const LanguageModelEmbedding& shared)
      : embedding_(ParallelEmbeddingOptions(sizes.vocabulary, sizes.hidden).accumulate_into_grad(true), shared->tp()) {
    const auto& words = shared->word_embeddings->weight;
    embedding_->word_embeddings->weight.set_data(words.detach());
    embedding_->word_embeddings->weight.mutable_grad() = words.grad();
    weight_ =
        values({sizes.hidden, sizes.channels}, words.options().requires_grad(false), 0.02).set_requires_grad(true);
    weight_.mutable_grad() = at::zeros_like(weight_);
  }

  at::Tensor forward(const at::Tensor& ids, const std::vector<ImageForInsert>& images) {
    auto embeddings = embedding_->forward(ids);
    for (const auto& group : images) {
      const auto projected = megatron_cpp::internal::linear_with_communication(
          std::get<at::Tensor>(*group.image_features), weight_, {}, megatron_cpp::internal::LinearInput::kOwn,
          /*accumulate_into_grad=*/true, embedding_->tp());
      embeddings = insert(embeddings, projected, ids, group.insert_start_token);
    }
    return parallel::scatter_to_sequence_parallel_region(embeddings, embedding_->tp());
  }

 private:
  static at::Tensor insert(const at::Tensor& embeddings, const at::Tensor& projected, const at::Tensor& ids,
                           int64_t token) {
    auto result = embeddings.clone();
    const auto places = ids.eq(token).nonzero();
    for (int64_t image = 0; image < projected.size(0); ++image) {
      const auto batch = places[image][0].item<int64_t>();
      const auto begin = places[image][1].item<int64_t>() + 1;
      result.select(1, batch).narrow(0, begin, projected.size(1)).copy_(projected[image]);
    }
    return result;
  }

  LanguageModelEmbedding embedding_;
  at::Tensor weight_;
};

}  // namespace

Batch make_batch(const Sizes& sizes, at::ScalarType dtype, at::Device device) {
  const auto options = at::TensorOptions(dtype).device(device);
  Batch batch;
  std::mt19937_64 random(1);
  std::vector<int64_t> ids(static_cast<size_t>(sizes.sequence));
  for (auto& id : ids) id = static_cast<int64_t>(random() % 100000);
  const int64_t packs = sizes.sequence / 2048;
  for (int64_t pack = 0; pack < packs; ++pack) {
    int64_t position = pack * 2048 + 5;
    const auto place = [&](int64_t token, int64_t rows) {
      ids[static_cast<size_t>(position)] = token;
      position += rows + 10;  // the end token and some words
    };
    for (int64_t i = 0; i < sizes.patches_per_pack; ++i) place(kPatchStart, kPatchRows);
    for (int64_t i = 0; i < sizes.images_per_pack; ++i) place(kImageStart, kImageRows);
  }
  batch.ids = at::tensor(ids, at::kLong).view({1, sizes.sequence});
  batch.groups = {{kPatchStart, sizes.patches_per_pack * packs, kPatchRows},
                  {kImageStart, sizes.images_per_pack * packs, kImageRows}};
  for (const auto& group : batch.groups) {
    const auto features = values({group.num_images, group.rows, sizes.channels}, options, 1.0);
    batch.frozen_features.push_back(features);
    batch.trained_features.push_back(features.detach().set_requires_grad(true));
  }
  batch.gradient = values({sizes.sequence, 1, sizes.hidden}, options, 1e-3);
  return batch;
}

std::vector<Way> vocab_ways(const Sizes& sizes, const Batch& batch, bool all_shardings, const parallel::GroupPtr& tp) {
  LanguageModelEmbedding embedding(
      ParallelEmbeddingOptions(sizes.vocabulary, sizes.hidden).sequence_parallel(true).accumulate_into_grad(true), tp);
  move_to(batch, embedding);
  fill(*embedding);
  std::vector<Way> ways;
  const auto gradient = own_rows(batch.gradient, tp);
  ways.push_back({"text_only", "", false, {}, [=]() mutable { backward(embedding->forward(batch.ids), gradient); }});
  add_gemm_ways(ways, sizes, batch, tp);
  auto shardings = std::vector{ProjectorSharding::kColumn, ProjectorSharding::kReplicated};
  if (all_shardings) shardings.push_back(ProjectorSharding::kRow);
  for (const auto sharding : shardings) {
    add_insert_ways(ways, "fused_vocab", sizes, batch, embedding, sharding, InsertExchange::kFused);
  }
  if (!all_shardings) shardings.resize(1);
  for (const auto sharding : shardings) {
    add_insert_ways(ways, "all_gather", sizes, batch, embedding, sharding, InsertExchange::kAllGather);
  }
  const auto published = std::make_shared<PublicWay>(sizes, embedding);
  for (const bool trained : {false, true}) {
    const auto& leaves = features_of(batch, trained);
    ways.push_back({"public", "replicated", trained, leaves,
                    [=] { backward(published->forward(batch.ids, images_of(batch, leaves)), gradient); }});
  }
  return ways;
}

std::vector<Way> hidden_ways(const Sizes& sizes, const Batch& batch, bool all_shardings, const parallel::GroupPtr& tp) {
  LanguageModelEmbedding embedding(
      ParallelEmbeddingOptions(sizes.vocabulary, sizes.hidden).sequence_parallel(true).accumulate_into_grad(true), tp,
      EmbeddingSharding::kHidden);
  move_to(batch, embedding);
  fill(*embedding);
  std::vector<Way> ways;
  add_insert_ways(ways, "fused_hidden", sizes, batch, embedding, ProjectorSharding::kColumn, InsertExchange::kFused);
  if (all_shardings) {
    add_insert_ways(ways, "fused_hidden", sizes, batch, embedding, ProjectorSharding::kReplicated,
                    InsertExchange::kFused);
  }
  return ways;
}

}  // namespace megatron_cpp::benchmark_image_insert
