#include "step37/program/captioner.h"

#include <ATen/ATen.h>

#include <limits>
#include <utility>

#include "parallel/collectives.h"

namespace megatron_cpp::step37 {
namespace {

/// `tokens` as a batch of one sequence, padded; the padding is a sub-sequence of its own.
Step37Batch one_sequence(const std::vector<int64_t>& tokens, int64_t pad_to, int64_t pad_id) {
  const auto length = static_cast<int64_t>(tokens.size());
  const int64_t S = (length + pad_to - 1) / pad_to * pad_to;
  Step37Batch batch;
  batch.input_ids = at::full({1, S}, pad_id, at::kLong);
  batch.input_ids.narrow(1, 0, length).copy_(at::tensor(at::ArrayRef<int64_t>(tokens), at::kLong).unsqueeze(0));
  batch.attention.position_ids =
      at::cat({at::arange(length, at::kLong), at::arange(S - length, at::kLong)}).unsqueeze(0);
  std::vector<int32_t> ends{0, static_cast<int32_t>(length)};
  if (S > length) ends.push_back(static_cast<int32_t>(S));
  batch.attention.cu_seqlens = at::tensor(at::ArrayRef<int32_t>(ends), at::kInt);
  return batch;
}

/// Runs the tower on the views of the picture, on the rank that holds them.
std::vector<ImageForInsert> features_of(Step37Model& model, const PictureReference& picture,
                                        const CaptionerOptions& options, const parallel::GroupPtr& tp,
                                        const at::Device& device) {
  const CaptionPack pack{{}, {picture}};
  PictureFaults unheard;
  auto images = load_pictures(pack, options.format, options.folder, tp->getRank(), tp->getSize(),
                              options.faults != nullptr ? *options.faults : unheard);
  images = to_model_batch(pack, std::move(images), device).images;
  for (auto& group : images) {
    group.image_features = model->vision_model->forward(group.images);
    group.images.reset();
  }
  return images;
}

}  // namespace

std::string caption_picture(Step37Model& model, const Tokenizer& tokenizer, const PictureReference& picture,
                            const std::vector<int64_t>& prompt, const CaptionerOptions& options,
                            const parallel::GroupPtr& tp, const at::Device& device) {
  const at::NoGradGuard no_grad;
  const auto images = features_of(model, picture, options, tp, device);
  auto tokens = prompt_tokens(picture, options.format);
  auto caption = prompt;
  // Tokens that no caption has; a second <im_start> would require a second picture.
  const auto& ids = options.format.picture_ids;
  const auto not_text = at::tensor({ids.im_start, ids.im_patch, ids.im_end, ids.patch_start, ids.patch_end,
                                    ids.patch_newline, options.format.begin_id, options.pad_id},
                                   at::TensorOptions(at::kLong).device(device));
  tokens.insert(tokens.end(), prompt.begin(), prompt.end());
  for (int64_t i = 0; i < options.max_new_tokens; ++i) {
    auto batch = one_sequence(tokens, options.pad_to, options.pad_id);
    batch.images = images;
    const auto logits = model->forward(batch).select(0, static_cast<int64_t>(tokens.size()) - 1);
    const auto next = parallel::all_gather_last_dim(logits, tp)
                          .narrow(-1, 0, model->config().text.vocabulary_size)
                          .index_fill(-1, not_text, -std::numeric_limits<double>::infinity())
                          .argmax(-1)
                          .item<int64_t>();
    if (next == options.format.end_id) break;
    tokens.push_back(next);
    caption.push_back(next);
  }
  return tokenizer.decode(caption);
}

}  // namespace megatron_cpp::step37
