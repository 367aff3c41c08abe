// A folder of pictures, each with its caption in a text file of the same name.
//
// Layout: `a/b/name.png` and `a/b/name.txt`, whose first line that isn't blank is the English caption. This is how
// Debian's package tuxpaint-stamps-default is laid out: 785 captioned pictures. Which files are pictures:
//   - names that end in .png .jpg .jpeg .jpe .jfif .webp .gif .bmp .dib .tif .tiff, in any case, and
//   - other files that have a caption file and no picture of the same name, if they begin with a picture's signature.
// Left out: hidden files and folders (".*", also ._name of macOS), and system folders (lost+found, __MACOSX, @eaDir,
// $RECYCLE.BIN, ...), unless the searched folder itself is inside one. Links to folders are followed, but no folder is
// searched twice, and no parent of the searched folder is searched.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace megatron_cpp::step37 {

struct CaptionedPicture {
  std::string path;      ///< relative to the folder, with '/' between its parts; any bytes but 0
  std::string caption;   ///< one line of UTF-8 without control characters, never empty
  int64_t width = 0;     ///< pixels, upright
  int64_t height = 0;    ///< pixels, upright
  int64_t bytes = 0;     ///< of the picture file
  int64_t modified = 0;  ///< last modification of picture or caption file, whichever is later: ns since 1970
};

/// Files or folders that were left out for one reason.
struct LeftOut {
  int64_t count = 0;
  std::string first;  ///< printable path of the first, with the reason from the system or the decoder if there is one

  void add(std::string_view printable_path) {
    if (count++ == 0) first = printable_path;
  }
  void add(const LeftOut& more) {
    if (count == 0) first = more.first;
    count += more.count;
  }
};

/// Everything that can be left out of a folder.
struct LeftOuts {
  LeftOut unreadable_pictures;  ///< with a caption
  LeftOut without_caption_file;
  LeftOut empty_captions;  ///< no line that isn't blank
  LeftOut unreadable_captions;
  LeftOut captions_not_utf8;      ///< and without the byte order mark of another encoding
  LeftOut captions_with_control;  ///< characters other than tabs
  LeftOut other_files;            ///< with a caption, but no pictures
  LeftOut hidden;                 ///< folders, and files whose names are those of pictures
  LeftOut unreadable_folders;

  /// Calls visit(member, description) for every member, in this order.
  template <class Self, class Visit>
  static void visit(Self& self, const Visit& visit) {
    visit(self.unreadable_pictures, "pictures that can't be read");
    visit(self.without_caption_file, "pictures without a .txt beside them");
    visit(self.empty_captions, "pictures whose caption is empty");
    visit(self.unreadable_captions, "pictures whose caption can't be read");
    visit(self.captions_not_utf8, "pictures whose caption is neither UTF-8 nor marked as UTF-16 or UTF-32");
    visit(self.captions_with_control, "pictures whose caption has control characters");
    visit(self.other_files, "files with a caption that are none of PNG, JPEG, WebP, GIF, BMP, TIFF");
    visit(self.hidden, "hidden or system files and folders");
    visit(self.unreadable_folders, "folders that can't be read");
  }
};

/// One folder, without its subfolders.
struct ScannedFolder {
  std::string path;                        ///< relative to the searched folder; empty for that one
  int64_t changed = 0;                     ///< when its list of files last changed, ns since 1970; 0: search it again
  std::vector<CaptionedPicture> pictures;  ///< sorted by the bytes of `path`
  std::vector<std::string> folders;        ///< names of the folders in it, sorted
  std::vector<std::string> links;          ///< names of the links to folders in it, sorted
  LeftOuts left_out;
};

/// All folders of a search. A later search starts from it and opens only files that changed.
struct PictureIndex {
  std::string folder;  ///< canonical path of the searched folder
  std::vector<ScannedFolder> folders;
};

/// The captioned pictures of a folder and its subfolders.
struct CaptionedPictures {
  std::filesystem::path folder;
  std::vector<CaptionedPicture> pictures;  ///< sorted by the bytes of `path`
  LeftOuts left_out;
};

/// Searches `folder` and its subfolders. Reads captions and the headers of pictures, several files at once. Folders
/// that haven't changed since `earlier` are taken from it, and in other folders files with the same size and time.
/// Not collective: call it on one rank. The result depends only on the files, not on locale or directory order.
/// @param earlier   an earlier search; ignored if it is of another folder
/// @param progress  called now and then with the number of pictures found so far; may be empty
/// @throws c10::ValueError naming the folder if it isn't one or can't be read.
PictureIndex scan_folder(const std::filesystem::path& folder, PictureIndex earlier = {},
                         const std::function<void(int64_t)>& progress = {});

/// The pictures of all folders of an index.
/// @param folder  the searched folder's path as it was given
/// @throws c10::ValueError naming the folder if it has no captioned picture that can be read.
CaptionedPictures pictures_of(PictureIndex index, const std::filesystem::path& folder);

/// What was left out, one text per reason: "20 of 24 pictures can't be read (first: p/x.jpg: it is HEIF, ...)".
std::vector<std::string> sentences(const CaptionedPictures& found);

/// Writes an index to bytes and reads it back; nullopt if the bytes are no index of this format version.
std::string to_bytes(const PictureIndex& index);
std::optional<PictureIndex> index_from_bytes(std::string_view bytes);

/// scan_folder, then pictures_of.
CaptionedPictures scan_captioned_pictures(const std::filesystem::path& folder);

/// The time of the last modification of a file, ns since 1970; 0 if it isn't there.
int64_t modification_time(const std::filesystem::path& file);

/// A caption, or why there is none.
struct Caption {
  enum class Fault { kNone, kEmpty, kNotUtf8, kControlCharacter };
  std::string text;  ///< one line of UTF-8; empty with a fault
  Fault fault = Fault::kNone;
};

/// The caption in the text of a caption file: its first line that isn't blank, without byte order mark and surrounding
/// blanks. Lines end in a line feed, a carriage return or both. Text without a UTF-16 or UTF-32 mark is read as UTF-8.
Caption caption_from_text(std::string_view text);

/// Whether `name` ends as the names of pictures do (see above), in any case.
bool has_picture_extension(const std::filesystem::path& name);

/// `text` without blanks (space, tab, \r, \v, \f) at its ends.
std::string_view trim(std::string_view text);

/// Pictures for training and pictures for validation, in the order in which they were given.
struct PictureSplit {
  std::vector<CaptionedPicture> training;
  std::vector<CaptionedPicture> held_out;
};

/// Whether a picture is held out: its path, hashed to a number in [0, 1), is below `fraction`. As it depends on this
/// path only, adding or removing other pictures changes nothing, and a larger fraction holds out a superset.
/// @throws c10::ValueError if `fraction` isn't in [0, 1].
bool is_held_out(std::string_view relative_path, double fraction);

/// Splits by is_held_out.
PictureSplit split_held_out(std::vector<CaptionedPicture> pictures, double fraction = 0.05);

}  // namespace megatron_cpp::step37
