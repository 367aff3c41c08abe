// The small Step3.7 whose training steps are timed.
#pragma once

#include <ATen/ATen.h>

#include <CLI/CLI.hpp>
#include <cstdint>

#include "benchmarks/support.h"
#include "step37/step37_model.h"

namespace megatron_cpp::benchmarks {

inline constexpr int64_t kVocabulary = 8192;
inline constexpr int64_t kImageStart = 8000;  ///< larger than the ids of the text

struct SmallStep37 {
  int64_t sequence = 1024;
  int64_t hidden = 512;
  int64_t layers = 4;

  void add_options(CLI::App& app) {
    add_size_option(app, "--sequence", sequence, "tokens of a copy's batch");
    add_size_option(app, "--hidden", hidden, "H");
    add_size_option(app, "--layers", layers, "decoder layers");
  }

  step37::Step37Config config() const {
    step37::Step37Config config;
    config.vision = {.image_size = 112, .patch_size = 14, .width = 64, .layers = 2, .heads = 4, .mlp_width = 256};
    config.text.vocabulary_size = kVocabulary;
    config.text.hidden_size = hidden;
    config.text.head_dim = 64;
    config.text.num_query_groups = 4;
    config.text.ffn_hidden_size = 3 * hidden;
    config.execution.sequence_parallel = true;
    config.execution.accumulate_into_grad = true;
    config.text.layers.resize(static_cast<size_t>(layers));
    for (auto& layer : config.text.layers) layer.num_attention_heads = 8;
    config.checked = false;
    return config;
  }

  /// [1, S], without pictures; every token has a loss.
  step37::Step37Batch text_batch() const {
    step37::Step37Batch batch;
    batch.input_ids = (at::arange(sequence) * 7).remainder(kImageStart).view({1, sequence});
    batch.labels = batch.input_ids.roll(-1, 1);
    batch.attention.position_ids = at::arange(sequence).view({1, sequence});
    return batch;
  }
};

}  // namespace megatron_cpp::benchmarks
