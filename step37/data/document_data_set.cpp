#include "step37/data/document_data_set.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>

#include "step37/data/chat_sample.h"
#include "step37/data/json_lines.h"
#include "step37/data/utf8.h"

namespace megatron_cpp::step37 {

DocumentDataSet::DocumentDataSet(const std::filesystem::path& prefix, int64_t max_tokens)
    : documents_(prefix), max_tokens_(max_tokens), first_samples_{0} {
  TORCH_CHECK_VALUE(max_tokens >= 2, "parts of documents of ", max_tokens, " ids: at least 2 are needed");
  for (int64_t i = 0; i < documents_.num_documents(); ++i) {
    const auto length = documents_.length(i);
    if (length < 2) {
      left_out_.add(fmt::format("{} document {}: it has {} ids", printable(documents_.prefix().string()), i, length));
      continue;
    }
    numbers_.push_back(i);
    first_samples_.push_back(first_samples_.back() + (length - 2) / (max_tokens - 1) + 1);
  }
  TORCH_CHECK_VALUE(!numbers_.empty(), printable(documents_.prefix().string()), " has no document of two ids or more");
}

size_t DocumentDataSet::entry_of(int64_t index) const {
  TORCH_CHECK_VALUE(index >= 0 && index < num_samples(), "sample ", index, " of ", num_samples());
  const auto behind = std::upper_bound(first_samples_.begin(), first_samples_.end(), index);
  return static_cast<size_t>(behind - first_samples_.begin()) - 1;
}

std::string DocumentDataSet::name(int64_t index) const {
  const auto entry = entry_of(index);
  const auto parts = first_samples_[entry + 1] - first_samples_[entry];
  const auto document = fmt::format("{} document {}", printable(documents_.prefix().string()), numbers_[entry]);
  if (parts == 1) return document;
  return fmt::format("{}, part {} of {}", document, index - first_samples_[entry] + 1, parts);
}

std::vector<std::string> DocumentDataSet::texts(int64_t /*index*/) const { return {}; }

PictureSample DocumentDataSet::sample(int64_t index, const SampleFormat& format) const {
  const auto entry = entry_of(index);
  const auto begin = (index - first_samples_[entry]) * (max_tokens_ - 1);
  const auto end = std::min(begin + max_tokens_, documents_.length(numbers_[entry]));
  const auto tokens = documents_.tokens(numbers_[entry], begin, end);
  if (format.tokenizer != nullptr) {
    const auto vocabulary = format.tokenizer->vocab_size();
    for (const int64_t id : tokens) {
      TORCH_CHECK_VALUE(id >= 0 && id < vocabulary, name(index), ": id ", id, " isn't in the vocabulary of ",
                        vocabulary);
    }
  }
  PictureSample sample;
  sample.tokens = tokens;
  sample.loss_mask.assign(tokens.size(), 1);
  sample.loss_mask.front() = 0;
  return sample;
}

std::vector<std::string> DocumentDataSet::left_out() const {
  return sentences(left_out_, static_cast<int64_t>(numbers_.size()), "documents");
}

}  // namespace megatron_cpp::step37
