#include "step37/data/tar.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <fstream>
#include <optional>
#include <system_error>
#include <utility>

#include "step37/data/utf8.h"

namespace megatron_cpp::step37 {
namespace {

constexpr int64_t kBlock = 512;
constexpr int64_t kLongestName = 1 << 16;

/// A text that ends with the field or with NUL.
std::string_view field_text(std::string_view field) { return field.substr(0, field.find('\0')); }

/// Octal digits, or, with the first bit set, the bytes of a number (GNU).
std::optional<int64_t> field_number(std::string_view field) {
  int64_t value = 0;
  if ((static_cast<unsigned char>(field.front()) & 0x80) != 0) {
    for (size_t i = 0; i < field.size(); ++i) {
      const auto byte = static_cast<unsigned char>(field[i]) & (i == 0 ? 0x7f : 0xff);
      if (value >> 55 != 0) return std::nullopt;
      value = value << 8 | byte;
    }
    return value;
  }
  const auto digits = field.substr(std::min(field.find_first_not_of(' '), field.size()));
  const auto end = std::min(digits.find_first_not_of("01234567"), digits.size());
  if (digits.substr(end).find_first_not_of(std::string_view(" \0", 2)) != digits.npos) return std::nullopt;
  for (const char digit : digits.substr(0, end)) value = value << 3 | (digit - '0');  // at most 36 bits
  return value;
}

/// The header's checksum counts its own field as blanks.
bool has_checksum(std::string_view header) {
  int64_t sum = 0;
  for (size_t i = 0; i < header.size(); ++i) {
    sum += i >= 148 && i < 156 ? ' ' : static_cast<int64_t>(static_cast<unsigned char>(header[i]));
  }
  return field_number(header.substr(148, 8)) == sum;
}

/// What an extended header says about the next member.
struct Extension {
  std::optional<std::string> name;
  std::optional<int64_t> bytes;
};

/// Records "LENGTH KEY=VALUE\n" of a pax header.
bool read_pax(std::string_view records, Extension& extension) {
  while (!records.empty() && records.front() != '\0') {
    size_t length = 0;
    const auto [end, error] = std::from_chars(records.data(), records.data() + records.size(), length);
    const auto digits = static_cast<size_t>(end - records.data());
    if (error != std::errc() || length > records.size() || length < digits + 3 || records[length - 1] != '\n')
      return false;
    const auto record = records.substr(digits + 1, length - digits - 2);
    const auto equals = record.find('=');
    if (equals == record.npos) return false;
    const auto value = record.substr(equals + 1);
    if (record.substr(0, equals) == "path") extension.name = std::string(value);
    if (record.substr(0, equals) == "size") {
      int64_t bytes = -1;
      const auto parsed = std::from_chars(value.data(), value.data() + value.size(), bytes);
      if (parsed.ec != std::errc() || parsed.ptr != value.data() + value.size() || bytes < 0) return false;
      extension.bytes = bytes;
    }
    records.remove_prefix(length);
  }
  return true;
}

class TarReader {
 public:
  explicit TarReader(const std::filesystem::path& file) : file_(file), stream_(file, std::ios::binary) {
    std::error_code error;
    TORCH_CHECK_VALUE(std::filesystem::is_regular_file(file, error), shown(), " isn't a file");
    TORCH_CHECK_VALUE(stream_, "cannot open ", shown(), ": ", std::strerror(errno));
    size_ = static_cast<int64_t>(std::filesystem::file_size(file, error));
    TORCH_CHECK_VALUE(!error, "cannot read ", shown(), ": ", error.message());
  }

  TarListing run() {
    TORCH_CHECK_VALUE(size_ > 0, shown(), " is empty");
    refuse_compressed();
    while (result_.damage.empty() && at_ < size_ && next_member()) {
    }
    // The end of a member is no other place to be cut at than any other.
    if (result_.damage.empty() && at_ >= size_) result_.damage = "it has no end mark, so it may be cut";
    return std::move(result_);
  }

 private:
  std::string shown() const { return printable(file_.string()); }

  /// Bytes that are in the file; fewer if it is cut meanwhile.
  std::string bytes_at(int64_t offset, int64_t count) {
    std::string bytes(static_cast<size_t>(count), '\0');
    stream_.clear();
    stream_.seekg(offset);
    stream_.read(bytes.data(), count);
    bytes.resize(static_cast<size_t>(stream_.gcount()));
    return bytes;
  }

  void refuse_compressed() {
    constexpr std::pair<std::string_view, std::string_view> kMarks[] = {{"\x1f\x8b", "gzip"},
                                                                        {"\x28\xb5\x2f\xfd", "zstd"},
                                                                        {"\xfd"
                                                                         "7zXZ",
                                                                         "xz"},
                                                                        {"BZh", "bzip2"},
                                                                        {"\x04\x22\x4d\x18", "lz4"},
                                                                        {"PK\3\4", "zip"}};
    const auto beginning = bytes_at(0, std::min<int64_t>(size_, 8));
    for (const auto& [mark, program] : kMarks) {
      TORCH_CHECK_VALUE(!beginning.starts_with(mark), shown(), " is compressed by ", program,
                        ": unpack it first, as samples are read in any order");
    }
  }

  bool damaged(std::string text) {
    TORCH_CHECK_VALUE(at_ > 0, shown(), " isn't a tar archive: ", text);
    result_.damage = std::move(text);
    return false;
  }

  /// Reads one header and steps over its data. False at the end.
  bool next_member() {
    if (size_ - at_ < kBlock) return damaged("it ends inside of a header");
    const auto header = bytes_at(at_, kBlock);
    if (header.find_first_not_of('\0') == header.npos && header.size() == kBlock) return false;
    if (header.size() < kBlock || !has_checksum(header))
      return damaged(fmt::format("there is no header at byte {}", at_));
    const std::string_view fields = header;
    auto bytes = field_number(fields.substr(124, 12));
    const char type = header[156];
    const bool is_file = type == '0' || type == '\0' || type == '7';
    const bool is_extension = type == 'x' || type == 'g' || type == 'L' || type == 'K';
    if (type >= '1' && type <= '6') bytes = 0;  // links, devices, folders
    if (is_file && extension_.bytes) bytes = extension_.bytes;
    auto name = extension_.name && !is_extension ? *extension_.name : name_in(fields);
    if (!bytes) return damaged(fmt::format("the size of {} is no number", printable(name)));
    if (type == 'S') return damaged(fmt::format("{} is stored with holes, which isn't read", printable(name)));
    const auto data = at_ + kBlock;
    if (*bytes > size_ - data) return damaged(fmt::format("it ends inside of {}", printable(name)));
    if (is_extension) {
      if (*bytes > kLongestName) return damaged(fmt::format("there is a name of {} bytes", *bytes));
      if (!extend(type, bytes_at(data, *bytes))) return damaged(fmt::format("the header at byte {} is wrong", at_));
    } else {
      if (is_file) result_.members.push_back({std::move(name), data, *bytes});
      extension_ = {};
    }
    at_ = std::min(size_, data + (*bytes + kBlock - 1) / kBlock * kBlock);
    return true;
  }

  /// For one member only: global headers have neither names nor sizes.
  bool extend(char type, const std::string& bytes) {
    if (type == 'L') extension_.name = std::string(field_text(bytes));
    if (type != 'x') return true;
    if (!read_pax(bytes, extension_)) return false;
    return !extension_.name || extension_.name->find('\0') == std::string::npos;
  }

  static std::string name_in(std::string_view header) {
    const std::string name(field_text(header.substr(0, 100)));
    const bool is_posix = header.substr(257, 6) == std::string_view("ustar\0", 6);
    const auto prefix = field_text(header.substr(345, 155));
    return is_posix && !prefix.empty() ? fmt::format("{}/{}", prefix, name) : name;
  }

  const std::filesystem::path& file_;
  std::ifstream stream_;
  int64_t size_ = 0;
  int64_t at_ = 0;
  Extension extension_;
  TarListing result_;
};

/// Puts the numbers of the last range in braces into `pattern`, and those of the others by itself.
void expand(const std::string& pattern, const std::string& given, std::vector<std::filesystem::path>& files) {
  const auto begin = pattern.rfind('{');
  if (begin == std::string::npos) {
    files.emplace_back(pattern);
    return;
  }
  const auto end = pattern.find('}', begin);
  const auto dots = pattern.find("..", begin);
  TORCH_CHECK_VALUE(end != std::string::npos && dots < end, "shards ", printable(given),
                    ": braces hold a range of numbers, {000..012}");
  const auto number_in = [&](size_t from, size_t to) {
    int64_t value = -1;
    const auto parsed = std::from_chars(pattern.data() + from, pattern.data() + to, value);
    TORCH_CHECK_VALUE(parsed.ec == std::errc() && parsed.ptr == pattern.data() + to && value >= 0, "shards ",
                      printable(given), ": braces hold a range of numbers, {000..012}");
    return value;
  };
  const auto first = number_in(begin + 1, dots);
  const auto last = number_in(dots + 2, end);
  constexpr int64_t kMost = 1000000;
  TORCH_CHECK_VALUE(first <= last && last - first < kMost && static_cast<int64_t>(files.size()) < kMost, "shards ",
                    printable(given), ": a range goes upwards, and has at most a million numbers");
  for (auto number = first; number <= last; ++number) {
    const auto digits = fmt::format("{:0{}}", number, dots - begin - 1);
    expand(pattern.substr(0, begin) + digits + pattern.substr(end + 1), given, files);
  }
}

}  // namespace

TarListing list_tar(const std::filesystem::path& file) { return TarReader(file).run(); }

std::vector<std::filesystem::path> shards_of(const std::string& shards) {
  std::vector<std::filesystem::path> files;
  std::error_code error;
  if (!std::filesystem::is_directory(shards, error)) {
    expand(shards, shards, files);
    return files;
  }
  std::filesystem::directory_iterator entries(shards, error);
  TORCH_CHECK_VALUE(!error, "cannot read ", printable(shards), ": ", error.message());
  for (const auto& entry : entries) {
    const auto name = entry.path().filename().string();
    if (entry.path().extension() == ".tar") files.push_back(entry.path());
    const auto compressed = name.find(".tar.");
    TORCH_CHECK_VALUE(compressed == name.npos && !name.ends_with(".tgz"), printable(entry.path().string()),
                      " is compressed: unpack it first, as samples are read in any order");
  }
  TORCH_CHECK_VALUE(!files.empty(), printable(shards), " has no file *.tar");
  std::sort(files.begin(), files.end());
  return files;
}

}  // namespace megatron_cpp::step37
