// The input is a picture's file name, a line, and then the text of the caption file beside it.
#include <set>
#include <vector>

#include "step37/data/captioned_pictures.h"
#include "step37/data/tokenizer.h"
#include "step37/data/utf8.h"
#include "tests/fuzz/fuzz.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp {
namespace {

/// Picture symbols in a caption's text included: they are letters there.
const step37::Tokenizer& tokenizer() {
  static const auto tokenizer = step37::Tokenizer::train(
      {"A duck.", "Two ducks swim.", "<im_start> and <im_patch>", "Été 2, \xE6\x97\xA5\xE6\x9C\xAC"}, 300);
  return tokenizer;
}

const std::set<int64_t>& picture_ids() {
  static const auto ids = [] {
    std::set<int64_t> of_symbols;
    for (const auto symbol : step37::kPictureSymbols) of_symbols.insert(tokenizer().id_of(symbol));
    return of_symbols;
  }();
  return ids;
}

/// A caption is one line of UTF-8 without blanks around it and control characters, and its own caption.
void check_caption(const step37::Caption& found) {
  const auto& caption = found.text;
  FUZZ_CHECK(!fuzz::contains(caption, "\n") && step37::is_utf8(caption) && !step37::has_control_character(caption));
  FUZZ_CHECK(step37::printable(caption).size() >= caption.size());
  FUZZ_CHECK(caption.empty() == (found.fault != step37::Caption::Fault::kNone));
  if (caption.empty()) return;
  constexpr std::string_view kBlanks = " \t\r\v\f";
  FUZZ_CHECK(!fuzz::contains(kBlanks, caption.substr(0, 1)) && !fuzz::contains(kBlanks, {&caption.back(), 1}));
  FUZZ_CHECK(step37::caption_from_text("\n \r\n" + caption + "\nmore").text == caption);
}

/// Any text becomes ids of pieces, never of picture symbols, and UTF-8 comes back.
void check_tokens(const std::string& text) {
  const auto ids = tokenizer().encode(text);
  for (const int64_t id : ids) {
    FUZZ_CHECK(id >= 0 && id < tokenizer().vocab_size(), "id ", id);
    FUZZ_CHECK(picture_ids().count(id) == 0, "the text turned into the picture symbol of id ", id);
  }
  const auto back = tokenizer().decode(ids);
  // As the header says: NUL and the letter with which SentencePiece writes a space are lost.
  const bool is_kept = step37::is_utf8(text) && !fuzz::contains(text, {"\0", 1}) && !fuzz::contains(text, "\u2581");
  if (is_kept) FUZZ_CHECK(back == text, back, " instead of ", text);
}

bool is_file_name(std::string_view name) {
  return !name.empty() && name.size() <= 200 && name != "." && name != ".." &&
         name.find_first_of(std::string_view("/\0", 2)) == std::string_view::npos;
}

/// A picture of one pixel.
constexpr std::string_view kGif("GIF89a\1\0\1\0\x80\0\0\xff\xff\xff\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0;", 35);

/// A folder that holds this picture and its caption only.
void check_scan(const std::string& name, std::string_view text, const std::string& caption) {
  static const test_support::TemporaryFolder folder;
  const auto picture = folder.write(name, kGif);
  const auto caption_file = folder.write(std::filesystem::path(name).replace_extension(".txt").string(), text);
  step37::CaptionedPictures found;
  const auto reason = fuzz::refusal([&] { found = step37::scan_captioned_pictures(folder.path()); });
  std::filesystem::remove(picture);
  std::filesystem::remove(caption_file);
  if (reason) {
    FUZZ_CHECK(fuzz::contains(*reason, folder.path().string()), *reason, " names no folder");
    FUZZ_CHECK(step37::is_utf8(*reason) && !fuzz::contains(*reason, "\n"), *reason);
    return;
  }
  FUZZ_CHECK(found.pictures.size() == 1 && found.pictures[0].path == name && found.pictures[0].caption == caption);
  FUZZ_CHECK(!caption.empty() && step37::sentences(found).empty());
  const auto split = step37::split_held_out(found.pictures, 0.5);
  FUZZ_CHECK(split.training.size() + split.held_out.size() == 1);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto input = fuzz::text_of(data, size);
  const std::string name(input.substr(0, input.find('\n')));
  const auto text = input.substr(std::min(name.size() + 1, input.size()));
  const auto caption = step37::caption_from_text(text);
  check_caption(caption);
  check_tokens(std::string(text));
  if (is_file_name(name)) check_scan(name, text, caption.text);
  return 0;
}

}  // namespace megatron_cpp
