// Features that a frozen vision tower has computed once: a folder that training reads in place of pictures.
//
//   DIR/features.json                       which tower they are of, and how pictures are cut: FeatureSource, by key
//   DIR/chunk-00003-rank-0001.safetensors   for each of its pictures a tensor [rows, C] in bfloat16: the rows of its
//                                           crops, then those of its global view; metadata with the picture's size
//
// A chunk appears completely or not at all, so that who writes them may be killed at any time. Of a picture in several
// chunks, the one of the highest number counts.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "megatron_cpp/checkpoint/safetensors.h"
#include "parallel/group.h"
#include "step37/data/crop_plan.h"
#include "step37/data/data_set.h"
#include "step37/data/picture.h"
#include "step37/vision/vision_tower.h"

namespace megatron_cpp::step37 {

/// What a folder of features calls pictures: by their places in data sets, so that these may be moved.
class PictureNames {
 public:
  /// @param folders  of the pictures of each data set, by its name
  explicit PictureNames(std::map<std::string, std::filesystem::path> folders) : folders_(std::move(folders)) {}

  /// "stamps:animals/duck.png"; in an archive "web:0001.tar#512+20480", with offset and bytes. The data set is the one
  /// with the innermost folder that has the picture, of several with the same folder the first by name; a picture in
  /// none has no data set's name and its whole path. Always UTF-8: other bytes, % and # are written %XX.
  std::string name_of(const PictureReference& picture) const;

 private:
  std::map<std::string, std::filesystem::path> folders_;
};

/// What features depend on besides the pictures and the tower's weights.
struct FeatureSource {
  VisionConfig vision;
  CropOptions crops;
  at::ScalarType precision = at::kFloat;  ///< of the tower's weights and of its computation: float32 or bfloat16
};

/// The checksum of all weights of the tower as float32 (XXH128), by their names: equal for equal weights, whatever
/// shares them out. Collective over `tp` if the tower is split over it.
std::string tower_checksum(const VisionTowerImpl& tower, const parallel::GroupPtr& tp);

/// Size and time of a picture's own file.
struct FileStamp {
  int64_t bytes = 0;
  int64_t modified = 0;  ///< ns since 1970; 0: the file isn't there, or changes aren't looked for

  bool operator==(const FileStamp&) const = default;
};

/// The stamp of a picture; of one in an archive, which grows with others, all 0.
FileStamp file_stamp(const PictureReference& picture);

/// What a folder has of a picture.
struct StoredFeatures {
  size_t chunk = 0;   ///< PictureFeatures knows which
  PictureSize size;   ///< of the picture when its features were computed
  FileStamp stamp{};  ///< likewise
};

/// Reads a folder of features. Const member functions may be called from several threads. Not collective.
class PictureFeatures {
 public:
  /// Maps all chunks into memory and reads their headers; some 500 bytes are kept a picture.
  /// @throws c10::ValueError naming the folder if it has no features.json, or features of another source, with the
  ///         first key that differs and both values; naming the file if it is damaged.
  PictureFeatures(std::filesystem::path folder, PictureNames names, const FeatureSource& source);

  /// @throws c10::ValueError naming the folder and both checksums if the features are of a tower with other weights.
  void check_tower(const std::string& checksum) const;

  const std::filesystem::path& folder() const { return folder_; }  ///< as given to the constructor
  int64_t num_pictures() const { return static_cast<int64_t>(pictures_.size()); }
  int64_t channels() const { return source_.vision.output_dim(); }  ///< C

  /// What there is of a picture; null: nothing.
  const StoredFeatures* find(const PictureReference& picture) const;

  /// Copies the features of a picture.
  /// @param crops        [number of crops, CropOptions::crop_tokens(), C], any floating dtype, on the CPU
  /// @param global_view  [CropOptions::global_tokens(), C], likewise
  /// @throws c10::ValueError naming the picture if it isn't there, or has changed its size since.
  void read(const PictureReference& picture, const at::Tensor& crops, const at::Tensor& global_view) const;

  /// "`step37 features` with this configuration and --output DIR adds them", for messages.
  std::string remedy() const;
  /// What the folder calls a picture, printable.
  std::string printable_name(const PictureReference& picture) const;

 private:
  std::filesystem::path folder_;
  PictureNames names_;
  FeatureSource source_;
  std::string tower_checksum_;
  std::vector<SafetensorsFile> chunks_;
  std::unordered_map<std::string, StoredFeatures> pictures_;
};

/// Makes a folder for features, or goes on in one that has some. On one rank.
/// @throws c10::ValueError naming the folder if it isn't empty and has no features.json, or as the constructor and
///         check_tower of PictureFeatures do; WriteError.
void begin_feature_folder(const std::filesystem::path& folder, const FeatureSource& source,
                          const std::string& tower_checksum);

/// Removes the chunks that a killed command had not finished; nobody may be writing any.
void remove_unfinished_chunks(const std::filesystem::path& folder);

/// The number that chunks to be written have: above those of all chunks that are there.
int64_t next_feature_chunk(const std::filesystem::path& folder);

/// Writes the features of `pictures` as a chunk, one picture after the other.
/// @param number  next_feature_chunk, or a higher one that this rank hasn't used
/// @param next    gives the features of pictures[0], pictures[1], ..., each [rows, C] of any dtype and device; each is
///                written before the next call
/// Returns the bytes of the file.
/// @throws WriteError
int64_t write_feature_chunk(const std::filesystem::path& folder, int64_t number, int rank, const PictureNames& names,
                            const FeatureSource& source, const std::vector<PictureReference>& pictures,
                            const std::function<at::Tensor()>& next);

/// Feature rows of all views of a picture.
int64_t num_feature_rows(const PictureReference& picture, const CropOptions& crops);

}  // namespace megatron_cpp::step37
