// Files with one JSON object a line, read in any order.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "megatron_cpp/checkpoint/complete_file.h"
#include "step37/data/captioned_pictures.h"

namespace megatron_cpp::step37 {

/// The JSON object in `text`.
/// @throws c10::ValueError with the reason, without the text: it isn't a JSON object, has a NUL character, or is nested
///         more than 64 deep.
nlohmann::ordered_json json_object_in(std::string_view text);

/// "2 of 40 lines are left out (first: chats.jsonl line 3: it isn't JSON)"; nothing if none is.
/// @param what  in the plural
std::vector<std::string> sentences(const LeftOut& left_out, int64_t num_read, std::string_view what);

/// The lines of a file that a data set can use. Lines end in a line feed, or a carriage return and a line feed; the
/// last one may lack it. Blank lines are passed over, and so is a byte order mark of UTF-8. Lines of more than 64 MiB
/// are left out. 8 bytes are kept a line.
///
/// Const member functions may be called from several threads.
class JsonLines {
 public:
  /// What a line must be like. @throws c10::ValueError with the reason: the line is left out.
  using Check = std::function<void(const nlohmann::ordered_json&)>;

  /// Reads the whole file once.
  /// @throws c10::ValueError naming the file if it can't be read, or has no line that can be used, with the first
  ///         reason.
  JsonLines(std::filesystem::path file, const Check& check);

  const std::filesystem::path& file() const { return file_; }
  int64_t size() const { return static_cast<int64_t>(offsets_.size()); }
  /// "chats.jsonl line 12", counted from 1.
  std::string name(int64_t index) const;
  /// What was left out, as sentences.
  std::vector<std::string> left_out() const;

  /// Calls use(json) for a line, and puts its name before the text of a c10::ValueError.
  /// @throws c10::ValueError naming the line if it can't be read any more, or isn't JSON any more.
  void with(int64_t index, const Check& use) const;

 private:
  std::string line(int64_t index) const;

  std::filesystem::path file_;
  megatron_cpp::internal::FileDescriptor descriptor_;
  std::vector<int64_t> offsets_;
  std::vector<int64_t> passed_over_;  ///< numbers of the lines without offset, from 0, ascending
  LeftOut left_out_;
};

}  // namespace megatron_cpp::step37
