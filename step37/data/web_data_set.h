// Samples in tar archives, as WebDataset lays them out, as a data set.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "step37/data/captioned_pictures.h"
#include "step37/data/conversation_data_set.h"
#include "step37/data/data_set.h"
#include "step37/data/tar.h"

namespace megatron_cpp::step37 {

/// Members one behind the other whose paths are the same up to the first dot of the file name are a sample:
/// pictures (by their names: .jpg, .png, .webp, ...) and
///   - .json with a conversation (conversation.h). Without "images" the pictures are those of the sample, in order;
///   with,
///     each is the file name of one of them; or
///   - .txt, a caption as that of a picture folder, or else .json with {"caption": ...}: one picture, tokens as
///     CaptionDataSet gives them.
/// Other members are ignored. Nothing is unpacked: pictures are read from the archive.
class WebDataSet final : public DataSet {
 public:
  /// Reads headers and texts of all archives once. Samples at fault are left out; of an archive that is cut or broken,
  /// what comes before is used. About 100 bytes are kept a sample.
  /// @param shards   as of shards_of
  /// @param options  for conversations; picture_folder isn't used
  /// @throws c10::ValueError as shards_of and list_tar; naming `shards` if they have no sample that can be used, with
  ///         the first reason.
  WebDataSet(const std::string& shards, ConversationOptions options);

  int64_t num_samples() const override { return static_cast<int64_t>(entries_.size()); }
  /// "shards/00001.tar: 000012", the member's path up to the dot.
  std::string name(int64_t index) const override;
  std::vector<std::string> texts(int64_t index) const override;
  std::vector<PictureReference> pictures(int64_t index, const SampleFormat& format) const override;
  PictureSample sample(int64_t index, const SampleFormat& format) const override;
  /// Samples and archives.
  std::vector<std::string> left_out() const override;

 private:
  /// A sample's members. Only what is needed of their names is kept.
  struct Entry {
    size_t shard = 0;
    std::string key;
    TarMember text;
    std::vector<TarMember> pictures;
  };
  struct Content;

  void add_shard(size_t shard);
  void add_group(size_t shard, const std::string& key, const std::vector<TarMember>& members);
  std::string name_of(const Entry& entry) const;
  Content content_of(const Entry& entry) const;
  Content content_at(int64_t index) const;
  /// @param pictures  members of the archive that has sample `index`
  std::vector<PictureReference> references_to(const std::vector<TarMember>& pictures, int64_t index,
                                              const SampleFormat& format) const;

  std::vector<std::filesystem::path> shards_;
  ConversationOptions options_;
  std::vector<Entry> entries_;
  LeftOut samples_left_out_;
  LeftOut damaged_shards_;
};

}  // namespace megatron_cpp::step37
