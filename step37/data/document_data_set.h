// Documents of token ids in Megatron's indexed data sets, as a data set.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "megatron_cpp/data/indexed_dataset.h"
#include "step37/data/captioned_pictures.h"
#include "step37/data/data_set.h"

namespace megatron_cpp::step37 {

/// A sample is a document, or a part of one with at most `max_tokens` ids; the last id of a part is the first of the
/// next, so that each id but a document's first is predicted once. The loss counts all but the first id. No begin and
/// end token is added: documents have theirs.
class DocumentDataSet final : public DataSet {
 public:
  /// Documents of fewer than two ids are left out. 16 bytes are kept a document.
  /// @param prefix      as of IndexedDataset
  /// @param max_tokens  a sequence's positions and one more
  /// @throws c10::ValueError as IndexedDataset; if `max_tokens` is below 2; naming the file if no document is left.
  DocumentDataSet(const std::filesystem::path& prefix, int64_t max_tokens);

  int64_t num_samples() const override { return first_samples_.back(); }
  /// "text document 12", and if it has several parts, "text document 12, part 2 of 3"; documents are counted from 0.
  std::string name(int64_t index) const override;
  std::vector<std::string> texts(int64_t index) const override;
  std::vector<PictureReference> pictures(int64_t /*index*/, const SampleFormat& /*format*/) const override {
    return {};
  }
  /// @throws c10::ValueError naming the sample and the id, if the format has a tokenizer and the id isn't in its
  ///         vocabulary.
  PictureSample sample(int64_t index, const SampleFormat& format) const override;
  std::vector<std::string> left_out() const override;

 private:
  size_t entry_of(int64_t index) const;

  IndexedDataset documents_;
  int64_t max_tokens_;
  std::vector<int64_t> numbers_;        ///< of the documents that aren't left out
  std::vector<int64_t> first_samples_;  ///< of each of them, and the number of samples
  LeftOut left_out_;
};

}  // namespace megatron_cpp::step37
