#include "step37/data/captioned_pictures.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <fstream>
#include <optional>
#include <system_error>
#include <utility>

#include "parallel/hash.h"
#include "step37/data/utf8.h"

namespace step37 {
namespace {

namespace fs = std::filesystem;

bool is_picture(const fs::path& path) {
  auto extension = path.extension().string();
  // Not std::tolower: it depends on the locale.
  for (char& letter : extension) {
    if (letter >= 'A' && letter <= 'Z') letter = static_cast<char>(letter - 'A' + 'a');
  }
  return extension == ".png" || extension == ".jpg" || extension == ".jpeg";
}

/// Relative paths of all picture files below `folder`, sorted by bytes.
std::vector<std::string> picture_paths(const fs::path& folder) {
  std::vector<std::string> paths;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    std::error_code broken_link;
    if (is_picture(entry.path()) && entry.is_regular_file(broken_link)) {
      paths.push_back(entry.path().lexically_relative(folder).generic_string());
    }
  }
  std::sort(paths.begin(), paths.end());
  return paths;
}

/// The file's bytes, or nothing if it isn't a file or can't be opened.
std::optional<std::string> read_text(const fs::path& path) {
  std::error_code not_there;
  if (!fs::is_regular_file(path, not_there)) return std::nullopt;
  std::ifstream file(path, std::ios::binary);
  if (!file) return std::nullopt;
  std::string text(fs::file_size(path), '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  TORCH_CHECK_VALUE(!file.bad(), "cannot read ", path.string());
  text.resize(static_cast<size_t>(file.gcount()));
  return text;
}

std::string_view trim(std::string_view text) {
  constexpr std::string_view kBlanks = " \t\r\v\f";
  const auto begin = text.find_first_not_of(kBlanks);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kBlanks) - begin + 1);
}

/// FNV-1a, then the finalizer of SplitMix64: FNV alone hardly carries a name's last letters into the leading bits.
uint64_t mixed_hash(std::string_view text) {
  auto hash = parallel::stable_hash(text);
  hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9ULL;
  hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebULL;
  return hash ^ (hash >> 31);
}

}  // namespace

std::string caption_from_text(std::string_view text) {
  constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";
  if (text.starts_with(kByteOrderMark)) text.remove_prefix(kByteOrderMark.size());
  while (!text.empty()) {
    const auto line = text.substr(0, text.find('\n'));
    if (const auto caption = trim(line); !caption.empty()) return to_utf8(caption);
    text.remove_prefix(std::min(line.size() + 1, text.size()));
  }
  return {};
}

CaptionedPictures scan_captioned_pictures(const fs::path& folder) {
  std::error_code ignored;
  TORCH_CHECK_VALUE(fs::is_directory(folder, ignored), "picture folder ", folder.string(), " isn't a folder");
  std::vector<std::string> paths;
  try {
    paths = picture_paths(folder);
  } catch (const fs::filesystem_error& error) {
    TORCH_CHECK_VALUE(false, "picture folder ", folder.string(), " can't be searched: ", error.what());
  }

  CaptionedPictures result;
  result.folder = folder;
  for (auto& path : paths) {
    const auto text = read_text((folder / path).replace_extension(".txt"));
    auto caption = text ? caption_from_text(*text) : std::string();
    if (!text) {
      ++result.num_without_caption_file;
    } else if (caption.empty()) {
      ++result.num_with_empty_caption;
    } else {
      result.pictures.push_back({std::move(path), std::move(caption)});
    }
  }
  TORCH_CHECK_VALUE(!result.pictures.empty(), "picture folder ", folder.string(), " has no captioned picture: of ",
                    paths.size(), " pictures (.png, .jpg, .jpeg) ", result.num_without_caption_file,
                    " have no .txt beside them and ", result.num_with_empty_caption, " have an empty one");
  return result;
}

bool is_held_out(std::string_view relative_path, double fraction) {
  TORCH_CHECK_VALUE(fraction >= 0.0 && fraction <= 1.0, "held-out fraction ", fraction, " isn't in [0, 1]");
  constexpr double kUnit = 0x1p-53;  // the leading 53 bits are exact in a double
  return static_cast<double>(mixed_hash(relative_path) >> 11) * kUnit < fraction;
}

PictureSplit split_held_out(const std::vector<CaptionedPicture>& pictures, double fraction) {
  PictureSplit split;
  for (const auto& picture : pictures) {
    (is_held_out(picture.path, fraction) ? split.held_out : split.training).push_back(picture);
  }
  return split;
}

}  // namespace step37
