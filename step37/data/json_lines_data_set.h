// What data sets in files of JSON lines share.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "step37/data/data_set.h"
#include "step37/data/json_lines.h"

namespace megatron_cpp::step37 {

/// One sample a line of a file. Lines at fault are left out.
class JsonLinesDataSet : public DataSet {
 public:
  int64_t num_samples() const override { return lines_.size(); }
  std::string name(int64_t index) const override { return lines_.name(index); }
  std::vector<std::string> left_out() const override { return lines_.left_out(); }

 protected:
  /// @param picture_folder  that relative paths of pictures are relative to; empty: the folder of the file
  /// @throws c10::ValueError as JsonLines.
  JsonLinesDataSet(std::filesystem::path file, std::filesystem::path picture_folder, const JsonLines::Check& check)
      : lines_(std::move(file), check),
        picture_folder_(picture_folder.empty() ? lines_.file().parent_path() : std::move(picture_folder)) {}

  const JsonLines& lines() const { return lines_; }

  /// Refers to the pictures of a line, as reference_to.
  std::vector<PictureReference> references_to(const std::vector<std::string>& paths, const SampleFormat& format) const {
    std::vector<PictureReference> pictures;
    for (const auto& path : paths) pictures.push_back(reference_to(picture_folder_ / path, format));
    return pictures;
  }

 private:
  JsonLines lines_;
  std::filesystem::path picture_folder_;
};

}  // namespace megatron_cpp::step37
