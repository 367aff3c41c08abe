// Text to token ids and back, by a SentencePiece model (https://github.com/google/sentencepiece).
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace megatron_cpp::step37 {

/// The symbols that stand for pictures in a token sequence.
inline constexpr std::array<std::string_view, 6> kPictureSymbols = {"<im_start>",    "<im_patch>",  "<im_end>",
                                                                    "<patch_start>", "<patch_end>", "<patch_newline>"};

/// A vocabulary and the rules to apply it.
///
/// decode(encode(text)) == text for every valid UTF-8 text without U+2581 (with which SentencePiece writes a space) and
/// without NUL: text isn't normalised, and characters outside the vocabulary are encoded as bytes. Invalid UTF-8 is
/// read as U+FFFD.
///
/// No text is encoded as a picture symbol or another symbol of a chat template: they are SentencePiece *control*
/// symbols, which have an id but are never matched in text (user-defined symbols would be). The text "<im_start>" is
/// encoded as these ten letters; id_of("<im_start>") gives the symbol.
///
/// Const member functions may be called from several threads.
class Tokenizer {
 public:
  /// Byte-pair encoding trained on `captions`: chosen over SentencePiece's unigram model because it reaches any
  /// vocabulary size that a few hundred captions can fill, and depends on counts only, so the same captions in the same
  /// order give the same model. Ids: 0 unknown, 1 begin, 2 end, 3 padding, then kPictureSymbols, then `symbols`, then
  /// the 256 bytes, then pieces of text.
  /// @param vocab_size an upper bound: short texts may not have that many pieces. If it is too small for all characters
  ///                   of the captions, the rarest are encoded as bytes; needed() gives a sufficient size.
  /// @param symbols    further control symbols, those of a chat template; no two are the same
  /// @throws c10::ValueError naming data.vocabulary_size if there is no caption, or `vocab_size` is below 268 and the
  ///         number of symbols; naming the symbol if it is empty, is there already or has a space, comma or quote.
  static Tokenizer train(const std::vector<std::string>& captions, int64_t vocab_size,
                         const std::vector<std::string>& symbols = {});

  /// The number of different characters that make up 99.95 % of the captions (SentencePiece's character_coverage),
  /// space included, and the smallest vocab_size with which train() makes a piece of each.
  struct Needed {
    int64_t num_characters = 0;
    int64_t vocab_size = 0;
  };
  static Needed needed(const std::vector<std::string>& captions, const std::vector<std::string>& symbols = {});

  /// Reads a model file.
  /// @throws c10::ValueError naming the file if it can't be read, is no SentencePiece model, lacks a begin, end or
  ///         padding id, or has a picture symbol that text could turn into.
  static Tokenizer load(const std::filesystem::path& path);

  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;

  /// Writes the model file, complete or not at all (write_file).
  void save(const std::filesystem::path& path) const;

  /// Ids of `text`, without begin and end.
  std::vector<int64_t> encode(std::string_view text) const;
  /// Text of `ids`; begin, end, padding and picture symbols give nothing.
  /// @throws c10::ValueError if an id isn't in [0, vocab_size()).
  std::string decode(const std::vector<int64_t>& ids) const;

  /// Id of a picture symbol or any other piece of the vocabulary.
  /// @throws c10::ValueError naming the symbol and the model file if it isn't there.
  int64_t id_of(std::string_view symbol) const;
  /// Whether the vocabulary has a piece of that name.
  bool has(std::string_view symbol) const;
  /// The same of a control symbol, which no text turns into.
  /// @throws c10::ValueError naming the symbol and the model file if it isn't there, or is a piece of text.
  int64_t control_id(std::string_view symbol) const;

  int64_t vocab_size() const;
  int64_t unk_id() const;
  int64_t bos_id() const;
  int64_t eos_id() const;
  int64_t pad_id() const;

 private:
  struct Impl;  // keeps SentencePiece's headers, which open a namespace absl, out of ours
  explicit Tokenizer(std::unique_ptr<Impl> impl);

  std::unique_ptr<Impl> impl_;
};

}  // namespace megatron_cpp::step37
