// A folder of pictures, each with its caption in a text file beside it.
//
// Layout: `a/b/name.png` (or .jpg, .jpeg; any case) and `a/b/name.txt`, whose first line that isn't blank is the
// English caption. This is how Debian's package tuxpaint-stamps-default is laid out: 785 captioned pictures.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace step37 {

struct CaptionedPicture {
  std::string path;     ///< relative to the folder, with '/' between its parts
  std::string caption;  ///< one line of UTF-8, never empty
};

/// What a folder holds.
struct CaptionedPictures {
  std::filesystem::path folder;
  std::vector<CaptionedPicture> pictures;  ///< sorted by the bytes of `path`
  int64_t num_without_caption_file = 0;    ///< pictures left out because they have no .txt beside them
  int64_t num_with_empty_caption = 0;      ///< pictures left out because their .txt has no line that isn't blank
};

/// Searches `folder` and the folders below it; links to folders aren't followed. The result depends on the files alone,
/// not on locale or directory order, so every rank that reads the same files gets the same list. Pictures aren't
/// opened.
/// @throws c10::ValueError naming the folder if it isn't one, can't be read, or has no captioned picture.
CaptionedPictures scan_captioned_pictures(const std::filesystem::path& folder);

/// The caption in the text of a caption file: its first line that isn't blank, without byte order mark, carriage
/// returns and surrounding blanks. Empty if there is none.
std::string caption_from_text(std::string_view text);

/// Pictures to train on and pictures to measure on, in the order they were given.
struct PictureSplit {
  std::vector<CaptionedPicture> training;
  std::vector<CaptionedPicture> held_out;
};

/// Whether a picture is held out: its path, hashed to a number in [0, 1), falls below `fraction`. It depends on this
/// one path, so pictures that come or go never move another one to the other side, and a larger fraction holds out a
/// superset.
/// @throws c10::ValueError if `fraction` isn't in [0, 1].
bool is_held_out(std::string_view relative_path, double fraction);

/// Splits by is_held_out.
PictureSplit split_held_out(const std::vector<CaptionedPicture>& pictures, double fraction = 0.05);

}  // namespace step37
