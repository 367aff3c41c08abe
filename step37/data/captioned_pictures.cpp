#include "step37/data/captioned_pictures.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <fstream>
#include <map>
#include <set>
#include <span>
#include <system_error>
#include <unordered_map>
#include <utility>

#include "parallel/hash.h"
#include "step37/data/for_each_index.h"
#include "step37/data/picture.h"
#include "step37/data/picture_file.h"
#include "step37/data/utf8.h"

namespace megatron_cpp::step37 {
namespace {

namespace fs = std::filesystem;

// Names

std::string lower_case(std::string text) {
  // Not std::tolower: it depends on the locale.
  for (char& letter : text) {
    if (letter >= 'A' && letter <= 'Z') letter = static_cast<char>(letter - 'A' + 'a');
  }
  return text;
}

bool is_one_of(std::string_view name, std::span<const std::string_view> names) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

/// Files and folders of file managers, network drives and file systems, and all names that begin with a dot.
bool is_hidden(const std::string& name) {
  constexpr std::string_view kSystemFolders[] = {"$recycle.bin",
                                                 "#recycle",
                                                 "#snapshot",
                                                 "@eadir",
                                                 "@recently-snapshot",
                                                 "@recycle",
                                                 "@sharebin",
                                                 "@tmp",
                                                 "__macosx",
                                                 "lost+found",
                                                 "network trash folder",
                                                 "recycled",
                                                 "recycler",
                                                 "found.000",
                                                 "system volume information",
                                                 "temporary items",
                                                 "trashed files"};
  return name.starts_with(".") || is_one_of(lower_case(name), kSystemFolders);
}

// Files

struct FileStatus {
  int error = 0;  ///< errno, or 0
  bool regular = false;
  bool folder = false;
  int64_t bytes = 0;
  int64_t modified = 0;  ///< ns since 1970
  int64_t changed = 0;   ///< ns since 1970, st_ctime: last change of contents, name or permissions
  std::pair<uint64_t, uint64_t> identity{};
};

int64_t nanoseconds(const timespec& time) { return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec; }

/// Follows links.
FileStatus status_of(const fs::path& path) {
  struct stat status {};
  if (stat(path.c_str(), &status) != 0) return {.error = errno};
  return {.regular = S_ISREG(status.st_mode),
          .folder = S_ISDIR(status.st_mode),
          .bytes = int64_t{status.st_size},
          .modified = nanoseconds(status.st_mtim),
          .changed = nanoseconds(status.st_ctim),
          .identity = {uint64_t{status.st_dev}, uint64_t{status.st_ino}}};
}

std::string reason(int error) { return std::generic_category().message(error); }

/// Reads at most `limit` bytes from the beginning of the file; returns false and sets errno if it can't.
bool read_beginning(const fs::path& path, size_t limit, std::string& text) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return false;
  text.resize(limit);
  file.read(text.data(), static_cast<std::streamsize>(limit));
  if (file.bad()) return false;
  text.resize(static_cast<size_t>(file.gcount()));
  return true;
}

bool begins_as_picture(const fs::path& path) {
  std::string beginning;
  if (!status_of(path).regular || !read_beginning(path, 16, beginning)) return false;
  return is_picture_file({reinterpret_cast<const uint8_t*>(beginning.data()), beginning.size()});
}

// A folder

/// The names in a folder, each list sorted by bytes.
struct FolderNames {
  std::vector<std::string> folders;
  std::vector<std::string> links;
  std::vector<std::string> files;
  std::vector<std::string> hidden;  ///< folders, and files whose names are those of pictures
};

/// @throws fs::filesystem_error.
FolderNames list_folder(const fs::path& folder) {
  FolderNames names;
  for (const auto& entry : fs::directory_iterator(folder)) {
    auto name = entry.path().filename().string();
    std::error_code ignored;
    const bool is_folder = entry.is_directory(ignored);
    if (is_hidden(name)) {
      if (is_folder || has_picture_extension(name)) names.hidden.push_back(std::move(name));
    } else if (is_folder) {
      (entry.is_symlink(ignored) ? names.links : names.folders).push_back(std::move(name));
    } else {
      names.files.push_back(std::move(name));
    }
  }
  for (auto* list : {&names.folders, &names.links, &names.files, &names.hidden}) std::sort(list->begin(), list->end());
  return names;
}

/// File names of a picture and of its caption.
struct NamedPicture {
  std::string picture;
  std::string caption;  ///< empty if there is none
};

/// Finds the caption file of each picture; sorted by the name of the picture. Other files that have a caption file are
/// added to `others`.
std::vector<NamedPicture> pair_up(const fs::path& folder, const std::vector<std::string>& files,
                                  std::vector<std::string>& others) {
  // ".txt" wins over ".TXT" and ".Txt": names are sorted by bytes, so it comes last and overwrites them.
  std::unordered_map<std::string, std::string> captions;  // by stem
  for (const auto& file : files) {
    const fs::path name(file);
    if (lower_case(name.extension().string()) == ".txt") captions[name.stem().string()] = file;
  }
  std::vector<NamedPicture> pictures;
  std::set<std::string_view> pictured;  // caption files of pictures with a known extension
  const auto caption_of = [&](const std::string& file) { return captions.find(fs::path(file).stem().string()); };
  for (const auto& file : files) {
    if (!has_picture_extension(file)) continue;
    const auto caption = caption_of(file);
    pictures.push_back({file, caption == captions.end() ? "" : caption->second});
    if (caption != captions.end()) pictured.insert(caption->second);
  }
  for (const auto& file : files) {
    const auto caption = caption_of(file);
    const bool unclear = caption != captions.end() && !has_picture_extension(file) &&
                         lower_case(fs::path(file).extension().string()) != ".txt" &&
                         pictured.count(caption->second) == 0;
    if (!unclear) continue;
    if (begins_as_picture(folder / file)) {
      pictures.push_back({file, caption->second});
    } else {
      others.push_back(file);
    }
  }
  std::sort(pictures.begin(), pictures.end(), [](const auto& a, const auto& b) { return a.picture < b.picture; });
  return pictures;
}

/// A picture, or why it is left out.
struct Finding {
  CaptionedPicture picture;
  LeftOut LeftOuts::*fault = nullptr;
  std::string reason;
};

/// Reads the caption and the header of a picture; takes both from `earlier` if size and time are the same.
Finding look_at(const fs::path& root, const std::string& path, const fs::path& caption_path,
                const CaptionedPicture* earlier) {
  Finding finding;
  finding.picture.path = path;
  const auto fail = [&finding](LeftOut LeftOuts::*fault, std::string why = {}) {
    finding.fault = fault;
    finding.reason = std::move(why);
    return finding;
  };
  if (caption_path.empty()) return fail(&LeftOuts::without_caption_file);
  const auto picture = status_of(root / path);
  const auto caption = status_of(caption_path);
  if (caption.error != 0) return fail(&LeftOuts::unreadable_captions, reason(caption.error));
  if (!caption.regular) return fail(&LeftOuts::unreadable_captions, "it isn't a file");
  finding.picture.bytes = picture.bytes;
  finding.picture.modified = std::max(picture.modified, caption.modified);
  if (earlier != nullptr && earlier->bytes == picture.bytes && earlier->modified == finding.picture.modified) {
    finding.picture = *earlier;
    return finding;
  }
  constexpr size_t kMaxCaption = 1 << 20;  // of a larger file only the beginning is searched for a caption
  std::string text;
  if (!read_beginning(caption_path, std::min(kMaxCaption, static_cast<size_t>(caption.bytes)), text)) {
    return fail(&LeftOuts::unreadable_captions, reason(errno));
  }
  auto read = caption_from_text(text);
  if (read.fault == Caption::Fault::kEmpty) return fail(&LeftOuts::empty_captions);
  if (read.fault == Caption::Fault::kNotUtf8) return fail(&LeftOuts::captions_not_utf8);
  if (read.fault == Caption::Fault::kControlCharacter) return fail(&LeftOuts::captions_with_control);
  finding.picture.caption = std::move(read.text);
  const auto header = read_picture_header(root / path);
  if (!header.ok()) return fail(&LeftOuts::unreadable_pictures, header.error);
  finding.picture.width = header.size.width;
  finding.picture.height = header.size.height;
  return finding;
}

std::string joined(const std::string& folder, const std::string& name) {
  return folder.empty() ? name : folder + "/" + name;
}

/// Whether what was left out of a folder stays left out until its list of files changes.
bool is_settled(const LeftOuts& left_out) {
  return left_out.unreadable_pictures.count + left_out.empty_captions.count + left_out.unreadable_captions.count +
             left_out.captions_not_utf8.count + left_out.captions_with_control.count + left_out.other_files.count +
             left_out.unreadable_folders.count ==
         0;
}

class Scan {
 public:
  Scan(const fs::path& folder, PictureIndex earlier, const std::function<void(int64_t)>& progress)
      : root_(folder), progress_(progress) {
    std::error_code error;
    const auto status = status_of(folder);
    TORCH_CHECK_VALUE(status.error == 0 && status.folder, "picture folder ", printable(folder.string()),
                      " isn't a folder", status.error == 0 ? "" : ": " + reason(status.error));
    index_.folder = fs::canonical(folder, error).string();
    // A link to a parent folder would lead here again.
    for (fs::path above(index_.folder); above.has_relative_path();) {
      above = above.parent_path();
      seen_.insert(status_of(above).identity);
    }
    if (earlier.folder != index_.folder) return;
    for (auto& old : earlier.folders) {
      auto path = old.path;
      earlier_.emplace(std::move(path), std::move(old));
    }
  }

  PictureIndex run() {
    std::vector<std::string> links;
    walk("", links);
    // Links come last, so that a folder that is also here without a link keeps its own path; walk() appends to `links`.
    for (size_t i = 0; i < links.size(); ++i) walk(std::string(links[i]), links);
    return std::move(index_);
  }

 private:
  void walk(const std::string& path, std::vector<std::string>& links) {
    const auto status = status_of(root_ / path);
    if (status.error == 0 && !seen_.insert(status.identity).second) return;
    index_.folders.push_back(scanned(path, status));
    // A copy, as index_.folders grows below.
    const auto folders = index_.folders.back().folders;
    for (const auto& name : index_.folders.back().links) links.push_back(joined(path, name));
    for (const auto& name : folders) walk(joined(path, name), links);
  }

  ScannedFolder scanned(const std::string& path, const FileStatus& status) {
    const auto found = earlier_.find(path);
    ScannedFolder* earlier = found == earlier_.end() ? nullptr : &found->second;
    if (earlier != nullptr && earlier->changed != 0 && earlier->changed == status.changed &&
        is_settled(earlier->left_out)) {
      num_pictures_ += static_cast<int64_t>(earlier->pictures.size());
      return std::move(*earlier);
    }
    ScannedFolder folder;
    folder.path = path;
    FolderNames names;
    try {
      names = list_folder(root_ / path);
    } catch (const fs::filesystem_error& error) {
      TORCH_CHECK_VALUE(!path.empty(), "picture folder ", printable(root_.string()),
                        " can't be read: ", error.code().message());
      folder.left_out.unreadable_folders.add(shown(path) + ": " + error.code().message());
      return folder;
    }
    // A change within one tick of the file system's clock doesn't change its time: don't trust recent times.
    constexpr int64_t kTwoSeconds = 2'000'000'000;
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    const auto now_ns = std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
    if (status.changed < now_ns - kTwoSeconds) folder.changed = status.changed;
    folder.folders = std::move(names.folders);
    folder.links = std::move(names.links);
    for (const auto& name : names.hidden) folder.left_out.hidden.add(shown(joined(path, name)));
    std::vector<std::string> others;
    const auto pictures = pair_up(root_ / path, names.files, others);
    for (const auto& name : others) folder.left_out.other_files.add(shown(joined(path, name)));
    look_at_all(pictures, earlier, folder);
    return folder;
  }

  /// In portions, to report progress between them.
  void look_at_all(const std::vector<NamedPicture>& names, const ScannedFolder* earlier, ScannedFolder& folder) {
    constexpr size_t kPortion = 4096;
    constexpr int64_t kThreads = 8;
    constexpr size_t kWorthIt = 64;
    for (size_t begin = 0; begin < names.size(); begin += kPortion) {
      std::vector<Finding> findings(std::min(kPortion, names.size() - begin));
      // On several threads because most time is spent waiting for disk or network.
      for_each_index(findings.size(), findings.size() < kWorthIt ? 1 : kThreads, [&](size_t i) {
        const auto& [picture, caption] = names[begin + i];
        const auto path = joined(folder.path, picture);
        findings[i] = look_at(root_, path, caption.empty() ? fs::path() : root_ / folder.path / caption,
                              earlier == nullptr ? nullptr : picture_in(*earlier, path));
      });
      for (size_t i = 0; i < findings.size(); ++i) {
        auto& finding = findings[i];
        if (finding.fault == nullptr) {
          folder.pictures.push_back(std::move(finding.picture));
        } else {
          const bool of_picture =
              finding.fault == &LeftOuts::unreadable_pictures || finding.fault == &LeftOuts::without_caption_file;
          const auto file = of_picture ? finding.picture.path : joined(folder.path, names[begin + i].caption);
          (folder.left_out.*finding.fault).add(shown(file) + (finding.reason.empty() ? "" : ": " + finding.reason));
        }
      }
      num_pictures_ += static_cast<int64_t>(findings.size());
      if (progress_) progress_(num_pictures_);
    }
  }

  static const CaptionedPicture* picture_in(const ScannedFolder& folder, const std::string& path) {
    const auto found = std::lower_bound(folder.pictures.begin(), folder.pictures.end(), path,
                                        [](const auto& picture, const auto& name) { return picture.path < name; });
    return found == folder.pictures.end() || found->path != path ? nullptr : &*found;
  }

  std::string shown(const std::string& path) const { return printable((root_ / path).string()); }

  const fs::path root_;
  const std::function<void(int64_t)>& progress_;
  PictureIndex index_;
  std::unordered_map<std::string, ScannedFolder> earlier_;
  std::set<std::pair<uint64_t, uint64_t>> seen_;
  int64_t num_pictures_ = 0;
};

/// "pictures that are ..." as "picture that is ...".
std::string singular(std::string text) {
  const auto space = text.find(' ');
  if (text[space - 1] == 's') text.erase(space - 1, 1);
  if (const auto are = text.find(" are "); are != std::string::npos) text.replace(are, 5, " is ");
  return text;
}

// An index as bytes: numbers have 8 bytes; texts and lists follow their lengths.

constexpr std::string_view kIndexMark = "megatron_cpp picture index 1\n";

struct Writer {
  std::string bytes;
  void operator()(const int64_t& value) {
    for (int shift = 0; shift < 64; shift += 8) {
      bytes.push_back(static_cast<char>(static_cast<uint64_t>(value) >> shift & 0xff));
    }
  }
  void operator()(const std::string& text) {
    (*this)(static_cast<int64_t>(text.size()));
    bytes += text;
  }
  template <class Value, class Each>
  void list(const std::vector<Value>& values, const Each& each) {
    (*this)(static_cast<int64_t>(values.size()));
    for (const auto& value : values) each(*this, value);
  }
};

struct Reader {
  std::string_view bytes;
  bool ok = true;
  void operator()(int64_t& value) {
    value = 0;
    ok = ok && bytes.size() >= 8;
    if (!ok) return;
    uint64_t bits = 0;
    for (size_t i = 8; i > 0; --i) bits = bits << 8 | static_cast<unsigned char>(bytes[i - 1]);
    value = static_cast<int64_t>(bits);
    bytes.remove_prefix(8);
  }
  /// The length of a text or list, which can't exceed the bytes that are left.
  size_t length() {
    int64_t value = 0;
    (*this)(value);
    ok = ok && value >= 0 && static_cast<uint64_t>(value) <= bytes.size();
    return ok ? static_cast<size_t>(value) : 0;
  }
  void operator()(std::string& text) {
    const auto size = length();
    text = bytes.substr(0, size);
    bytes.remove_prefix(size);
  }
  template <class Value, class Each>
  void list(std::vector<Value>& values, const Each& each) {
    const auto count = length();
    for (size_t i = 0; ok && i < count; ++i) each(*this, values.emplace_back());
  }
};

/// Visits the fields of an index in one order, for Writer and Reader.
template <class Archive, class Index>
void archive_index(Archive& archive, Index& index) {
  archive(index.folder);
  archive.list(index.folders, [](Archive& a, auto& folder) {
    const auto text = [](Archive& b, auto& value) { b(value); };
    a(folder.path);
    a(folder.changed);
    a.list(folder.folders, text);
    a.list(folder.links, text);
    LeftOuts::visit(folder.left_out, [&](auto& left_out, const char*) {
      a(left_out.count);
      a(left_out.first);
    });
    a.list(folder.pictures, [](Archive& b, auto& picture) {
      b(picture.path);
      b(picture.caption);
      b(picture.width);
      b(picture.height);
      b(picture.bytes);
      b(picture.modified);
    });
  });
}

}  // namespace

bool has_picture_extension(const fs::path& name) {
  constexpr std::string_view kExtensions[] = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp",
                                              ".gif", ".bmp", ".dib",  ".tif", ".tiff"};
  return is_one_of(lower_case(name.extension().string()), kExtensions);
}

std::string_view trim(std::string_view text) {
  constexpr std::string_view kBlanks = " \t\r\v\f";
  const auto begin = text.find_first_not_of(kBlanks);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kBlanks) - begin + 1);
}

Caption caption_from_text(std::string_view text) {
  const auto decoded = decoded_by_mark(text);
  std::string_view rest = decoded;
  while (!rest.empty()) {
    const auto line = rest.substr(0, rest.find_first_of("\r\n"));
    if (const auto caption = trim(line); !caption.empty()) {
      if (!is_utf8(caption)) return {{}, Caption::Fault::kNotUtf8};
      if (has_control_character(caption)) return {{}, Caption::Fault::kControlCharacter};
      return {std::string(caption), Caption::Fault::kNone};
    }
    rest.remove_prefix(std::min(line.size() + 1, rest.size()));
  }
  return {{}, Caption::Fault::kEmpty};
}

int64_t modification_time(const fs::path& file) { return status_of(file).modified; }

PictureIndex scan_folder(const fs::path& folder, PictureIndex earlier, const std::function<void(int64_t)>& progress) {
  return Scan(folder, std::move(earlier), progress).run();
}

CaptionedPictures pictures_of(PictureIndex index, const fs::path& folder) {
  CaptionedPictures result;
  result.folder = folder;
  std::vector<LeftOut*> totals;
  LeftOuts::visit(result.left_out, [&](LeftOut& left_out, const char*) { totals.push_back(&left_out); });
  for (auto& part : index.folders) {
    size_t i = 0;
    LeftOuts::visit(part.left_out, [&](const LeftOut& left_out, const char*) { totals[i++]->add(left_out); });
    std::move(part.pictures.begin(), part.pictures.end(), std::back_inserter(result.pictures));
    part.pictures = {};
  }
  std::sort(result.pictures.begin(), result.pictures.end(),
            [](const auto& a, const auto& b) { return a.path < b.path; });
  std::string reasons;
  for (const auto& sentence : sentences(result)) reasons += (reasons.empty() ? ": " : "; ") + sentence;
  TORCH_CHECK_VALUE(!result.pictures.empty(), "picture folder ", printable(folder.string()),
                    " has no captioned picture that can be read", reasons);
  return result;
}

std::vector<std::string> sentences(const CaptionedPictures& found) {
  std::vector<std::string> result;
  LeftOuts::visit(found.left_out, [&](const LeftOut& left_out, const char* what) {
    if (left_out.count == 0) return;
    auto text = fmt::format("{} {}", left_out.count, left_out.count == 1 ? singular(what) : what);
    if (&left_out == &found.left_out.unreadable_pictures) {
      const auto total = left_out.count + static_cast<int64_t>(found.pictures.size());
      text = fmt::format("{} of {} pictures can't be read", left_out.count, total);
    }
    result.push_back(fmt::format("{} (first: {})", text, left_out.first));
  });
  return result;
}

std::string to_bytes(const PictureIndex& index) {
  Writer body;
  archive_index(body, index);
  Writer whole;
  whole.bytes = kIndexMark;
  whole(static_cast<int64_t>(parallel::stable_hash(body.bytes)));
  return whole.bytes + body.bytes;
}

std::optional<PictureIndex> index_from_bytes(std::string_view bytes) {
  if (!bytes.starts_with(kIndexMark)) return std::nullopt;
  Reader reader{bytes.substr(kIndexMark.size())};
  int64_t hash = 0;
  reader(hash);
  if (!reader.ok || hash != static_cast<int64_t>(parallel::stable_hash(reader.bytes))) return std::nullopt;
  PictureIndex index;
  archive_index(reader, index);
  if (!reader.ok || !reader.bytes.empty()) return std::nullopt;
  return index;
}

CaptionedPictures scan_captioned_pictures(const fs::path& folder) { return pictures_of(scan_folder(folder), folder); }

bool is_held_out(std::string_view relative_path, double fraction) {
  TORCH_CHECK_VALUE(fraction >= 0.0 && fraction <= 1.0, "held-out fraction ", fraction, " isn't in [0, 1]");
  constexpr double kUnit = 0x1p-53;  // the leading 53 bits are exact in a double
  return static_cast<double>(parallel::mixed_hash(parallel::stable_hash(relative_path)) >> 11) * kUnit < fraction;
}

PictureSplit split_held_out(std::vector<CaptionedPicture> pictures, double fraction) {
  PictureSplit split;
  for (auto& picture : pictures) {
    (is_held_out(picture.path, fraction) ? split.held_out : split.training).push_back(std::move(picture));
  }
  return split;
}

}  // namespace megatron_cpp::step37
