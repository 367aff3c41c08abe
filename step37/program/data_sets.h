// The key data.sets: which data sets a run trains on.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "step37/data/chat_template.h"

namespace megatron_cpp::step37 {

/// What a data set is made of.
enum class DataSetKind {
  kCaptions,       ///< a folder for scan_captioned_pictures
  kConversations,  ///< a file for ConversationDataSet
  kTokens,         ///< a file for TokenDataSet
  kWebDataset,     ///< archives for WebDataset
  kIndexed,        ///< a prefix for DocumentDataSet
  kFlickr8k,       ///< a folder for Flickr8kDataSet
};

/// One data set of data.sets; its members are the keys. A key that a kind doesn't have is refused.
struct DataSetSection {
  /// captions, conversations, tokens, webdataset, indexed, flickr8k
  DataSetKind kind = DataSetKind::kCaptions;
  std::string path = {};  ///< required: folder, file or archives, relative to the working directory
  double weight = 1.0;    ///< share of the samples drawn, relative to the sum of the weights
  bool shuffle = true;    ///< in a new order in each pass, else in the order of the data set
  /// Of conversations, tokens and flickr8k: the folder that the pictures' paths are relative to, relative to the
  /// working directory. Empty: the folder of the file.
  std::string pictures = {};
  /// Of conversations, webdataset and flickr8k: the name of a ChatTemplate, or the path of a file that describes one.
  std::string chat_template = "step37";
  /// Of conversations, webdataset and flickr8k: the assistant's turns in the loss: last (behind the last user turn) or
  /// all.
  TrainedTurns turns = TrainedTurns::kAfterLastUser;
  std::string caption = "caption_0";  ///< of flickr8k: the column of the captions
  std::string prompt = {};            ///< of flickr8k: what the user asks; empty: Flickr8kDataSet::kPrompt

  bool operator==(const DataSetSection&) const = default;
};

/// The data sets of a run by name. Names are letters, digits, - and _; a checkpoint knows a data set by its name.
using DataSetSections = std::map<std::string, DataSetSection>;

/// The name that a checkpoint gives to the data set of data.directory.
inline constexpr char kDirectoryDataSet[] = "directory";

/// As YAML in one line: "{stamps: {kind: captions, path: data/tuxpaint, weight: 2}}"; nothing if there is none. Members
/// that have their defaults are left out, but for kind and path.
std::string to_text(const DataSetSections& sets);

/// Reads what to_text writes, or YAML of the same meaning; an empty text gives none.
/// @throws c10::ValueError naming the data set and the key: no YAML, no such key, a key given twice, a value of another
///         type, a key of another kind, no path.
DataSetSections data_sets_from_text(const std::string& text);

}  // namespace megatron_cpp::step37
