#include "step37/data/flickr8k_data_set.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "megatron_cpp/checkpoint/json_object.h"
#include "step37/data/chat_sample.h"
#include "step37/data/json_lines.h"
#include "step37/data/utf8.h"

namespace megatron_cpp::step37 {
namespace {

/// As Python's str.strip without its Unicode blanks.
std::string stripped(std::string_view text) {
  constexpr std::string_view kBlanks = " \t\r\n\v\f";
  const auto begin = text.find_first_not_of(kBlanks);
  if (begin == text.npos) return {};
  return std::string(text.substr(begin, text.find_last_not_of(kBlanks) - begin + 1));
}

/// The first field of `text`, which is behind it no more.
std::string take_field(std::string_view& text, int64_t& line) {
  if (!text.starts_with('"')) {
    const std::string field(text.substr(0, text.find_first_of(",\r\n")));
    text.remove_prefix(field.size());
    return field;
  }
  const auto first_line = line;
  std::string field;
  text.remove_prefix(1);
  while (true) {
    const auto quote = text.find('"');
    TORCH_CHECK_VALUE(quote != text.npos, "line ", first_line, ": quotes aren't closed");
    field += text.substr(0, quote);
    line += std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(quote), '\n');
    text.remove_prefix(quote + 1);
    if (!text.starts_with('"')) break;
    field += '"';
    text.remove_prefix(1);
  }
  TORCH_CHECK_VALUE(text.find_first_of(",\r\n") == 0 || text.empty(), "line ", line, ": text follows closed quotes");
  return field;
}

std::string checked(const std::string& field, const char* what) {
  auto text = stripped(field);
  TORCH_CHECK_VALUE(!text.empty(), "it has no ", what);
  TORCH_CHECK_VALUE(is_utf8(text), "its ", what, " isn't UTF-8");
  TORCH_CHECK_VALUE(text.find('\0') == text.npos, "its ", what, " has a NUL character");
  return text;
}

}  // namespace

std::vector<std::vector<std::string>> csv_records(std::string_view text) {
  std::vector<std::vector<std::string>> records;
  int64_t line = 1;
  while (!text.empty()) {
    std::vector<std::string> record;
    while (true) {
      record.push_back(take_field(text, line));
      if (!text.starts_with(',')) break;
      text.remove_prefix(1);
    }
    if (text.starts_with('\r')) text.remove_prefix(1);
    if (text.starts_with('\n')) text.remove_prefix(1);
    ++line;
    if (record.size() > 1 || !record.front().empty()) records.push_back(std::move(record));
  }
  return records;
}

Flickr8kDataSet::Flickr8kDataSet(const std::filesystem::path& folder, ConversationOptions options,
                                 const std::string& column, std::string_view prompt)
    : file_(folder / "metadata.csv"), options_(std::move(options)), prompt_(prompt) {
  if (options_.picture_folder.empty()) options_.picture_folder = folder;
  const auto shown = printable(file_.string());
  std::error_code error;
  TORCH_CHECK_VALUE(std::filesystem::is_regular_file(file_, error), shown, " isn't a file");
  const auto text = megatron_cpp::internal::read_text(file_);
  std::vector<std::vector<std::string>> records;
  try {
    constexpr std::string_view kMark = "\xEF\xBB\xBF";
    records = csv_records(std::string_view(text).substr(text.starts_with(kMark) ? kMark.size() : 0));
  } catch (const c10::ValueError& fault) {
    TORCH_CHECK_VALUE(false, shown, ": ", fault.what_without_backtrace());
  }
  TORCH_CHECK_VALUE(!records.empty(), shown, " is empty");
  const auto& names = records.front();
  const auto column_of = [&](const std::string& name) {
    const auto found = std::find(names.begin(), names.end(), name);
    TORCH_CHECK_VALUE(found != names.end(), shown, " has no column ", name);
    return static_cast<size_t>(found - names.begin());
  };
  const auto picture_column = column_of("file_name");
  const auto caption_column = column_of(column);
  for (size_t i = 1; i < records.size(); ++i) {
    const auto& record = records[i];
    try {
      TORCH_CHECK_VALUE(record.size() == names.size(), "it has ", record.size(), " fields instead of ", names.size());
      Row row{static_cast<int64_t>(i), checked(record[picture_column], "file name"),
              checked(record[caption_column], "caption")};
      parts_of(row);
      rows_.push_back(std::move(row));
    } catch (const c10::ValueError& fault) {
      left_out_.add(fmt::format("{} row {}: {}", shown, i, fault.what_without_backtrace()));
    }
  }
  TORCH_CHECK_VALUE(!rows_.empty(), shown, " has no row that can be used",
                    left_out_.count == 0 ? "" : "; the first: " + left_out_.first);
}

std::vector<ChatPart> Flickr8kDataSet::parts_of(const Row& row) const {
  const Conversation conversation{
      .messages = {{.role = ChatMessage::Role::kUser, .content = fmt::format("{}\n{}", kPicturePlaceholder, prompt_)},
                   {.role = ChatMessage::Role::kAssistant, .content = row.caption}},
      .pictures = {row.picture}};
  return options_.chat_template.render(conversation, options_.trained);
}

std::string Flickr8kDataSet::name(int64_t index) const {
  return fmt::format("{} row {}", printable(file_.string()), rows_.at(static_cast<size_t>(index)).number);
}

std::vector<std::string> Flickr8kDataSet::texts(int64_t index) const {
  return texts_of(parts_of(rows_.at(static_cast<size_t>(index))));
}

std::vector<PictureReference> Flickr8kDataSet::pictures(int64_t index, const SampleFormat& format) const {
  return {reference_to(options_.picture_folder / rows_.at(static_cast<size_t>(index)).picture, format)};
}

PictureSample Flickr8kDataSet::sample(int64_t index, const SampleFormat& format) const {
  return chat_sample(parts_of(rows_.at(static_cast<size_t>(index))), pictures(index, format), format);
}

std::vector<std::string> Flickr8kDataSet::left_out() const { return sentences(left_out_, num_samples(), "rows"); }

}  // namespace megatron_cpp::step37
