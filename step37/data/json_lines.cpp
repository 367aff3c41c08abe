#include "step37/data/json_lines.h"

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <system_error>
#include <utility>

#include "step37/data/utf8.h"

namespace megatron_cpp::step37 {
namespace {

constexpr size_t kLongestLine = size_t{1} << 26;
constexpr int kDeepest = 64;

/// Brackets that are open at the same time, outside of strings.
int depth_of(std::string_view text) {
  int depth = 0;
  int deepest = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      deepest = std::max(deepest, ++depth);
    } else if (c == '}' || c == ']') {
      --depth;
    }
  }
  return deepest;
}

/// A pipe would be read once only, and opening it may block.
int open_file(const std::filesystem::path& file) {
  std::error_code error;
  TORCH_CHECK_VALUE(std::filesystem::is_regular_file(file, error), printable(file.string()), " isn't a file");
  const int descriptor = ::open(file.c_str(), O_RDONLY | O_CLOEXEC);
  TORCH_CHECK_VALUE(descriptor >= 0, "cannot open ", printable(file.string()), ": ", std::strerror(errno));
  return descriptor;
}

/// The next bytes from `offset`, none at the end of the file.
std::string_view read_at(int descriptor, int64_t offset, std::string& buffer, const std::filesystem::path& file) {
  while (true) {
    const auto count = ::pread(descriptor, buffer.data(), buffer.size(), offset);
    if (count >= 0) return std::string_view(buffer).substr(0, static_cast<size_t>(count));
    TORCH_CHECK_VALUE(errno == EINTR, "cannot read ", printable(file.string()), ": ", std::strerror(errno));
  }
}

}  // namespace

nlohmann::ordered_json json_object_in(std::string_view text) {
  TORCH_CHECK_VALUE(text.find('\0') == text.npos, "it has a NUL character");  // which ends a text for the parser
  TORCH_CHECK_VALUE(depth_of(text) <= kDeepest, "it is nested more than ", kDeepest, " deep");
  auto json = nlohmann::ordered_json::parse(text, /*cb=*/nullptr, /*allow_exceptions=*/false);
  TORCH_CHECK_VALUE(!json.is_discarded(), is_utf8(text) ? "it isn't JSON" : "it isn't UTF-8");
  TORCH_CHECK_VALUE(json.is_object(), "it isn't a JSON object");
  return json;
}

std::vector<std::string> sentences(const LeftOut& left_out, int64_t num_read, std::string_view what) {
  if (left_out.count == 0) return {};
  return {fmt::format("{} of {} {} are left out (first: {})", left_out.count, num_read + left_out.count, what,
                      left_out.first)};
}

JsonLines::JsonLines(std::filesystem::path file, const Check& check)
    : file_(std::move(file)), descriptor_(open_file(file_)) {
  constexpr std::string_view kMark = "\xEF\xBB\xBF";
  std::string buffer(size_t{1} << 20, '\0');
  std::string line;
  bool is_too_long = false;
  int64_t begin = 0;  // of the line
  int64_t number = 0;
  const auto finish_line = [&] {
    if (number == 0 && line.starts_with(kMark)) {
      begin += static_cast<int64_t>(kMark.size());
      line.erase(0, kMark.size());
    }
    const bool is_blank = trim(line).empty() && !is_too_long;
    try {
      TORCH_CHECK_VALUE(!is_too_long, "it has more than ", kLongestLine, " bytes");
      if (!is_blank) {
        check(json_object_in(line));
        offsets_.push_back(begin);
      }
    } catch (const c10::ValueError& error) {
      left_out_.add(fmt::format("{} line {}: {}", printable(file_.string()), number + 1,
                                printable(error.what_without_backtrace())));
    }
    if (offsets_.empty() || offsets_.back() != begin) passed_over_.push_back(number);
    ++number;
    line.clear();
    is_too_long = false;
  };
  int64_t offset = 0;
  while (true) {
    auto bytes = read_at(descriptor_.get(), offset, buffer, file_);
    if (bytes.empty()) break;
    while (!bytes.empty()) {
      const auto part = bytes.substr(0, bytes.find('\n'));
      is_too_long = is_too_long || line.size() + part.size() > kLongestLine;
      if (!is_too_long) line += part;
      offset += static_cast<int64_t>(part.size());
      bytes.remove_prefix(part.size());
      if (bytes.empty()) break;
      finish_line();
      bytes.remove_prefix(1);
      begin = ++offset;
    }
  }
  if (offset > begin) finish_line();
  TORCH_CHECK_VALUE(size() > 0, printable(file_.string()), " has no line that can be used",
                    left_out_.count == 0 ? "" : "; the first: " + left_out_.first);
}

std::string JsonLines::name(int64_t index) const {
  // The k-th line that was passed over, from 0, has passed_over_[k] - k samples before it.
  const auto first_behind = std::partition_point(passed_over_.begin(), passed_over_.end(), [&](const int64_t& passed) {
    return passed - (&passed - passed_over_.data()) <= index;
  });
  return fmt::format("{} line {}", printable(file_.string()), index + (first_behind - passed_over_.begin()) + 1);
}

std::vector<std::string> JsonLines::left_out() const { return sentences(left_out_, size(), "lines"); }

std::string JsonLines::line(int64_t index) const {
  auto offset = offsets_.at(static_cast<size_t>(index));
  std::string buffer(size_t{1} << 16, '\0');
  std::string result;
  while (result.size() <= kLongestLine) {
    const auto bytes = read_at(descriptor_.get(), offset, buffer, file_);
    const auto part = bytes.substr(0, bytes.find('\n'));
    result += part;
    if (part.size() < bytes.size() || bytes.empty()) break;
    offset += static_cast<int64_t>(part.size());
  }
  return result;
}

void JsonLines::with(int64_t index, const Check& use) const {
  try {
    use(json_object_in(line(index)));
  } catch (const c10::ValueError& error) {
    TORCH_CHECK_VALUE(false, name(index), ": ", error.what_without_backtrace());
  }
}

}  // namespace megatron_cpp::step37
