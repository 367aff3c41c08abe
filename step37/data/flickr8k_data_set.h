// Flickr8k as it is published, as a data set.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "step37/data/captioned_pictures.h"
#include "step37/data/conversation_data_set.h"
#include "step37/data/data_set.h"

namespace megatron_cpp::step37 {

/// The records of comma-separated values (RFC 4180): fields may be in quotes, where "" is a quote, and commas and line
/// ends are text. Lines end in a line feed, or a carriage return and a line feed. Empty lines are no records.
/// @throws c10::ValueError with the line if quotes aren't closed, or text follows them.
std::vector<std::vector<std::string>> csv_records(std::string_view text);

/// A folder's metadata.csv, with a column file_name and columns of captions (caption_0 to caption_4), and the pictures
/// beside it. A sample is a conversation: "<image>", a line feed and the prompt, and the caption as answer. So
/// Megatron-Bridge's stepfun/data reads it (flickr8k_loader.py).
class Flickr8kDataSet final : public DataSet {
 public:
  /// What the user says behind the picture: Megatron-Bridge's.
  static constexpr std::string_view kPrompt = "Describe this image in one sentence.";

  /// Reads the file once; no picture is opened. Left out are rows without file name or caption, and those of another
  /// number of fields.
  /// @param column   of captions
  /// @param options  picture_folder: that of the pictures if it isn't `folder`
  /// @throws c10::ValueError naming the file if it can't be read, lacks a column (naming it), or has no row that can be
  ///         used.
  Flickr8kDataSet(const std::filesystem::path& folder, ConversationOptions options,
                  const std::string& column = "caption_0", std::string_view prompt = kPrompt);

  int64_t num_samples() const override { return static_cast<int64_t>(rows_.size()); }
  /// "metadata.csv row 12", with the file's path; rows are counted from 1, without the one of names.
  std::string name(int64_t index) const override;
  std::vector<std::string> texts(int64_t index) const override;
  std::vector<PictureReference> pictures(int64_t index, const SampleFormat& format) const override;
  PictureSample sample(int64_t index, const SampleFormat& format) const override;
  std::vector<std::string> left_out() const override;

 private:
  struct Row {
    int64_t number;
    std::string picture;
    std::string caption;
  };

  std::vector<ChatPart> parts_of(const Row& row) const;

  std::filesystem::path file_;
  ConversationOptions options_;
  std::string prompt_;
  std::vector<Row> rows_;
  LeftOut left_out_;
};

}  // namespace megatron_cpp::step37
