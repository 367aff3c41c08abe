// Megatron's indexed data set: documents of token ids in a file .bin, where they are in a file .idx.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <vector>

namespace megatron_cpp {

/// Reads what Megatron-Core's IndexedDatasetBuilder writes (megatron/core/datasets/indexed_dataset.py, version 1), with
/// ids of any integer type. Both files are memory-mapped: nothing is copied, and they must not become shorter
/// meanwhile.
///
/// NAME.idx, little-endian: "MMIDIDX\0\0"; the version, 8 bytes; the type of ids, 1 byte; the number of sequences and
/// of document indices, 8 bytes each; per sequence its length, 4 bytes; per sequence its first byte in NAME.bin, 8
/// bytes; the document indices, 8 bytes each: document i has sequences [index[i], index[i + 1]). The mode of each
/// sequence, 1 byte, may follow; it isn't read.
///
/// Const member functions may be called from several threads.
class IndexedDataset {
 public:
  /// Checks the whole index: all sequences are inside the file and reach its end, and all documents are inside the
  /// sequences. Ids aren't looked at.
  /// @param prefix  the path without .bin and .idx, or with one of them
  /// @throws c10::ValueError naming the file, and what is wrong with it.
  explicit IndexedDataset(const std::filesystem::path& prefix);
  ~IndexedDataset();
  IndexedDataset(IndexedDataset&&) noexcept;             ///< takes the maps over
  IndexedDataset& operator=(IndexedDataset&&) noexcept;  ///< takes the maps over

  /// The number of documents; may be 0.
  int64_t num_documents() const;
  /// The number of ids of a document; may be 0.
  int64_t length(int64_t document) const;
  /// Ids [begin, end) of a document.
  /// @throws c10::ValueError if they aren't inside it.
  std::vector<int64_t> tokens(int64_t document, int64_t begin, int64_t end) const;

  /// The path without .bin and .idx.
  const std::filesystem::path& prefix() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace megatron_cpp
