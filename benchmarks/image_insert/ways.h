// The implementations ("ways") of the image insert that the benchmark compares.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "megatron_cpp/tensor_parallel/language_model_embedding.h"
#include "parallel/recording_backend.h"
#include "step37/insert/image_insert_embedding.h"

namespace megatron_cpp::benchmark_image_insert {

/// Sizes of the released model, and the images of a training pack.
struct Sizes {
  int64_t sequence = 2048;  ///< S; B = 1
  int64_t hidden = 4096;
  int64_t channels = 6144;
  int64_t vocabulary = 128815;
  int64_t images_per_pack = 8;   ///< images of 169 rows, per 2048 tokens
  int64_t patches_per_pack = 4;  ///< patches of 81 rows, per 2048 tokens
  int64_t scale = 1;             ///< divisor that was applied to hidden and channels
};

/// Images of one start token, all of the same size.
struct ImageGroup {
  int64_t start_token;
  int64_t num_images;
  int64_t rows;  ///< per image
};

/// One batch, equal on every rank.
struct Batch {
  at::Tensor ids;                            ///< [1, S]
  std::vector<ImageGroup> groups;            ///< patches before images
  std::vector<at::Tensor> frozen_features;   ///< per group: [N, L, C]
  std::vector<at::Tensor> trained_features;  ///< the same values, with requires_grad
  at::Tensor gradient;                       ///< [S, 1, H], of the output
};

/// <patch_start> and <im_start> with their rows, spread over the sequence as in training data; other ids are random
/// words. Ids are on the CPU, everything else on `device`.
Batch make_batch(const Sizes& sizes, at::ScalarType dtype, at::Device device = at::kCPU);

/// One forward and backward pass of one way. Gradients of parameters accumulate, as between micro-batches. With column
/// and row sharding every rank gets the features of all images (row: its channels of them), with a replicated projector
/// those of the images that it holds, as if the images had been split over the ranks for the vision tower.
struct Way {
  std::string name;
  std::string projector_sharding;  ///< "" if there is no projector
  bool features_trained = false;
  std::vector<at::Tensor> features;  ///< leaves; in training, their gradients would go to the tower
  std::function<void()> step;
};

/// Ways with a vocabulary-parallel embedding: text_only, projector_gemm, fused_vocab, all_gather and public.
/// @param all_shardings  whether fused_vocab and all_gather come with every sharding, or only with the usual ones.
std::vector<Way> vocab_ways(const Sizes& sizes, const Batch& batch, bool all_shardings, const parallel::GroupPtr& tp);

/// Ways with a hidden-parallel embedding: fused_hidden.
std::vector<Way> hidden_ways(const Sizes& sizes, const Batch& batch, bool all_shardings, const parallel::GroupPtr& tp);

}  // namespace megatron_cpp::benchmark_image_insert
