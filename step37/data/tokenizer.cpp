#include "step37/data/tokenizer.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <set>
#include <system_error>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "megatron_cpp/checkpoint/complete_file.h"
#include "step37/data/utf8.h"

namespace megatron_cpp::step37 {
namespace {

using sentencepiece::SentencePieceProcessor;
using sentencepiece::util::Status;

/// Hands a list of captions to the trainer.
class CaptionIterator final : public sentencepiece::SentenceIterator {
 public:
  explicit CaptionIterator(const std::vector<std::string>& captions) : captions_(captions) {}
  bool done() const override { return next_ == captions_.size(); }
  void Next() override { ++next_; }
  const std::string& value() const override { return captions_[next_]; }
  Status status() const override { return {}; }

 private:
  const std::vector<std::string>& captions_;
  size_t next_ = 0;
};

std::string control_symbols(const std::vector<std::string>& further) {
  std::string list;
  for (const auto symbol : kPictureSymbols) list.append(list.empty() ? "" : ",").append(symbol);
  for (const auto& symbol : further) list.append(",").append(symbol);
  return list;
}

/// SentencePiece reads the list as comma-separated values.
void check_symbols(const std::vector<std::string>& symbols) {
  std::set<std::string_view> known = {"<unk>", "<s>", "</s>", "<pad>"};
  known.insert(kPictureSymbols.begin(), kPictureSymbols.end());
  for (const auto& symbol : symbols) {
    TORCH_CHECK_VALUE(!symbol.empty() && symbol.find_first_of(" ,\"\t\r\n") == std::string::npos && is_utf8(symbol),
                      "control symbol '", printable(symbol), "' is empty or has a blank, comma or quote");
    TORCH_CHECK_VALUE(known.insert(symbol).second, "control symbol ", symbol, " is there twice");
  }
}

// 4 special ids, the picture symbols and 256 bytes.
constexpr int64_t kFixedPieces = 4 + static_cast<int64_t>(kPictureSymbols.size()) + 256;
constexpr double kCoverage = 0.9995;  // SentencePiece's default character_coverage

std::unordered_map<std::string, std::string> trainer_arguments(int64_t vocab_size,
                                                               const std::vector<std::string>& symbols) {
  return {
      {"model_type", "bpe"},
      {"vocab_size", fmt::to_string(vocab_size)},
      {"hard_vocab_limit", "false"},
      {"byte_fallback", "true"},
      {"character_coverage", fmt::to_string(kCoverage)},
      {"control_symbols", control_symbols(symbols)},
      {"unk_id", "0"},
      {"bos_id", "1"},
      {"eos_id", "2"},
      {"pad_id", "3"},
      // Needed for decode(encode(text)) == text.
      {"normalization_rule_name", "identity"},
      {"remove_extra_whitespaces", "false"},
      // SentencePiece skips longer captions.
      {"max_sentence_length", "1000000"},
      {"num_threads", "1"},
      {"minloglevel", "2"},
  };
}

std::vector<std::string> characters_of(const std::string& text) {
  std::vector<std::string> characters;
  for (size_t begin = 0; begin < text.size();) {
    size_t end = begin + 1;
    while (end < text.size() && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) ++end;
    characters.push_back(text.substr(begin, end - begin));
    begin = end;
  }
  return characters;
}

struct CharacterCount {
  std::string character;
  int64_t count;
};

/// The characters that make up kCoverage of the captions, most frequent first, counted as SentencePiece does: space is
/// a character, and each caption has one in front.
std::vector<CharacterCount> frequent_characters(const std::vector<std::string>& captions) {
  std::unordered_map<std::string, int64_t> counts;
  int64_t total = 0;
  for (const auto& caption : captions) {
    if (caption.empty()) continue;
    auto characters = characters_of(caption);
    characters.emplace_back(" ");
    for (const auto& character : characters) ++counts[character];
    total += static_cast<int64_t>(characters.size());
  }
  std::vector<CharacterCount> sorted;
  for (const auto& [character, count] : counts) sorted.push_back({character, count});
  std::sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) {
    return a.count != b.count ? a.count > b.count : a.character < b.character;
  });
  int64_t covered = 0;
  size_t taken = 0;
  for (; taken < sorted.size(); covered += sorted[taken++].count) {
    const auto share = static_cast<float>(1.0 * static_cast<double>(covered) / static_cast<double>(total));
    if (share >= static_cast<float>(kCoverage)) break;
  }
  sorted.resize(taken);
  return sorted;
}

/// Keeps the `most` most frequent characters of `captions` and replaces the others by a space, which no piece spans.
std::vector<std::string> without_rare_characters(const std::vector<std::string>& captions,
                                                 const std::vector<CharacterCount>& frequent, int64_t most) {
  std::unordered_set<std::string> kept;
  for (int64_t i = 0; i < most; ++i) kept.insert(frequent[static_cast<size_t>(i)].character);
  std::vector<std::string> result;
  for (const auto& caption : captions) {
    std::string text;
    for (const auto& character : characters_of(caption)) text += kept.count(character) > 0 ? character : " ";
    result.push_back(std::move(text));
  }
  return result;
}

/// What is wrong with a model, or nothing.
std::string check_model(const SentencePieceProcessor& model) {
  if (model.bos_id() < 0) return "has no begin symbol";
  if (model.eos_id() < 0) return "has no end symbol";
  if (model.pad_id() < 0) return "has no padding symbol";
  for (const auto symbol : kPictureSymbols) {
    const int id = model.PieceToId(symbol);
    if (id == model.unk_id() || model.IsControl(id)) continue;
    return fmt::format("has {} as a piece of text, not as a control symbol: text could turn into it", symbol);
  }
  return {};
}

}  // namespace

struct Tokenizer::Impl {
  SentencePieceProcessor model;
  std::string name;  ///< the file, or what the model was trained on, for messages
};

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

Tokenizer Tokenizer::train(const std::vector<std::string>& captions, int64_t vocab_size,
                           const std::vector<std::string>& symbols) {
  TORCH_CHECK_VALUE(!captions.empty(), "no captions to train a tokenizer on");
  check_symbols(symbols);
  const auto frequent = frequent_characters(captions);
  const auto fixed = kFixedPieces + static_cast<int64_t>(symbols.size());
  const auto room = vocab_size - fixed;
  const auto wanted = static_cast<int64_t>(frequent.size());
  TORCH_CHECK_VALUE(room > 1, "data.vocabulary_size ", vocab_size, " is too small: at least ", fixed + 2,
                    " are needed for bytes and symbols, and ", fixed + wanted, " for the characters of the captions");
  // room - 1, as one piece is the space that replaces rare characters.
  const auto known = room < wanted ? without_rare_characters(captions, frequent, room - 1) : captions;
  CaptionIterator iterator(known);
  std::string serialized;
  const auto trained =
      sentencepiece::SentencePieceTrainer::Train(trainer_arguments(vocab_size, symbols), &iterator, &serialized);
  TORCH_CHECK_VALUE(trained.ok(), "can't train a tokenizer of ", vocab_size, " pieces on ", captions.size(),
                    " captions: ", trained.ToString());

  auto impl = std::make_unique<Impl>();
  impl->name = fmt::format("tokenizer trained on {} captions", captions.size());
  const auto loaded = impl->model.LoadFromSerializedProto(serialized);
  TORCH_INTERNAL_ASSERT(loaded.ok() && check_model(impl->model).empty(), impl->name, ": ", loaded.ToString());
  return Tokenizer(std::move(impl));
}

Tokenizer::Needed Tokenizer::needed(const std::vector<std::string>& captions, const std::vector<std::string>& symbols) {
  const auto frequent = static_cast<int64_t>(frequent_characters(captions).size());
  return {frequent, frequent + kFixedPieces + static_cast<int64_t>(symbols.size())};
}

Tokenizer Tokenizer::load(const std::filesystem::path& path) {
  auto impl = std::make_unique<Impl>();
  impl->name = "tokenizer model " + path.string();
  std::error_code not_there;
  TORCH_CHECK_VALUE(std::filesystem::is_regular_file(path, not_there), impl->name, " isn't a file");
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK_VALUE(file.good(), impl->name, " can't be opened");
  const std::string serialized(std::istreambuf_iterator<char>(file), {});
  // An empty file parses as a model without pieces.
  TORCH_CHECK_VALUE(!serialized.empty(), impl->name, " is empty");
  const auto loaded = impl->model.LoadFromSerializedProto(serialized);
  TORCH_CHECK_VALUE(loaded.ok(), impl->name, " can't be loaded: ", loaded.ToString());
  const auto fault = check_model(impl->model);
  TORCH_CHECK_VALUE(fault.empty(), impl->name, " ", fault);
  return Tokenizer(std::move(impl));
}

void Tokenizer::save(const std::filesystem::path& path) const {
  write_file(path, impl_->model.serialized_model_proto());
}

std::vector<int64_t> Tokenizer::encode(std::string_view text) const {
  std::vector<int> ids;
  const auto status = impl_->model.Encode(text, &ids);
  TORCH_INTERNAL_ASSERT(status.ok(), impl_->name, ": ", status.ToString());
  return {ids.begin(), ids.end()};
}

std::string Tokenizer::decode(const std::vector<int64_t>& ids) const {
  std::vector<int> narrow;
  narrow.reserve(ids.size());
  for (const int64_t id : ids) {
    TORCH_CHECK_VALUE(id >= 0 && id < vocab_size(), impl_->name, ": id ", id, " isn't in [0, ", vocab_size(), ")");
    narrow.push_back(static_cast<int>(id));
  }
  std::string text;
  const auto status = impl_->model.Decode(narrow, &text);
  TORCH_INTERNAL_ASSERT(status.ok(), impl_->name, ": ", status.ToString());
  return text;
}

bool Tokenizer::has(std::string_view symbol) const {
  // PieceToId returns the unknown id for symbols that aren't there.
  const int id = impl_->model.PieceToId(symbol);
  return id != impl_->model.unk_id() || symbol == impl_->model.IdToPiece(id);
}

int64_t Tokenizer::id_of(std::string_view symbol) const {
  TORCH_CHECK_VALUE(has(symbol), impl_->name, " has no symbol ", symbol);
  return impl_->model.PieceToId(symbol);
}

int64_t Tokenizer::control_id(std::string_view symbol) const {
  const auto id = id_of(symbol);
  TORCH_CHECK_VALUE(impl_->model.IsControl(static_cast<int>(id)), impl_->name, " has ", symbol,
                    " as a piece of text, not as a control symbol: text could turn into it");
  return id;
}

int64_t Tokenizer::vocab_size() const { return impl_->model.GetPieceSize(); }
int64_t Tokenizer::unk_id() const { return impl_->model.unk_id(); }
int64_t Tokenizer::bos_id() const { return impl_->model.bos_id(); }
int64_t Tokenizer::eos_id() const { return impl_->model.eos_id(); }
int64_t Tokenizer::pad_id() const { return impl_->model.pad_id(); }

}  // namespace megatron_cpp::step37
