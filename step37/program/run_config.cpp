#include "step37/program/run_config.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <sstream>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>

#include "parallel/shard.h"
#include "step37/data/utf8.h"
#include "step37/program/shell_text.h"
#include "step37/program/yaml_file.h"

namespace step37 {
namespace {

enum class Need { kOptional, kRequired };

/// The one list of keys: calls visit("section.key", member, Need) for each, in the order of the structs.
template <class Config, class Visit>
void visit_keys(Config& config, const Visit& visit) {
  constexpr auto kOptional = Need::kOptional;
  constexpr auto kRequired = Need::kRequired;
  visit("run.directory", config.run.directory, kOptional);
  visit("run.fresh", config.run.fresh, kOptional);
  visit("run.device", config.run.device, kOptional);
  visit("run.share_gpus", config.run.share_gpus, kOptional);
  visit("run.timeout_seconds", config.run.timeout_seconds, kOptional);
  visit("run.master_address", config.run.master_address, kOptional);
  visit("run.checked", config.run.checked, kOptional);
  visit("parallel.tp", config.parallel.tp, kOptional);
  visit("parallel.cp", config.parallel.cp, kOptional);
  visit("parallel.dp", config.parallel.dp, kOptional);
  visit("parallel.pp", config.parallel.pp, kOptional);
  visit("parallel.ep", config.parallel.ep, kOptional);
  visit("parallel.etp", config.parallel.etp, kOptional);
  visit("parallel.sequence_parallel", config.parallel.sequence_parallel, kOptional);
  visit("parallel.embedding_sharding", config.parallel.embedding_sharding, kOptional);
  visit("parallel.projector_sharding", config.parallel.projector_sharding, kOptional);
  visit("parallel.exchange", config.parallel.exchange, kOptional);
  visit("data.directory", config.data.directory, kRequired);
  visit("data.held_out", config.data.held_out, kOptional);
  visit("data.max_unreadable", config.data.max_unreadable, kOptional);
  visit("data.vocabulary_size", config.data.vocabulary_size, kOptional);
  visit("data.crops", config.data.crops, kOptional);
  visit("data.crop_side", config.data.crop_side, kOptional);
  visit("data.max_side", config.data.max_side, kOptional);
  visit("model.hidden_size", config.model.hidden_size, kRequired);
  visit("model.num_layers", config.model.num_layers, kRequired);
  visit("model.head_dim", config.model.head_dim, kRequired);
  visit("model.num_attention_heads", config.model.num_attention_heads, kRequired);
  visit("model.num_sliding_attention_heads", config.model.num_sliding_attention_heads, kRequired);
  visit("model.num_query_groups", config.model.num_query_groups, kRequired);
  visit("model.ffn_hidden_size", config.model.ffn_hidden_size, kRequired);
  visit("model.sliding_window", config.model.sliding_window, kRequired);
  visit("model.full_attention_interval", config.model.full_attention_interval, kOptional);
  visit("model.rope_theta", config.model.rope_theta, kOptional);
  visit("model.partial_rotary_factor", config.model.partial_rotary_factor, kOptional);
  visit("model.sliding_rope_theta", config.model.sliding_rope_theta, kOptional);
  visit("model.rms_norm_eps", config.model.rms_norm_eps, kOptional);
  visit("model.init_std", config.model.init_std, kOptional);
  visit("model.projector_bias", config.model.projector_bias, kOptional);
  visit("model.freeze_language_model", config.model.freeze_language_model, kOptional);
  visit("model.freeze_projector", config.model.freeze_projector, kOptional);
  visit("vision.image_size", config.vision.image_size, kRequired);
  visit("vision.patch_size", config.vision.patch_size, kOptional);
  visit("vision.width", config.vision.width, kRequired);
  visit("vision.layers", config.vision.layers, kRequired);
  visit("vision.heads", config.vision.heads, kRequired);
  visit("vision.mlp_width", config.vision.mlp_width, kRequired);
  visit("vision.freeze", config.vision.freeze, kOptional);
  visit("training.steps", config.training.steps, kRequired);
  visit("training.seed", config.training.seed, kOptional);
  visit("training.global_batch_size", config.training.global_batch_size, kOptional);
  visit("training.micro_batch_size", config.training.micro_batch_size, kOptional);
  visit("training.sequence_length", config.training.sequence_length, kOptional);
  visit("training.learning_rate", config.training.learning_rate, kOptional);
  visit("training.min_learning_rate", config.training.min_learning_rate, kOptional);
  visit("training.warmup_steps", config.training.warmup_steps, kOptional);
  visit("training.learning_rate_decay", config.training.learning_rate_decay, kOptional);
  visit("training.decay_steps", config.training.decay_steps, kOptional);
  visit("training.weight_decay", config.training.weight_decay, kOptional);
  visit("training.learning_rate_scales", config.training.learning_rate_scales, kOptional);
  visit("training.weight_decay_scales", config.training.weight_decay_scales, kOptional);
  visit("training.beta1", config.training.beta1, kOptional);
  visit("training.beta2", config.training.beta2, kOptional);
  visit("training.eps", config.training.eps, kOptional);
  visit("training.clip_grad_norm", config.training.clip_grad_norm, kOptional);
  visit("validation.interval", config.validation.interval, kOptional);
  visit("validation.packs", config.validation.packs, kOptional);
  visit("checkpoint.interval", config.checkpoint.interval, kOptional);
  visit("checkpoint.keep", config.checkpoint.keep, kOptional);
  visit("report.pictures", config.report.pictures, kOptional);
  visit("report.max_new_tokens", config.report.max_new_tokens, kOptional);
}

/// Old names of keys, which files, command lines and checkpoints may still have, with today's.
constexpr std::array<std::pair<std::string_view, std::string_view>, 3> kOldNames{
    {{"parallel.tensor", "parallel.tp"},
     {"parallel.data", "parallel.dp"},
     {"training.global_batch", "training.global_batch_size"}}};

/// The name a key has today.
std::string todays_name(const std::string& key) {
  for (const auto& [old_name, name] : kOldNames) {
    if (key == old_name) return std::string(name);
  }
  return key;
}

std::string section_of(std::string_view key) { return std::string(key.substr(0, key.find('.'))); }

const std::vector<std::string>& key_names() {
  static const auto names = [] {
    std::vector<std::string> keys;
    const RunConfig config;
    visit_keys(config, [&](const char* key, const auto& /*member*/, Need /*need*/) { keys.emplace_back(key); });
    return keys;
  }();
  return names;
}

const std::vector<std::string>& section_names() {
  static const auto names = [] {
    std::vector<std::string> sections;
    for (const auto& key : key_names()) {
      if (sections.empty() || sections.back() != section_of(key)) sections.push_back(section_of(key));
    }
    return sections;
  }();
  return names;
}

// Values as text. Each type of the list has write_value, read_value (false: not one of this type) and a description.

constexpr std::array<std::pair<const char*, megatron::EmbeddingSharding>, 2> kEmbeddingShardings{
    {{"vocab", megatron::EmbeddingSharding::kVocab}, {"hidden", megatron::EmbeddingSharding::kHidden}}};
constexpr std::array<std::pair<const char*, ProjectorSharding>, 3> kProjectorShardings{
    {{"replicated", ProjectorSharding::kReplicated},
     {"column", ProjectorSharding::kColumn},
     {"row", ProjectorSharding::kRow}}};
constexpr std::array<std::pair<const char*, InsertExchange>, 2> kExchanges{
    {{"fused", InsertExchange::kFused}, {"all-gather", InsertExchange::kAllGather}}};
constexpr std::array<std::pair<const char*, megatron::LearningRateDecay>, 4> kDecays{
    {{"cosine", megatron::LearningRateDecay::kCosine},
     {"linear", megatron::LearningRateDecay::kLinear},
     {"constant", megatron::LearningRateDecay::kConstant},
     {"wsd", megatron::LearningRateDecay::kWsd}}};
constexpr std::array<std::pair<const char*, bool>, 2> kTruths{{{"true", true}, {"false", false}}};

const auto& names_of(megatron::EmbeddingSharding /*type*/) { return kEmbeddingShardings; }
const auto& names_of(ProjectorSharding /*type*/) { return kProjectorShardings; }
const auto& names_of(InsertExchange /*type*/) { return kExchanges; }
const auto& names_of(megatron::LearningRateDecay /*type*/) { return kDecays; }
const auto& names_of(bool /*type*/) { return kTruths; }
/// All spellings of YAML 1.2's core schema.
constexpr std::array<std::pair<const char*, bool>, 6> kReadTruths{
    {{"true", true}, {"True", true}, {"TRUE", true}, {"false", false}, {"False", false}, {"FALSE", false}}};
template <class Named>
const auto& read_names_of(Named type) {
  return names_of(type);
}
const auto& read_names_of(bool /*type*/) { return kReadTruths; }

template <class Named>
std::string write_value(Named value) {
  for (const auto& [name, named] : names_of(value)) {
    if (named == value) return name;
  }
  TORCH_INTERNAL_ASSERT(false, "a value without a name");
}
std::string write_value(const std::string& value) { return value; }
std::string write_value(int64_t value) { return std::to_string(value); }
/// The shortest digits that read back as the same number.
std::string write_value(double value) {
  std::array<char, 32> digits{};
  const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), value).ptr;
  return {digits.data(), end};
}
std::string write_value(const std::optional<int64_t>& value) { return value ? std::to_string(*value) : "all"; }
std::string write_value(const megatron::ParameterScales& value) {
  std::string text;
  for (const auto& [prefix, scale] : value) {
    text += fmt::format("{}{}: {}", text.empty() ? "" : ", ", prefix, write_value(scale));
  }
  return text;
}

template <class Number>
bool read_number(std::string_view text, Number& value) {
  if (text.starts_with('+') && !text.starts_with("+-")) text.remove_prefix(1);
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size();
}

template <class Named>
bool read_value(const std::string& text, Named& value) {
  for (const auto& [name, named] : read_names_of(value)) {
    if (text != name) continue;
    value = named;
    return true;
  }
  return false;
}
bool read_value(const std::string& text, std::string& value) {
  value = text;
  return is_utf8(text);  // checkpoints keep settings as JSON
}
bool read_value(const std::string& text, int64_t& value) { return read_number(text, value); }
bool read_value(const std::string& text, double& value) { return read_number(text, value) && std::isfinite(value); }
bool read_value(const std::string& text, std::optional<int64_t>& value) {
  if (text == "all") value.reset();
  return text == "all" || read_number(text, value.emplace());
}
bool read_value(const std::string& text, megatron::ParameterScales& value) {
  value.clear();
  std::istringstream entries(text);
  for (std::string entry; std::getline(entries, entry, ',');) {
    std::istringstream parts(entry);
    std::string prefix;
    std::string number;
    double scale = 0.0;
    if (!std::getline(parts >> std::ws, prefix, ':') || !(parts >> number) || !(parts >> std::ws).eof()) return false;
    if (!read_value(number, scale) || !value.emplace(prefix, scale).second) return false;
  }
  return is_utf8(text);
}

template <class Named>
std::string expected(Named type) {
  const auto& names = names_of(type);
  std::string text = names.front().first;
  for (size_t i = 1; i < names.size(); ++i) text.append(i + 1 < names.size() ? ", " : " or ").append(names[i].first);
  return text;
}
std::string expected(const std::string& /*type*/) { return "text in UTF-8"; }
std::string expected(int64_t /*type*/) { return "an integer"; }
std::string expected(double /*type*/) { return "a number"; }
std::string expected(const std::optional<int64_t>& /*type*/) { return "an integer or all"; }
std::string expected(const megatron::ParameterScales& /*type*/) {
  return "names with a factor each, as a: 0.1, b.c: 2";
}

// Names that are nearly right.

/// Levenshtein's: insertions, deletions and replacements that turn `a` into `b`.
size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = std::exchange(row[0], i + 1);
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, diagonal + 1, row[j] + 1});
    }
  }
  return row.back();
}

/// The nearest of `names`, the first of equals. A name without a section is compared with keys without theirs too.
std::string nearest(const std::string& wrong, const std::vector<std::string>& names) {
  const auto distance = [&](const std::string& name) {
    const auto whole = edit_distance(wrong, name);
    if (wrong.find('.') != std::string::npos) return whole;
    return std::min(whole, edit_distance(wrong, std::string_view(name).substr(name.find('.') + 1)));
  };
  std::vector<size_t> distances;
  distances.reserve(names.size());
  for (const auto& name : names) distances.push_back(distance(name));
  const auto least = std::min_element(distances.begin(), distances.end());
  return names[static_cast<size_t>(least - distances.begin())];
}

void check_known(const char* kind, const std::string& name, const std::vector<std::string>& names,
                 const std::string& where) {
  const bool known = std::find(names.begin(), names.end(), name) != names.end();
  TORCH_CHECK_VALUE(known, "unknown ", kind, " ", name, " in ", where, "; did you mean ", nearest(name, names), "?");
}

// What a file or the overrides give: text by key.

struct Given {
  std::string key;                   ///< as it is written there; it may be an old name
  std::optional<std::string> value;  ///< none: what stands there is no single value, nor a map of such
  std::string shown;                 ///< for messages
  std::string where;                 ///< file:line or the override
  bool is_map = false;               ///< `value` is that of ParameterScales
};
using GivenValues = std::map<std::string, Given, std::less<>>;

/// The name on the left of a colon.
std::string name_of(const YAML::Node& key, const std::filesystem::path& path) {
  // A message would end at a NUL.
  TORCH_CHECK_VALUE(key.IsScalar() && key.Scalar().find('\0') == std::string::npos, location(path, key.Mark()),
                    ": a name that isn't plain text");
  return key.Scalar();
}

Given given_value(const std::string& key, const YAML::Node& value, const std::string& where) {
  if (value.IsScalar()) return {key, value.Scalar(), value.Scalar(), where};
  if (value.IsMap()) {
    std::string text;
    for (const auto& entry : value) text += entry.first.Scalar() + ": " + entry.second.Scalar() + ",";
    return {key, text, "a section", where, /*is_map=*/true};
  }
  return {key, std::nullopt, value.IsNull() ? "no value" : "a list", where};
}

/// Adds a value under today's name of its key. Returns the earlier one of that key, if there is one, and leaves it.
Given* add_value(GivenValues& values, const Given& given) {
  const auto name = todays_name(given.key);
  check_known("key", name, key_names(), given.where);
  const auto [earlier, is_new] = values.emplace(name, given);
  if (is_new) return nullptr;
  TORCH_CHECK_VALUE(earlier->second.key == given.key, earlier->second.key, " in ", earlier->second.where, " and ",
                    given.key, " in ", given.where, " are two names of one key: give ", name, " alone");
  return &earlier->second;
}

GivenValues values_of_file(const std::filesystem::path& path) {
  const auto root = parse_yaml_file(path);
  TORCH_CHECK_VALUE(root.IsMap() || root.IsNull(), location(path, root.Mark()),
                    ": not a configuration: expected sections with keys, as training: and steps: 100 below it");
  GivenValues values;
  std::map<std::string, std::string> sections;  // and where they are
  for (const auto& section : root) {
    const auto section_name = name_of(section.first, path);
    const auto where = location(path, section.first.Mark());
    check_known("section", section_name, section_names(), where);
    const auto [earlier, is_new] = sections.emplace(section_name, where);
    TORCH_CHECK_VALUE(is_new, "section ", section_name, " in ", where, " is already in ", earlier->second);
    TORCH_CHECK_VALUE(section.second.IsMap() || section.second.IsNull(), "section ", section_name, " in ", where,
                      " must hold keys, as ", section_name, ": and a line ", "key: value below it");
    for (const auto& entry : section.second) {
      const auto value = given_value(section_name + "." + name_of(entry.first, path), entry.second,
                                     location(path, entry.first.Mark()));
      const auto* before = add_value(values, value);
      TORCH_CHECK_VALUE(before == nullptr, value.key, " in ", value.where, " is already in ", before->where);
    }
  }
  return values;
}

GivenValues values_of_overrides(const std::vector<std::string>& overrides) {
  GivenValues values;
  for (const auto& text : overrides) {
    const auto equals = text.find('=');
    TORCH_CHECK_VALUE(equals != std::string::npos, "the override ", text, " has no '=': expected section.key=value");
    const auto value = text.substr(equals + 1);
    const Given given{text.substr(0, equals), value, value.empty() ? "nothing" : value, "the override " + text};
    if (auto* earlier = add_value(values, given)) *earlier = given;
  }
  return values;
}

void set_values(const GivenValues& values, RunConfig& config) {
  visit_keys(config, [&](const char* key, auto& member, Need /*need*/) {
    const auto found = values.find(key);
    if (found == values.end()) return;
    const auto& given = found->second;
    if (given.key != key) {
      config.warnings.push_back(fmt::format("{} in {} is now called {}", given.key, given.where, key));
    }
    auto value = member;
    const bool has_form =
        given.is_map ? std::is_same_v<decltype(value), megatron::ParameterScales> : given.value.has_value();
    TORCH_CHECK_VALUE(has_form && read_value(*given.value, value), key, " in ", given.where, " must be ",
                      expected(member), ", got ", given.shown);
    member = std::move(value);
  });
}

}  // namespace

RunConfig load_run_config(const std::filesystem::path& path, const std::vector<std::string>& overrides) {
  const auto from_file = values_of_file(path);
  const auto from_overrides = values_of_overrides(overrides);
  RunConfig config;
  set_values(from_file, config);
  set_values(from_overrides, config);
  visit_keys(config, [&](const char* key, const auto& /*member*/, Need need) {
    const bool given = from_file.count(key) > 0 || from_overrides.count(key) > 0;
    TORCH_CHECK_VALUE(given || need == Need::kOptional, path.string(), " lacks ", key, ", which has no default");
  });
  if (config.run.directory.empty()) {
    config.run.directory = "runs/" + path.stem().string();
    TORCH_CHECK_VALUE(is_utf8(config.run.directory), "run.directory must be text in UTF-8, which the name of ",
                      path.string(), " is not");
  }
  return config;
}

RunConfig run_config_from_settings(const std::vector<std::string>& key_values) {
  RunConfig config;
  set_values(values_of_overrides(key_values), config);
  return config;
}

std::vector<std::pair<std::string, std::string>> settings(const RunConfig& config) {
  std::vector<std::pair<std::string, std::string>> result;
  visit_keys(config, [&](const char* key, const auto& member, Need /*need*/) {
    result.emplace_back(key, write_value(member));
  });
  return result;
}

namespace {

struct Bound {
  const char* key;
  int64_t value;
  int64_t least;
};

void check_counts(const RunConfig& config) {
  const Bound bounds[] = {{"run.timeout_seconds", config.run.timeout_seconds, 1},
                          {"data.vocabulary_size", config.data.vocabulary_size, 1},
                          {"data.max_side", config.data.max_side, 1},
                          {"model.sliding_window", config.model.sliding_window, 1},
                          {"training.steps", config.training.steps, 1},
                          {"training.seed", config.training.seed, 0},
                          {"training.global_batch_size", config.training.global_batch_size, 1},
                          {"training.micro_batch_size", config.training.micro_batch_size, 1},
                          {"training.sequence_length", config.training.sequence_length, 1},
                          {"training.warmup_steps", config.training.warmup_steps, 0},
                          {"training.decay_steps", config.training.decay_steps, 0},
                          {"validation.interval", config.validation.interval, 0},
                          {"validation.packs", config.validation.packs.value_or(1), 1},
                          {"checkpoint.interval", config.checkpoint.interval, 0},
                          {"checkpoint.keep", config.checkpoint.keep, 1},
                          {"report.pictures", config.report.pictures, 0},
                          {"report.max_new_tokens", config.report.max_new_tokens, 1}};
  for (const auto& [key, value, least] : bounds) {
    TORCH_CHECK_VALUE(value >= least, key, " ", value, " is below ", least);
  }
}

/// No number is so large that arithmetic with it overflows. A seed is but a pattern of bits.
void check_no_overflow(const RunConfig& config) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  visit_keys(config, [&](const char* key, const auto& member, Need /*need*/) {
    if constexpr (std::is_same_v<decltype(member), const int64_t&>) {
      TORCH_CHECK_VALUE(member <= kMost || &member == &config.training.seed, key, " ", member, " is above ", kMost);
    }
  });
}

void check_run_and_data(const RunConfig& config) {
  const auto& device = config.run.device;
  TORCH_CHECK_VALUE(device == "auto" || device == "cpu" || device == "cuda", "run.device ", device,
                    " is not one of auto, cpu, cuda");
  TORCH_CHECK_VALUE(!config.data.directory.empty(), "data.directory is empty");
  check_no_tilde("data.directory", config.data.directory);
  check_no_tilde("run.directory", config.run.directory);
  TORCH_CHECK_VALUE(config.data.held_out >= 0.0 && config.data.held_out < 1.0, "data.held_out ", config.data.held_out,
                    " is not in [0, 1)");
  TORCH_CHECK_VALUE(config.data.max_unreadable >= 0.0 && config.data.max_unreadable <= 1.0, "data.max_unreadable ",
                    config.data.max_unreadable, " is not in [0, 1]");
  TORCH_CHECK_VALUE(config.training.clip_grad_norm >= 0.0, "training.clip_grad_norm ", config.training.clip_grad_norm,
                    " is negative");
}

/// The sizes of one step against the ranks that share it.
void check_batch(const RunConfig& config, const parallel::RankGrid& grid) {
  const auto& training = config.training;
  TORCH_CHECK_VALUE(training.global_batch_size % (training.micro_batch_size * grid.dp) == 0,
                    "training.global_batch_size ", training.global_batch_size,
                    " is not divisible by training.micro_batch_size ", training.micro_batch_size,
                    " x data-parallel size ", grid.dp);
  const int64_t S = config.training.sequence_length;
  if (config.parallel.sequence_parallel) parallel::even_shard_size(S, grid.tp, "training.sequence_length");
  // The begin symbol, <im_start>, the picture's rows, <im_end>, and a caption of one token at least.
  const int64_t picture_tokens = crop_options(config).global_tokens() + 3;
  TORCH_CHECK_VALUE(S > picture_tokens, "training.sequence_length ", S, " has no room for a caption: a picture of ",
                    config.vision.image_size, " pixels takes ", picture_tokens, " positions");
}

}  // namespace

void validate(const RunConfig& config, int num_ranks) {
  const auto grid = rank_grid(config, num_ranks);
  check_counts(config);
  check_no_overflow(config);
  check_run_and_data(config);
  model_config(config, config.data.vocabulary_size).validate(grid.tp);
  crop_options(config).validate();
  check_batch(config, grid);
  learning_rate_schedule(config).validate();
  adamw_options(config).validate();
}

parallel::RankGrid rank_grid(const RunConfig& config, int num_ranks) {
  const auto& sizes = config.parallel;
  const std::tuple<const char*, int64_t, const char*> missing[] = {{"cp", sizes.cp, "context"},
                                                                   {"pp", sizes.pp, "pipeline"},
                                                                   {"ep", sizes.ep, "expert"},
                                                                   {"etp", sizes.etp, "expert-tensor"}};
  for (const auto& [key, size, kind] : missing) {
    TORCH_CHECK_VALUE(size == 1, "parallel.", key, " ", size, ": ", kind, " parallelism is not there yet");
  }
  int64_t tp = sizes.tp;
  int64_t dp = sizes.dp;
  TORCH_CHECK_VALUE(tp >= 0 && dp >= 0, "parallel.tp ", tp, " or parallel.dp ", dp, " is negative");
  if (dp == 0) dp = tp == 0 ? 1 : std::max<int64_t>(num_ranks / tp, 1);
  if (tp == 0) tp = std::max<int64_t>(num_ranks / dp, 1);
  // Bounded first, so that the product can't overflow.
  TORCH_CHECK_VALUE(tp <= num_ranks && dp <= num_ranks && tp * dp == num_ranks, num_ranks,
                    num_ranks == 1 ? " rank is" : " ranks are", " not parallel.tp ", tp, " x parallel.dp ", dp,
                    ": start as many, or set parallel.tp=", std::gcd(tp, num_ranks), " and leave parallel.dp out");
  return {.tp = static_cast<int>(tp), .dp = static_cast<int>(dp)};
}

Step37Config model_config(const RunConfig& config, int64_t vocabulary_size) {
  const auto& model = config.model;
  constexpr int64_t kMaxLayers = 10000;  // far beyond any model: a slip of the pen mustn't take all memory
  TORCH_CHECK_VALUE(model.num_layers >= 1 && model.num_layers <= kMaxLayers, "model.num_layers ", model.num_layers,
                    " is not in [1, ", kMaxLayers, "]");
  TORCH_CHECK_VALUE(model.full_attention_interval >= 1, "model.full_attention_interval ", model.full_attention_interval,
                    " is below 1");
  Step37Config result;
  result.text.vocabulary_size = vocabulary_size;
  result.text.hidden_size = model.hidden_size;
  result.text.head_dim = model.head_dim;
  result.text.num_query_groups = model.num_query_groups;
  result.text.ffn_hidden_size = model.ffn_hidden_size;
  result.text.rms_norm_eps = model.rms_norm_eps;
  result.text.init_std = model.init_std;
  result.execution.embedding_sharding = config.parallel.embedding_sharding;
  result.execution.sequence_parallel = config.parallel.sequence_parallel;
  result.execution.accumulate_into_grad = true;
  for (int64_t layer = 0; layer < model.num_layers; ++layer) {
    megatron::AttentionLayerConfig attention;
    const bool full = layer % model.full_attention_interval == 0;
    attention.num_attention_heads = full ? model.num_attention_heads : model.num_sliding_attention_heads;
    attention.sliding_window = full ? 0 : model.sliding_window;
    attention.rope_theta = full ? model.rope_theta : model.sliding_rope_theta;
    attention.partial_rotary_factor = full ? model.partial_rotary_factor : 1.0;
    result.text.layers.push_back(attention);
  }
  result.vision.image_size = config.vision.image_size;
  result.vision.patch_size = config.vision.patch_size;
  result.vision.width = config.vision.width;
  result.vision.layers = config.vision.layers;
  result.vision.heads = config.vision.heads;
  result.vision.mlp_width = config.vision.mlp_width;
  result.projector_bias = model.projector_bias;
  result.projector_sharding = config.parallel.projector_sharding;
  result.exchange = config.parallel.exchange;
  result.checked = config.run.checked;
  result.freeze_vision_model = config.vision.freeze;
  result.freeze_projector = model.freeze_projector;
  result.freeze_language_model = model.freeze_language_model;
  return result;
}

megatron::LearningRateSchedule learning_rate_schedule(const RunConfig& config) {
  megatron::LearningRateSchedule schedule;
  schedule.peak = config.training.learning_rate;
  schedule.floor = config.training.min_learning_rate;
  schedule.warmup_steps = config.training.warmup_steps;
  schedule.total_steps = config.training.steps;
  schedule.decay = config.training.learning_rate_decay;
  schedule.decay_steps = config.training.decay_steps;
  return schedule;
}

megatron::AdamWOptions adamw_options(const RunConfig& config) {
  megatron::AdamWOptions options;
  options.beta1 = config.training.beta1;
  options.beta2 = config.training.beta2;
  options.eps = config.training.eps;
  options.weight_decay = config.training.weight_decay;
  options.learning_rate_scales = config.training.learning_rate_scales;
  options.weight_decay_scales = config.training.weight_decay_scales;
  return options;
}

CropOptions crop_options(const RunConfig& config) {
  CropOptions options;
  options.global_side = config.vision.image_size;
  options.crop_side = config.data.crops ? config.data.crop_side : config.vision.image_size;
  options.max_side = config.data.max_side;
  options.vision_patch_size = config.vision.patch_size;
  options.with_crops = config.data.crops;
  return options;
}

}  // namespace step37
