// Conversations in a file of JSON lines, as a data set.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "step37/data/chat_template.h"
#include "step37/data/json_lines_data_set.h"

namespace megatron_cpp::step37 {

/// How conversations become samples.
struct ConversationOptions {
  ChatTemplate chat_template = ChatTemplate::named("step37");
  TrainedTurns trained = TrainedTurns::kAfterLastUser;
  std::filesystem::path picture_folder = {};  ///< that relative paths are relative to; empty: the folder of the file
};

/// One conversation a line (conversation.h). Lines at fault are left out.
class ConversationDataSet final : public JsonLinesDataSet {
 public:
  /// Reads and renders every conversation once; no picture is opened.
  /// @throws c10::ValueError as JsonLines.
  ConversationDataSet(std::filesystem::path file, ConversationOptions options);

  /// The texts that the template writes, those of the roles included.
  std::vector<std::string> texts(int64_t index) const override;
  std::vector<PictureReference> pictures(int64_t index, const SampleFormat& format) const override;
  /// @throws also if the tokenizer lacks a symbol of the template, naming both.
  PictureSample sample(int64_t index, const SampleFormat& format) const override;

 private:
  ConversationOptions options_;
};

}  // namespace megatron_cpp::step37
