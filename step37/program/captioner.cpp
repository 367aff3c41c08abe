#include "step37/program/captioner.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <random>
#include <utility>

#include "megatron_cpp/tensor_parallel/to_device.h"
#include "parallel/collectives.h"
#include "step37/data/picture_pack.h"

namespace megatron_cpp::step37 {
namespace {

/// `tokens` from position `begin` on as a batch of one sequence, padded; the padding is a sub-sequence of its own.
Step37Batch one_sequence(const std::vector<int64_t>& tokens, int64_t begin, const CaptionerOptions& options) {
  const auto length = static_cast<int64_t>(tokens.size()) - begin;
  const int64_t S = (length + options.pad_to - 1) / options.pad_to * options.pad_to;
  Step37Batch batch;
  batch.input_ids = at::full({1, S}, options.pad_id, at::kLong);
  batch.input_ids.narrow(1, 0, length)
      .copy_(at::tensor(at::ArrayRef<int64_t>(tokens).slice(static_cast<size_t>(begin)), at::kLong));
  batch.attention.position_ids =
      at::cat({at::arange(begin, begin + length, at::kLong), at::arange(S - length, at::kLong)}).unsqueeze(0);
  std::vector<int32_t> ends{0, static_cast<int32_t>(length)};
  if (S > length) ends.push_back(static_cast<int32_t>(S));
  batch.attention.cu_seqlens = at::tensor(at::ArrayRef<int32_t>(ends), at::kInt);
  return batch;
}

/// The views of the pictures, on the ranks that run the tower on them.
std::vector<ImageForInsert> images_of(const std::vector<PictureReference>& pictures, const CaptionerOptions& options,
                                      MmEncoderTpMode mode, const parallel::GroupPtr& tp, const at::Device& device) {
  PictureFaults unheard;
  auto images =
      load_pictures(pictures, options.format, mode, tp, options.faults != nullptr ? *options.faults : unheard);
  return to_model_batch({}, std::move(images), device).images;
}

}  // namespace

std::vector<int64_t> caption_ids(Step37Model& model, std::vector<int64_t> tokens,
                                 const std::vector<PictureReference>& pictures, const CaptionerOptions& options,
                                 const parallel::GroupPtr& tp, const at::Device& device) {
  const at::NoGradGuard no_grad;
  auto& language_model = *model->language_model;
  const auto caption_begin = static_cast<std::ptrdiff_t>(tokens.size());
  const auto not_text =
      megatron_cpp::internal::to_device(at::tensor(at::ArrayRef<int64_t>(options.not_text), at::kLong), device);
  std::mt19937_64 random(options.sampling.seed);
  KeyValueCache cache;
  at::Tensor embeddings;  // of the positions that the decoder runs over
  for (int64_t i = 0; i < options.max_new_tokens; ++i) {
    const int64_t begin = i == 0 ? 0 : static_cast<int64_t>(tokens.size()) - 1;
    auto batch = one_sequence(tokens, begin, options);
    if (i == 0) batch.images = images_of(pictures, options, model->config().mm_encoder_tp_mode, tp, device);
    const auto fresh = model->embed(batch);
    if (i == 0 || options.cache) {
      embeddings = fresh;
    } else {
      embeddings = at::cat({embeddings, fresh});
      batch.attention = one_sequence(tokens, 0, options).attention;
    }
    auto hidden = language_model.decoder->forward(embeddings, batch.attention, options.cache ? &cache : nullptr);
    int64_t last = static_cast<int64_t>(tokens.size()) - (options.cache ? begin : 0) - 1;
    if (!model->config().execution.sequence_parallel) {  // else ranks have other rows each
      hidden = hidden.narrow(0, last, 1);
      last = 0;
    }
    const auto logits = parallel::all_gather_last_dim(language_model.output_layer->forward(hidden).select(0, last), tp)
                            .narrow(-1, 0, model->config().text.vocabulary_size)
                            .index_fill(-1, not_text, -std::numeric_limits<double>::infinity());
    // Rank 0 chooses for all: hosts may round probabilities differently.
    const auto chosen = tp->getRank() == 0 ? choose_token(logits.squeeze(0), options.sampling, random) : 0;
    const auto next =
        parallel::broadcast(at::full({1}, chosen, logits.options().dtype(at::kLong)), 0, tp).item<int64_t>();
    if (std::find(options.end_ids.begin(), options.end_ids.end(), next) != options.end_ids.end()) break;
    tokens.push_back(next);
  }
  return {tokens.begin() + caption_begin, tokens.end()};
}

}  // namespace megatron_cpp::step37
