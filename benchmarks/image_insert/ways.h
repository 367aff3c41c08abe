// The ways to embed text with images that the benchmark compares.
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
  int64_t images_per_pack = 8;   ///< per 2048 tokens: images of 169 rows
  int64_t patches_per_pack = 4;  ///< and patches of 81
  int64_t scale = 1;             ///< what hidden and channels were divided by
};

/// Images of one start token, all of the same size.
struct ImageGroup {
  int64_t start_token;
  int64_t num_images;
  int64_t rows;  ///< of each
};

/// One batch, equal on every rank.
struct Batch {
  at::Tensor ids;                            ///< [1, S]
  std::vector<ImageGroup> groups;            ///< patches before images
  std::vector<at::Tensor> frozen_features;   ///< [N, L, C] of each group
  std::vector<at::Tensor> trained_features;  ///< the same values, with a gradient
  at::Tensor gradient;                       ///< [S, 1, H], of the output
};

/// <patch_start> and <im_start> with their rows, spread over the sequence as the tokenizer lays them out; other ids are
/// random words. Ids are on the CPU, everything else on `device`.
Batch make_batch(const Sizes& sizes, at::ScalarType dtype, at::Device device = at::kCPU);

/// One forward and backward pass of one way. Gradients of parameters are kept and added into, as between micro-batches.
/// Column and row sharding get the features of all images on every rank (row: its channels), the replicated one those
/// of the images that its rank holds, as a vision tower leaves them that is spread over the ranks by images.
struct Way {
  std::string name;
  std::string projector_sharding;  ///< "" where there is no projector
  bool features_trained = false;
  std::vector<at::Tensor> features;  ///< leaves; their gradients would go on into the tower
  std::function<void()> step;
};

/// Ways around one vocabulary-parallel embedding: text_only, projector_gemm, fused_vocab, all_gather and public.
/// @param all_shardings  fused_vocab and all_gather with each; otherwise with the ones that a user would choose.
std::vector<Way> vocab_ways(const Sizes& sizes, const Batch& batch, bool all_shardings, const parallel::GroupPtr& tp);

/// Ways around a hidden-parallel one: fused_hidden.
std::vector<Way> hidden_ways(const Sizes& sizes, const Batch& batch, bool all_shardings, const parallel::GroupPtr& tp);

}  // namespace megatron_cpp::benchmark_image_insert
