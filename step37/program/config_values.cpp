#include "step37/program/config_values.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <array>
#include <charconv>
#include <cmath>
#include <iterator>
#include <sstream>
#include <string_view>
#include <system_error>

#include "step37/data/utf8.h"

namespace megatron_cpp::step37 {
namespace {

constexpr std::pair<std::string_view, bool Recompute::*> kRecomputedParts[] = {
    {"core_attention", &Recompute::core_attention},
    {"mlp", &Recompute::mlp},
    {"experts", &Recompute::experts},
    {"norms", &Recompute::norms},
    {"tower", &Recompute::tower}};

template <class Number>
bool read_number(std::string_view text, Number& value) {
  if (text.starts_with('+') && !text.starts_with("+-")) text.remove_prefix(1);
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size();
}

}  // namespace

Names<EmbeddingSharding> names_of(EmbeddingSharding /*type*/) {
  return {{"vocab", EmbeddingSharding::kVocab}, {"hidden", EmbeddingSharding::kHidden}};
}
Names<ProjectorSharding> names_of(ProjectorSharding /*type*/) {
  using enum ProjectorSharding;
  return {{"replicated", kReplicated}, {"column", kColumn}, {"row", kRow}};
}
Names<InsertExchange> names_of(InsertExchange /*type*/) {
  return {{"fused", InsertExchange::kFused}, {"all-gather", InsertExchange::kAllGather}};
}
Names<MmEncoderTpMode> names_of(MmEncoderTpMode /*type*/) {
  return {{"data", MmEncoderTpMode::kData}, {"weights", MmEncoderTpMode::kWeights}};
}
Names<LearningRateDecay> names_of(LearningRateDecay /*type*/) {
  using enum LearningRateDecay;
  return {{"cosine", kCosine}, {"linear", kLinear}, {"constant", kConstant}, {"wsd", kWsd}};
}
Names<OversizePolicy> names_of(OversizePolicy /*type*/) {
  return {{"drop", OversizePolicy::kDrop}, {"extend", OversizePolicy::kExtend}};
}
Names<DataSetKind> names_of(DataSetKind /*type*/) {
  return {{"captions", DataSetKind::kCaptions}, {"conversations", DataSetKind::kConversations},
          {"tokens", DataSetKind::kTokens},     {"webdataset", DataSetKind::kWebDataset},
          {"indexed", DataSetKind::kIndexed},   {"flickr8k", DataSetKind::kFlickr8k}};
}
Names<TrainedTurns> names_of(TrainedTurns /*type*/) {
  return {{"last", TrainedTurns::kAfterLastUser}, {"all", TrainedTurns::kAll}};
}
Names<NotFiniteAction> names_of(NotFiniteAction /*type*/) {
  return {{"stop", NotFiniteAction::kStop}, {"skip", NotFiniteAction::kSkip}};
}
Names<WriteErrorAction> names_of(WriteErrorAction /*type*/) {
  return {{"stop", WriteErrorAction::kStop}, {"continue", WriteErrorAction::kContinue}};
}
Names<at::ScalarType> names_of(at::ScalarType /*type*/) {
  return {{"float32", at::kFloat}, {"bfloat16", at::kBFloat16}};
}
Names<bool> names_of(bool /*type*/) {
  return {{"true", true}, {"false", false}, {"True", true}, {"False", false}, {"TRUE", true}, {"FALSE", false}};
}

std::string write_value(const std::string& value) { return value; }
std::string write_value(int64_t value) { return fmt::to_string(value); }
std::string write_value(double value) {
  std::array<char, 32> digits{};
  return {digits.data(), std::to_chars(digits.data(), digits.data() + digits.size(), value).ptr};
}
std::string write_value(const std::optional<int64_t>& value) { return value ? fmt::to_string(*value) : "all"; }
std::string write_value(const LossChunk& value) { return value.positions ? fmt::to_string(*value.positions) : "auto"; }
std::string write_value(const ParameterScales& value) {
  std::string text;
  for (const auto& [prefix, scale] : value) {
    text += fmt::format("{}{}: {}", text.empty() ? "" : ", ", prefix, write_value(scale));
  }
  return text;
}

std::string write_value(const DataSetSections& value) { return to_text(value); }
std::string write_value(const Recompute& value) {
  if (value.full) return "full";
  std::string text;
  for (const auto& [name, part] : kRecomputedParts) {
    if (value.*part) text.append(text.empty() ? "" : ", ").append(name);
  }
  return text.empty() ? "none" : text;
}

std::string write_value(const StepRange& value) {
  if (value.first == 0) return "none";
  return value.first == value.last ? fmt::to_string(value.first) : fmt::format("{}-{}", value.first, value.last);
}

std::string read_value(const std::string& text, std::string& value) {
  value = text;
  return is_utf8(text) ? "" : "text in UTF-8";  // checkpoints keep settings as JSON
}
std::string read_value(const std::string& text, int64_t& value) { return read_number(text, value) ? "" : "an integer"; }
std::string read_value(const std::string& text, double& value) {
  return read_number(text, value) && std::isfinite(value) ? "" : "a number";
}
std::string read_value(const std::string& text, std::optional<int64_t>& value) {
  if (text == "all") return value.reset(), "";
  return read_number(text, value.emplace()) ? "" : "an integer or all";
}
std::string read_value(const std::string& text, LossChunk& value) {
  if (text == "auto") return value.positions.reset(), "";
  return read_number(text, value.positions.emplace()) ? "" : "an integer or auto";
}
std::string read_value(const std::string& text, StepRange& value) {
  constexpr char kWanted[] = "none, a step as 3, or steps as 3-5";
  if (text == "none") return value = {}, "";
  const auto dash = text.find('-');
  const auto first = text.substr(0, dash);
  const bool is_read = read_number(first, value.first) &&
                       read_number(dash == std::string::npos ? first : text.substr(dash + 1), value.last);
  return is_read && 0 < value.first && value.first <= value.last ? "" : kWanted;
}
std::string read_value(const std::string& text, ParameterScales& value) {
  value.clear();
  std::istringstream entries(text);
  bool is_read = is_utf8(text);
  for (std::string entry; is_read && std::getline(entries, entry, ',');) {
    std::istringstream parts(entry);
    std::string prefix;
    std::string number;
    double scale = 0.0;
    is_read = std::getline(parts >> std::ws, prefix, ':') && parts >> number && (parts >> std::ws).eof() &&
              read_value(number, scale).empty() && value.emplace(prefix, scale).second;
  }
  return is_read ? "" : "names with a factor each, as a: 0.1, b.c: 2";
}

std::string read_value(const std::string& text, Recompute& value) {
  value = {.full = text == "full"};
  if (text == "full" || text == "none") return "";
  std::istringstream entries(text);
  bool is_read = !text.empty() && !text.ends_with(',');
  for (std::string entry; is_read && std::getline(entries, entry, ',');) {
    std::istringstream words(entry);
    std::string name;
    words >> name >> std::ws;
    const auto part = std::ranges::find(kRecomputedParts, name, [](const auto& known) { return known.first; });
    is_read = words.eof() && part != std::end(kRecomputedParts) && !std::exchange(value.*part->second, true);
  }
  return is_read ? "" : "none, full, or some of core_attention, mlp, experts, norms, tower";
}

std::string read_value(const std::string& text, DataSetSections& value) {
  if (!is_utf8(text)) return "data sets by name";
  try {
    value = data_sets_from_text(text);
  } catch (const c10::ValueError& error) {
    return fmt::format("data sets by name ({})", error.what_without_backtrace());
  }
  return "";
}

}  // namespace megatron_cpp::step37
