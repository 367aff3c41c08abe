#include "megatron_cpp/data/packed_batch.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <limits>

namespace megatron_cpp {
namespace {

at::Tensor row(const std::vector<int64_t>& values) { return at::tensor(values, at::kLong).unsqueeze(0); }

}  // namespace

void PackingOptions::validate() const {
  TORCH_CHECK_VALUE(max_length > 0, "max_length ", max_length, " isn't positive");
  TORCH_CHECK_VALUE(pad_to > 0, "pad_to ", pad_to, " isn't positive");
}

PackedBatch concatenate(const std::vector<PackedBatch>& batches) {
  TORCH_CHECK_VALUE(!batches.empty(), "no sequence to concatenate");
  std::vector<at::Tensor> tokens;
  std::vector<at::Tensor> labels;
  std::vector<at::Tensor> loss_mask;
  std::vector<at::Tensor> position_ids;
  std::vector<at::Tensor> cu_seqlens{at::zeros({1}, at::kInt)};
  std::vector<at::Tensor> padding_mask;
  int64_t begin = 0;
  for (const auto& batch : batches) {
    tokens.push_back(batch.tokens);
    labels.push_back(batch.labels);
    loss_mask.push_back(batch.loss_mask);
    position_ids.push_back(batch.position_ids);
    cu_seqlens.push_back(batch.cu_seqlens.slice(0, 1) + begin);
    padding_mask.push_back(batch.padding_mask);
    begin += batch.tokens.size(1);
    TORCH_CHECK_VALUE(begin <= std::numeric_limits<int32_t>::max(), "sequences of ", begin,
                      " positions together are too long for cu_seqlens in int32");
  }
  return {at::cat(tokens, 1),       at::cat(labels, 1),  at::cat(loss_mask, 1),
          at::cat(position_ids, 1), at::cat(cu_seqlens), at::cat(padding_mask, 1)};
}

SamplePacker::SamplePacker(const PackingOptions& options) : options_(options) { options_.validate(); }

SamplePacker::Result SamplePacker::add(const Sample& sample) {
  TORCH_CHECK_VALUE(sample.tokens.size() >= 2, "a sample of ", sample.tokens.size(), " tokens predicts nothing");
  TORCH_CHECK_VALUE(sample.tokens.size() == sample.loss_mask.size(), "a sample of ", sample.tokens.size(),
                    " tokens has a loss mask of ", sample.loss_mask.size());
  const auto length = static_cast<int64_t>(sample.tokens.size()) - 1;
  const bool is_oversize = length > options_.max_length;
  if (is_oversize && options_.oversize == OversizePolicy::kDrop) return Result::kDropped;
  if (!empty() && num_positions() + length > options_.max_length) return Result::kFull;

  for (size_t i = 0; i + 1 < sample.tokens.size(); ++i) {
    const bool counts = sample.loss_mask[i + 1] != 0;
    tokens_.push_back(sample.tokens[i]);
    labels_.push_back(counts ? sample.tokens[i + 1] : kIgnoreIndex);
    loss_mask_.push_back(counts ? 1 : 0);
    position_ids_.push_back(static_cast<int64_t>(i));
  }
  TORCH_CHECK_VALUE(num_positions() <= std::numeric_limits<int32_t>::max(), "a sample of ", length,
                    " positions is too long for cu_seqlens in int32");
  ends_.push_back(static_cast<int32_t>(num_positions()));
  return Result::kAdded;
}

PackedBatch SamplePacker::finish() {
  TORCH_CHECK_VALUE(!empty(), "no sample was added to the sequence");
  std::vector<int64_t> padding_mask(tokens_.size(), 0);
  const int64_t padding = (options_.pad_to - num_positions() % options_.pad_to) % options_.pad_to;
  const int64_t padded_length = num_positions() + padding;
  TORCH_CHECK_VALUE(padded_length <= std::numeric_limits<int32_t>::max(), "a sequence of ", padded_length,
                    " positions is too long for cu_seqlens in int32");
  std::vector<int32_t> cu_seqlens = {0};
  cu_seqlens.insert(cu_seqlens.end(), ends_.begin(), ends_.end());
  if (padding > 0) cu_seqlens.push_back(static_cast<int32_t>(padded_length));
  for (int64_t i = 0; i < padding; ++i) {
    tokens_.push_back(options_.pad_token);
    labels_.push_back(kIgnoreIndex);
    loss_mask_.push_back(0);
    position_ids_.push_back(i);
    padding_mask.push_back(1);
  }
  PackedBatch batch{
      row(tokens_),     row(labels_), row(loss_mask_), row(position_ids_), at::tensor(cu_seqlens, at::kInt),
      row(padding_mask)};
  *this = SamplePacker(options_);
  return batch;
}

PackedSamples pack(const std::vector<Sample>& samples, const PackingOptions& options) {
  PackedSamples result;
  SamplePacker packer(options);
  std::vector<int64_t> members;
  const auto finish = [&] {
    result.batches.push_back(packer.finish());
    result.samples.push_back(members);
    members.clear();
  };
  for (size_t i = 0; i < samples.size(); ++i) {
    auto added = packer.add(samples[i]);
    if (added == SamplePacker::Result::kFull) {
      finish();
      added = packer.add(samples[i]);
    }
    (added == SamplePacker::Result::kDropped ? result.dropped : members).push_back(static_cast<int64_t>(i));
  }
  if (!packer.empty()) finish();
  return result;
}

}  // namespace megatron_cpp
