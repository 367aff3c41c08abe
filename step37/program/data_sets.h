// The key data.sets: which data sets a run trains on.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace megatron_cpp::step37 {

/// What a data set is made of.
enum class DataSetKind {
  kCaptions,  ///< a folder for scan_captioned_pictures
};

/// One data set of data.sets; its members are the keys.
struct DataSetSection {
  DataSetKind kind = DataSetKind::kCaptions;  ///< captions
  std::string path;                           ///< required: folder or file, relative to the working directory
  double weight = 1.0;                        ///< share of the samples drawn, relative to the sum of the weights
  bool shuffle = true;                        ///< in a new order in each pass, else in the order of the data set

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
///         type, no path.
DataSetSections data_sets_from_text(const std::string& text);

}  // namespace megatron_cpp::step37
